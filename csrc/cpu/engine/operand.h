// The number formats of the three precisions.
//
//   fp32   weights, operands of products and cache are fp32
//   bf16   weights, operands of products and cache are bf16, and sums are fp32. Where the machine multiplies bf16
//          (vdpbf16ps) operands are stored as bf16, and a denormal operand counts as 0. Elsewhere the same rounded
//          values are stored as floats
//   int8   weights are int8 with a scale for each output column, operands are fp32, the cache is bf16
//
// proj_in, proj_out, the residual stream, statistics, softmax, GELU, exp and log-det are fp32 in all three.
#pragma once
#include "../vec.h"
#include "sizes.h"

namespace tf::TF_ISA {
namespace {

// A float that holds a bf16 value.
struct rounded {
    float value;
};

inline vf round_to_bf16(vf v) {
    const vu u = bits<vu>(v);
    const vu nearest = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    return bits<vf>(select(v == v, nearest, u));
}

inline vf load(const rounded* p) { return load(&p->value); }
inline void store(rounded* p, vf v) { store(&p->value, round_to_bf16(v)); }
inline void store(rounded* p, vf v, int n) { store(&p->value, round_to_bf16(v), n); }

// What the machine's own conversion makes of v: the nearest number, with denormals set to 0, as its products take them
// anyway.
inline vh narrow_operand(vf v) {
#if defined(__AVX512BF16__)
    return bits<vh>(_mm512_cvtneps_pbh((__m512)v));
#else
    return narrow_bf16(v);
#endif
}

#if defined(__AVX512BF16__)
struct operand_bf16 {
    uint16_t bits;
};

inline vf load(const operand_bf16* p) { return widen_bf16(load_bits(p)); }
inline void store(operand_bf16* p, vf v) {
    const vh h = narrow_operand(v);
    memcpy(p, &h, sizeof h);
}
inline void store(operand_bf16* p, vf v, int n) { store_bits(&p->bits, narrow_operand(v), n); }
#endif

struct PrecisionFp32 {
    typedef float Operand;
    typedef float Cache;
};

struct PrecisionBf16 {
#if defined(__AVX512BF16__)
    typedef operand_bf16 Operand;
#else
    typedef rounded Operand;
#endif
    typedef bf16 Cache;
};

struct PrecisionInt8 {
    typedef float Operand;
    typedef bf16 Cache;
};

// Stores f(k, n) at y + k, for whole vectors and for the tail of a row of n numbers.
template <class Type, class Function>
inline void store_row(Type* y, int64_t n, Function f) {
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) store(y + k, f(k, LANES));
    if (k < n) store(y + k, f(k, int(n - k)), int(n - k));
}

inline vf load_part(const float* p, int n) { return n == LANES ? load(p) : load(p, n); }

}  // namespace
}  // namespace tf::TF_ISA
