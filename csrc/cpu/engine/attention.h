// W queries of one (row, head) against its cache and, causally, each other.
//
// Keys lie in blocks of 16, [T/16][Ep][16] (bf16: [T/16][Ep/2][16][2]): a vector of scores is built without a sum across
// lanes. Values are rows, [T][Ep] (bf16: pairs of rows, [T/2][Ep][2]). Where the machine multiplies bf16 pairs, queries and
// probabilities are rounded to bf16 as well; elsewhere they stay fp32.
// A score is the sum of two chains over the head, an output the sum of two chains over the keys. No order depends on W, the
// row or the thread, so a query has the same bits alone and in a window; and it never touches a key after its own, which
// may be anything, NaN included.
#pragma once
#include "operand.h"

namespace tf::TF_ISA {
namespace {

constexpr int PARTS = KEYS / W;            // vectors of a block of keys
constexpr int BLOCKS = W >= 8 ? W / 4 : 1;  // key blocks at a time: as many chains as hide the latency
constexpr int64_t VALUES = 64;              // values at a time, read once for all queries of a window

// ---- what a cache of fp32 or bf16 does differently ---------------------------------------------------------------------

// A query as the scores take it.
template <class Cache>
struct QueryOf {
    typedef float Type;
};
#if defined(__AVX512BF16__)
template <>
struct QueryOf<bf16> {
    typedef bf16 Type;
};
#endif

inline void store_key(float* block, int64_t e, int64_t t, vf key, int part) {
    for (int k = 0; k < W; ++k) block[(e + part * W + k) * KEYS + t % KEYS] = key[k];
}

inline void store_key(bf16* block, int64_t e, int64_t t, vf key, int part) {
    const vh h = narrow_bf16(key);
    uint32_t pairs[W / 2];
    memcpy(pairs, &h, sizeof h);
    for (int k = 0; k < W / 2; ++k) memcpy(block + (e + part * W + 2 * k) * KEYS + 2 * (t % KEYS), pairs + k, 4);
}

inline void store_value(float* values, int64_t Ep, int64_t e, int64_t t, vf value) { store(values + t * Ep + e, value); }

inline void store_value(bf16* values, int64_t Ep, int64_t e, int64_t t, vf value) {
    bf16* at = values + (t & ~int64_t(1)) * Ep + 2 * e;
    const vu h = __builtin_convertvector(narrow_bf16(value), vu);
    vu pair;
    memcpy(&pair, at, sizeof pair);
    pair = t % 2 ? (pair & 0xffffu) | h << 16 : h;
    memcpy(at, &pair, sizeof pair);
}

// Two chains of products of query and keys, from positions e .. e + 3 of the head.
inline void add_scores(const float* q, const float* block, int64_t e, int part, vf& first, vf& second) {
    block += e * KEYS + part * W;
    first = fma(splat(q[e]), load(block), first);
    second = fma(splat(q[e + 1]), load(block + KEYS), second);
    first = fma(splat(q[e + 2]), load(block + 2 * KEYS), first);
    second = fma(splat(q[e + 3]), load(block + 3 * KEYS), second);
}

inline vu load_pairs(const bf16* p) {
    vu pairs;
    memcpy(&pairs, p, sizeof pairs);
    return pairs;
}

#if defined(__AVX512BF16__)
inline vf dot(vf sum, const bf16* pair, vu pairs) {
    int32_t factor;
    memcpy(&factor, pair, sizeof factor);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(factor), (__m512bh)pairs);
}

inline void add_scores(const bf16* q, const bf16* block, int64_t e, int, vf& first, vf& second) {
    first = dot(first, q + e, load_pairs(block + e * KEYS));
    second = dot(second, q + e + 2, load_pairs(block + (e + 2) * KEYS));
}
#else
inline void add_scores(const float* q, const bf16* block, int64_t e, int part, vf& first, vf& second) {
    for (int64_t k = e; k < e + 4; k += 2) {
        const vu pairs = load_pairs(block + k * KEYS + 2 * part * W);
        first = fma(splat(q[k]), bits<vf>(pairs << 16), first);
        second = fma(splat(q[k + 1]), bits<vf>(pairs & 0xffff0000u), second);
    }
}
#endif

// Two chains of products of probabilities and values, keys t .. t + 3, the last n - t of them where there are fewer.
inline void add_four(const float* p, const float* values, int64_t Ep, int64_t e, int64_t t, vf& first, vf& second) {
    values += t * Ep + e;
    first = fma(splat(p[t]), load(values), first);
    second = fma(splat(p[t + 1]), load(values + Ep), second);
    first = fma(splat(p[t + 2]), load(values + 2 * Ep), first);
    second = fma(splat(p[t + 3]), load(values + 3 * Ep), second);
}

inline void add_one(const float* p, const float* values, int64_t Ep, int64_t e, int64_t t, vf& sum) {
    sum = fma(splat(p[t]), load(values + t * Ep + e), sum);
}

inline void add_one(const float* p, const bf16* values, int64_t Ep, int64_t e, int64_t t, vf& sum) {
    const vu pairs = load_pairs(values + (t & ~int64_t(1)) * Ep + 2 * e);
    sum = fma(splat(p[t]), bits<vf>(t % 2 ? pairs & 0xffff0000u : pairs << 16), sum);
}

#if defined(__AVX512BF16__)
inline void add_four(const bf16* p, const bf16* values, int64_t Ep, int64_t e, int64_t t, vf& first, vf& second) {
    values += t * Ep + 2 * e;
    first = dot(first, p + t, load_pairs(values));
    second = dot(second, p + t + 2, load_pairs(values + 2 * Ep));
}

inline void add_one(const bf16* p, const bf16* values, int64_t Ep, int64_t e, int64_t t, vf& sum) {
    const vf probability = bits<vf>(vu{} + (uint32_t(p[t].bits) << 16));
    const vu pairs = load_pairs(values + (t & ~int64_t(1)) * Ep + 2 * e);
    sum = fma(probability, bits<vf>(t % 2 ? pairs & 0xffff0000u : pairs << 16), sum);
}
#else
inline void add_four(const float* p, const bf16* values, int64_t Ep, int64_t e, int64_t t, vf& first, vf& second) {
    for (int64_t k = t; k < t + 4; k += 2) {
        const vu pairs = load_pairs(values + k * Ep + 2 * e);
        first = fma(splat(p[k]), bits<vf>(pairs << 16), first);
        second = fma(splat(p[k + 1]), bits<vf>(pairs & 0xffff0000u), second);
    }
}
#endif

// ---- scores, softmax, values -------------------------------------------------------------------------------------------

template <int N, class Query, class Cache>
inline void score_blocks(const Query* q, const Cache* keys, int64_t Ep, float* scores) {
    vf sum[N][PARTS][2] = {};
    for (int64_t e = 0; e < Ep; e += 4)
#pragma GCC unroll 8
        for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; ++part)
                add_scores(q, keys + b * Ep * KEYS, e, part, sum[b][part][0], sum[b][part][1]);
#pragma GCC unroll 8
    for (int b = 0; b < N; ++b)
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; ++part)
            store(scores + b * KEYS + part * W, sum[b][part][0] + sum[b][part][1]);
}

