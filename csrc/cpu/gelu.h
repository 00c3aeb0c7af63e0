// The exact (erf) GELU.
#pragma once
#include "vec.h"

namespace tf::TF_ISA {
namespace {

// x Phi(x) = max(x, 0) - u e^(-u^2 / 2) g(u), u = |x|, g(u) = erfc(u / sqrt 2) e^(u^2 / 2) / 2: no cancellation on either
// side, and one formula for both. Written u g(u) = s Q(s) with s = u / (1 + 7/16 u): Q is a polynomial of degree 10, the
// minimax fit of relative error 3.3e-9 on 0 <= u <= 14.5, where GELU has long rounded to x or to 0.
// Error against float64, measured: 3.0 ulp everywhere, and 1.3e-7 below x = 4; above, x itself is coarser than that.
inline vf gelu(vf x) {
    const vf magnitude = bits<vf>(bits<vu>(x) & 0x7fffffffu);
    const vf u = select(magnitude < splat(14.5f), magnitude, splat(14.5f));
    const vf s = u / fma(u, splat(0.4375f), splat(1.0f));
    vf q = fma(splat(-0x1.473784p-17f), s, splat(0x1.572a64p-14f));
    q = fma(q, s, splat(-0x1.035856p-12f));
    q = fma(q, s, splat(0x1.98401ep-12f));
    q = fma(q, s, splat(-0x1.3d78ecp-11f));
    q = fma(q, s, splat(0x1.883a52p-13f));
    q = fma(q, s, splat(0x1.7c27c4p-10f));
    q = fma(q, s, splat(0x1.050982p-7f));
    q = fma(q, s, splat(-0x1.ba6b50p-9f));
    q = fma(q, s, splat(-0x1.71088cp-3f));
    q = fma(q, s, splat(0.5f));
    // e^(-u^2/2) = 2^n (1 + (e^r - 1)). The square is rounded; what it lost would be 4 ulp of the result at u = 4.
    const vf square = u * u;
#if defined(__FMA__) || defined(__aarch64__)
    const vf lost = fma(u, u, -square);
#else
    // Dekker: both halves have 12 bits, so their products are exact.
    const vf head = bits<vf>(bits<vu>(u) & 0xfffff000u), rest = u - head;
    const vf lost = ((head * head - square) + 2.0f * head * rest) + rest * rest;
#endif
    const float round_to_int = 0x1.8p23f;
    const vf shifted = square * -0x1.715476p-1f + round_to_int;
    const vf n = shifted - round_to_int;
    vf r = square * -0.5f - n * 0x1.62e4p-1f;
    r = fma(n, splat(-0x1.7f7d1cp-20f), r);
    r = fma(lost, splat(-0.5f), r);
    vf e = fma(splat(0x1.6a234ep-10f), r, splat(0x1.123a6cp-7f));
    e = fma(e, r, splat(0x1.5558f4p-5f));
    e = fma(e, r, splat(0x1.555490p-3f));
    e = fma(e, r, splat(0x1.fffffcp-2f));
    const vf sq = s * q;
    const vf tail = fma(sq, fma(r * r, e, r), sq);
#if defined(__AVX512F__)
    const vf scaled = (vf)_mm512_scalef_ps((__m512)tail, (__m512)n);
#else
    // n >= -152: 2^n in two normal factors.
    const vi whole = bits<vi>(shifted) - bits<int32_t>(round_to_int);
    const vi half = whole >> 1, rest_of = whole - half;
    const vf scaled = tail * bits<vf>((half + 127) << 23) * bits<vf>((rest_of + 127) << 23);
#endif
    return max(zero(), x) - scaled;  // max keeps a NaN of its second argument
}

}  // namespace
}  // namespace tf::TF_ISA
