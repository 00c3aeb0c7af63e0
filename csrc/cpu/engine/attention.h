// W queries of one (row, head) against its cache and, causally, each other.
//
// Keys lie in blocks of 16, [T/16][Ep][16] (bf16: [T/16][Ep/2][16][2]): a vector of scores is built without a sum across
// lanes. Values are rows, [T][Ep]. A score is the sum of two chains, over even and over odd positions of the head; an
// output the sum of two chains over even and over odd keys. No order depends on W, the row or the thread, so a query has
// the same bits alone and in a window; and it never touches a key after its own, which may be anything, NaN included.
#pragma once
#include "operand.h"

namespace tf::TF_ISA {
namespace {

constexpr int PARTS = KEYS / W;            // vectors of a block of keys
constexpr int BLOCKS = W >= 8 ? W / 4 : 1;  // key blocks at a time: as many chains as hide the latency
constexpr int64_t VALUES = 64;              // values at a time, read once for all queries of a window

inline void key_pair(const float* block, int64_t e, int part, vf& even, vf& odd) {
    even = load(block + e * KEYS + part * W);
    odd = load(block + (e + 1) * KEYS + part * W);
}

inline void key_pair(const bf16* block, int64_t e, int part, vf& even, vf& odd) {
    vu pair;
    memcpy(&pair, block + e * KEYS + 2 * part * W, sizeof pair);
    even = bits<vf>(pair << 16), odd = bits<vf>(pair & 0xffff0000u);
}

inline void put_key(float* block, int64_t e, int lane, float key) { block[e * KEYS + lane] = key; }
inline void put_key(bf16* block, int64_t e, int lane, float key) {
    const vh h = narrow_bf16(splat(key));
    block[(e & ~int64_t(1)) * KEYS + 2 * lane + (e & 1)].bits = h[0];
}

template <int N, class Cache>
inline void score_blocks(const float* q, const Cache* keys, int64_t Ep, float* scores) {
    vf sum[N][PARTS][2] = {};
    for (int64_t e = 0; e < Ep; e += 2) {
        const vf first = splat(q[e]), second = splat(q[e + 1]);
#pragma GCC unroll 8
        for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; ++part) {
                vf even, odd;
                key_pair(keys + b * Ep * KEYS, e, part, even, odd);
                sum[b][part][0] = fma(first, even, sum[b][part][0]);
                sum[b][part][1] = fma(second, odd, sum[b][part][1]);
            }
    }
#pragma GCC unroll 8
    for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; ++part)
            store(scores + b * KEYS + part * W, sum[b][part][0] + sum[b][part][1]);
}

// scores[0 .. n) -> exp(score - max), zeros up to a whole block; returns the sum.
inline float soft_max(float* scores, int64_t n) {
    const int64_t end = round_up(n, KEYS);
    for (int64_t t = n; t < end; ++t) scores[t] = -INFINITY;
    vf most = splat(-INFINITY);
    for (int64_t t = 0; t < end; t += W) most = max(most, load(scores + t));
    const vf largest = splat(max_lane(most));
    vf total = zero();
    for (int64_t t = 0; t < end; t += W) {
        const vf p = exp(load(scores + t) - largest);
        store(scores + t, p);
        total += p;
    }
    return sum(total);
}

// out (2 chains, Ep each) += p[t] values[t] for begin <= t < end; V vectors of the head from e on.
template <int V, class Cache>
inline void add_values(const float* p, const Cache* values, int64_t Ep, int64_t e, int64_t begin, int64_t end,
                       float* out) {
    vf sum[2][V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[0][v] = load(out + e + v * W), sum[1][v] = load(out + Ep + e + v * W);
    int64_t t = begin;
    for (; t + 2 <= end; t += 2) {
        const vf first = splat(p[t]), second = splat(p[t + 1]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            sum[0][v] = fma(first, load(values + t * Ep + e + v * W), sum[0][v]);
            sum[1][v] = fma(second, load(values + (t + 1) * Ep + e + v * W), sum[1][v]);
        }
    }
    if (t < end) {
        const vf first = splat(p[t]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[0][v] = fma(first, load(values + t * Ep + e + v * W), sum[0][v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + e + v * W, sum[0][v]), store(out + Ep + e + v * W, sum[1][v]);
}

template <class Cache>
inline void add_values(const float* p, const Cache* values, int64_t Ep, int64_t begin, int64_t end, float* out) {
    int64_t e = 0;
    for (; e + 4 * W <= Ep; e += 4 * W) add_values<4>(p, values, Ep, e, begin, end, out);
    if (e + 2 * W <= Ep) add_values<2>(p, values, Ep, e, begin, end, out), e += 2 * W;
    if (e < Ep) add_values<1>(p, values, Ep, e, begin, end, out);
}

inline Bytes attention_scratch(int64_t queries, int64_t Ep, int64_t Tp) {
    return Bytes{queries, false} * (Tp + 2 * Ep) + Bytes{round_up(queries, 16), false};
}

// q: `queries` rows of Ep floats, already scaled, `q_stride` apart; the first stands at `position` and sees the keys
// 0 .. position. out: E operands a query, `out_stride` apart. scratch: attention_scratch() floats, 64-byte aligned.
template <class Cache, class Operand>
inline void attend(const float* q, int64_t q_stride, int64_t queries, int64_t position, const Cache* keys,
                   const Cache* values, int64_t E, int64_t Ep, int64_t Tp, float* scratch, Operand* out,
                   int64_t out_stride) {
    float* sums = scratch + queries * Tp;
    float* totals = sums + queries * 2 * Ep;
    const int64_t blocks = (position + queries + KEYS - 1) / KEYS;
    for (int64_t b = 0; b < blocks;) {
        const bool many = b + BLOCKS <= blocks;
        for (int64_t w = 0; w < queries; ++w) {
            const Cache* at = keys + b * Ep * KEYS;
            float* scores = scratch + w * Tp + b * KEYS;
            if (many)
                score_blocks<BLOCKS>(q + w * q_stride, at, Ep, scores);
            else
                score_blocks<1>(q + w * q_stride, at, Ep, scores);
        }
        b += many ? BLOCKS : 1;
    }
    for (int64_t w = 0; w < queries; ++w) {
        totals[w] = soft_max(scratch + w * Tp, position + w + 1);
        for (int64_t e = 0; e < 2 * Ep; e += W) store(sums + w * 2 * Ep + e, zero());
    }
    for (int64_t begin = 0; begin < position + queries; begin += VALUES)
        for (int64_t w = 0; w < queries; ++w) {
            const int64_t last = position + w + 1, end = begin + VALUES < last ? begin + VALUES : last;
            if (begin < end) add_values(scratch + w * Tp, values, Ep, begin, end, sums + w * 2 * Ep);
        }
    for (int64_t w = 0; w < queries; ++w) {
        const float *even = sums + w * 2 * Ep, *odd = even + Ep;
        const vf factor = splat(1.0f / totals[w]);
        store_row(out + w * out_stride, E, [=](int64_t k, int) { return (load(even + k) + load(odd + k)) * factor; });
    }
}

}  // namespace
}  // namespace tf::TF_ISA
