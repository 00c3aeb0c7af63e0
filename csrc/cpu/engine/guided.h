// Guidance: the parameters of a token from those of its conditional and of its unguided row.
#pragma once
#include "sizes.h"
#include "transforms/transforms.h"

namespace tf::TF_ISA {
namespace {

// The parameters of one token of one batch row, (PARTS, D), after guidance. With p those of the conditional row
// and q those of the unguided row they are p + g (p - q) in the parts that guidance acts on, and p in the others.
template <int PARTS>
class Guided {
   public:
    // guided_parts and annealed as in tf_inversion.
    Guided(const Shape& s, int32_t guided_parts, int32_t annealed) : D(s.D), last(s.T - 1), annealed(annealed) {
        for (int part = 0; part < PARTS; ++part) acts_on[part] = guided_parts >> part & 1;
    }

    // Makes these the parameters after token i; without an unguided row there is no guidance.
    void take(const float* conditional, const float* other = nullptr, double weight = 0.0, int64_t i = 0) {
        own = conditional, unguided = other;
        strength = splat(float(annealed && other ? weight * double(i + 1) / double(last) : weight));
    }

    vf load(int part, int64_t d, int n) const {
        const vf value = load_part(own + part * D + d, n);
        if (!unguided || !acts_on[part]) return value;
        return fma(strength, value - load_part(unguided + part * D + d, n), value);
    }

   private:
    const int64_t D, last;
    const int32_t annealed;
    const float *own = nullptr, *unguided = nullptr;
    vf strength = zero();  // g
    bool acts_on[PARTS];
};

}  // namespace
}  // namespace tf::TF_ISA
