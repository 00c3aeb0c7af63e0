// What the parameters of the net do to a token. A new transform is a header like affine.h, a number in tf_transform and
// a case here.
#pragma once
#include "affine.h"
#include "shift.h"

namespace tf::TF_ISA {
namespace {

// Calls f with the transform of this number and returns the result. Returns {} where no transform has the number.
template <class Function>
inline auto with_transform(int number, Function f) -> decltype(f(Affine())) {
    switch (number) {
        case TF_TRANSFORM_SHIFT:
            return f(Shift());
        case TF_TRANSFORM_AFFINE:
            return f(Affine());
    }
    return {};
}

}  // namespace
}  // namespace tf::TF_ISA
