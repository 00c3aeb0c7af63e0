// The affine transform has a scale and a shift for every number of a token:  x = z exp(a) + b;  log |dx / dz| = the sum
// of a.
#pragma once
#include "../operand.h"

namespace tf::TF_ISA {
namespace {

struct Affine {
    static constexpr int PARTS = 2;  // the parts of a token's parameters, D numbers each: a, then b

    // z and x are the D numbers of one token of one row. parameters.load(part, d, n) gives numbers d .. d + n of a
    // part. Returns log |dx / dz|.
    template <class Parameters>
    static inline double inverse(const float* z, const Parameters& parameters, int64_t D, float* x) {
        vd total[2] = {};
        for (int64_t d = 0; d < D; d += LANES) {
            const int n = D - d < LANES ? int(D - d) : LANES;
            const vf a = parameters.load(0, d, n);  // 0 in the lanes past D
            const vf next = load_part(z + d, n) * exp(a) + parameters.load(1, d, n);
            n == LANES ? store(x + d, next) : store(x + d, next, n);
            vd low, high;
            widen(a, low, high);
            total[0] += low, total[1] += high;
        }
        return sum(total[0] + total[1]);
    }
};

}  // namespace
}  // namespace tf::TF_ISA