template <class Query, class Cache>
inline void score_blocks(int64_t n, const Query* q, const Cache* keys, int64_t Ep, float* scores) {
    switch (n) {
#if defined(__AVX512F__)
        case 4: return score_blocks<4>(q, keys, Ep, scores);
        case 3: return score_blocks<3>(q, keys, Ep, scores);
#endif
#if defined(__AVX2__)
        case 2: return score_blocks<2>(q, keys, Ep, scores);
#endif
        default: return score_blocks<1>(q, keys, Ep, scores);
    }
}

// scores[0 .. n) -> exp(score - max), zeros up to a whole block; returns the sum. Query bf16: the probabilities are left as
// bf16 at the start of the row, and the sum is that of the rounded ones.
template <class Query>
inline float soft_max(float* scores, int64_t n) {
    const int64_t end = round_up(n, KEYS);
    for (int64_t t = n; t < end; ++t) scores[t] = -INFINITY;
    vf most = splat(-INFINITY);
    for (int64_t t = 0; t < end; t += W) most = max(most, load(scores + t));
    const vf largest = splat(max_lane(most));
    vf total = zero();
    Query* p = reinterpret_cast<Query*>(scores);  // behind or at what is read
    for (int64_t t = 0; t < end; t += W) {
        const vf probability = exp(load(scores + t) - largest);
        store(p + t, probability);
        total += load(p + t);
    }
    return sum(total);
}

