// LayerNorm in float32. The mean comes first, then the sum of the centred squares, so nothing cancels.
#pragma once
#include "operand.h"

namespace tf::TF_ISA {
namespace {

constexpr float NORM_EPS = 1e-5f;

// The sum of f(k, n) over whole vectors and the tail. f gives 0 in the lanes past n.
template <class Function>
inline float sum_row(int64_t n, Function f) {
    vf parts[4] = {};
    int64_t k = 0;
    for (; k + 4 * LANES <= n; k += 4 * LANES)
        for (int j = 0; j < 4; ++j) parts[j] += f(k + j * LANES, LANES);
    for (; k + LANES <= n; k += LANES) parts[0] += f(k, LANES);
    if (k < n) parts[1] += f(k, int(n - k));
    return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// y = (x - mean) / sqrt(var + eps) * gain + shift, stored as operands. x, gain and shift are n floats.
template <class Operand>
inline void layer_norm(const float* x, const float* gain, const float* shift, int64_t n, Operand* y) {
    const float mean = sum_row(n, [=](int64_t k, int m) { return load_part(x + k, m); }) / float(n);
    const vf ones = splat(1.0f);
    const float square = sum_row(n, [=](int64_t k, int m) {
        vf d = load_part(x + k, m) - mean;
        if (m < LANES) d = first_of(d, m, zero());
        return d * d;
    });
    const vf inverse = ones / sqrt(splat(square / float(n) + NORM_EPS));
    store_row(y, n, [=](int64_t k, int m) {
        return fma((load_part(x + k, m) - mean) * inverse, load_part(gain + k, m), load_part(shift + k, m));
    });
}

}  // namespace
}  // namespace tf::TF_ISA
