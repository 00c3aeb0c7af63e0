// The shift has a shift for every number of a token, and preserves volumes:  x = z + b;  log |dx / dz| = 0.
#pragma once
#include "../operand.h"

namespace tf::TF_ISA {
namespace {

struct Shift {
    static constexpr int PARTS = 1;  // the one part is b

    // As Affine::inverse.
    template <class Parameters>
    static inline double inverse(const float* z, const Parameters& parameters, int64_t D, float* x) {
        for (int64_t d = 0; d < D; d += LANES) {
            const int n = D - d < LANES ? int(D - d) : LANES;
            const vf next = load_part(z + d, n) + parameters.load(0, d, n);
            n == LANES ? store(x + d, next) : store(x + d, next, n);
        }
        return 0.0;
    }
};

}  // namespace
}  // namespace tf::TF_ISA
