// The exact (erf) GELU.
#pragma once
#include "vec.h"

namespace tf::TF_ISA {
namespace {

// x Phi(x) = max(x, 0) - u e^(-u^2 / 2) g(u), with u = |x| and g(u) = erfc(u / sqrt 2) e^(u^2 / 2) / 2. Nothing cancels
// on either side of 0, and one formula serves both.
// u g(u) is written s Q(s) with s = u / (1 + 9/32 u). Q is a polynomial of degree 7, fitted on 0 <= u <= 14.5; beyond
// that GELU has long rounded to x or to 0. The relative error of Q is 6e-8 below u = 1, 2e-7 below u = 3, and 5e-6 at
// most. It may grow there because the result is then the tail of a distribution, of which few digits matter.
// The error against float64, measured: 1.3e-7 below x = 4, and 4e-8 below x = -1. In ulp it is 4 where |x| < 1, and
// less than 1 above x = 2. Two more terms, with the rounding error of u^2 carried along, gave 3 ulp everywhere and took
// 40 % more time.
inline vf gelu(vf x) {
    const vf magnitude = bits<vf>(bits<vu>(x) & 0x7fffffffu);
    const vf u = select(magnitude < splat(14.5f), magnitude, splat(14.5f));
    const vf s = u / fma(u, splat(0.28125f), splat(1.0f));
    vf q = fma(splat(-0x1.3a9992p-18f), s, splat(0x1.ad1f40p-16f));
    q = fma(q, s, splat(0x1.13b3c6p-13f));
    q = fma(q, s, splat(-0x1.bc246ep-11f));
    q = fma(q, s, splat(-0x1.6d0f3ap-8f));
    q = fma(q, s, splat(0x1.0ace38p-4f));
    q = fma(q, s, splat(-0x1.08840ap-2f));
    q = fma(q, s, splat(0x1.fffffep-2f));
    // e^(-u^2/2) = 2^n (1 + r + r^2 e)
    const float round_to_int = 0x1.8p23f;
    const vf square = u * u;
    const vf shifted = fma(square, splat(-0x1.715476p-1f), splat(round_to_int));
    const vf n = shifted - round_to_int;
    const vf r = fma(n, splat(-0x1.62e430p-1f), square * -0.5f);
    vf e = fma(splat(0x1.10628ep-7f), r, splat(0x1.572a0ap-5f));
    e = fma(e, r, splat(0x1.5557aep-3f));
    e = fma(e, r, splat(0x1.fffdfcp-2f));
    const vf sq = s * q;
    const vf tail = fma(sq, fma(r * r, e, r), sq);
#if defined(__AVX512F__)
    const vf scaled = (vf)_mm512_scalef_ps((__m512)tail, (__m512)n);
#else
    // n >= -152, so 2^n is two factors that are normal numbers.
    const vi whole = bits<vi>(shifted) - bits<int32_t>(round_to_int);
    const vi half = whole >> 1, rest_of = whole - half;
    const vf scaled = tail * bits<vf>((half + 127) << 23) * bits<vf>((rest_of + 127) << 23);
#endif
    return max(zero(), x) - scaled;  // max keeps a NaN that is its second argument
}

}  // namespace
}  // namespace tf::TF_ISA