// sums (2 chains, Ep each) += p[t] values[t] for begin <= t < end, begin a multiple of 4; V vectors of the head from e on.
template <int V, class Query, class Cache>
inline void add_values(const Query* p, const Cache* values, int64_t Ep, int64_t e, int64_t begin, int64_t end,
                       float* sums) {
    vf sum[2][V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[0][v] = load(sums + e + v * W), sum[1][v] = load(sums + Ep + e + v * W);
    int64_t t = begin;
    for (; t + 4 <= end; t += 4)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_four(p, values, Ep, e + v * W, t, sum[0][v], sum[1][v]);
    for (; t < end; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_one(p, values, Ep, e + v * W, t, sum[t & 1][v]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(sums + e + v * W, sum[0][v]), store(sums + Ep + e + v * W, sum[1][v]);
}

template <class Query, class Cache>
inline void add_values(const Query* p, const Cache* values, int64_t Ep, int64_t begin, int64_t end, float* sums) {
    int64_t e = 0;
    for (; e + 4 * W <= Ep; e += 4 * W) add_values<4>(p, values, Ep, e, begin, end, sums);
    if (e + 2 * W <= Ep) add_values<2>(p, values, Ep, e, begin, end, sums), e += 2 * W;
    if (e < Ep) add_values<1>(p, values, Ep, e, begin, end, sums);
}

inline Bytes attention_scratch(int64_t queries, int64_t Ep, int64_t Tp) {
    return Bytes{queries, false} * (Tp + 2 * Ep) + Bytes{round_up(queries, 16), false};
}

// q: `queries` rows of Ep, already scaled, `q_stride` apart; the first stands at `position` and sees the keys
// 0 .. position. out: E operands a query, `out_stride` apart. scratch: attention_scratch() floats, 64-byte aligned.
template <class Query, class Cache, class Operand>
inline void attend(const Query* q, int64_t q_stride, int64_t queries, int64_t position, const Cache* keys,
                   const Cache* values, int64_t E, int64_t Ep, int64_t Tp, float* scratch, Operand* out,
                   int64_t out_stride) {
    float* sums = scratch + queries * Tp;
    float* totals = sums + queries * 2 * Ep;
    const int64_t blocks = (position + queries + KEYS - 1) / KEYS;
    for (int64_t b = 0; b < blocks; b += BLOCKS) {
        const int64_t n = blocks - b < BLOCKS ? blocks - b : BLOCKS;
        for (int64_t w = 0; w < queries; ++w)
            score_blocks(n, q + w * q_stride, keys + b * Ep * KEYS, Ep, scratch + w * Tp + b * KEYS);
    }
    for (int64_t w = 0; w < queries; ++w) {
        totals[w] = soft_max<Query>(scratch + w * Tp, position + w + 1);
        for (int64_t e = 0; e < 2 * Ep; e += W) store(sums + w * 2 * Ep + e, zero());
    }
    for (int64_t begin = 0; begin < position + queries; begin += VALUES)
        for (int64_t w = 0; w < queries; ++w) {
            const int64_t last = position + w + 1, end = begin + VALUES < last ? begin + VALUES : last;
            const Query* p = reinterpret_cast<const Query*>(scratch + w * Tp);
            if (begin < end) add_values(p, values, Ep, begin, end, sums + w * 2 * Ep);
        }
    for (int64_t w = 0; w < queries; ++w) {
        const float *even = sums + w * 2 * Ep, *odd = even + Ep;
        const vf factor = splat(1.0f / totals[w]);
        store_row(out + w * out_stride, E, [=](int64_t k, int) { return (load(even + k) + load(odd + k)) * factor; });
    }
}

}  // namespace
}  // namespace tf::TF_ISA
