// The attention of one (row, head): a window of queries against its cache and, causally, against each other.
//
// Keys lie in blocks of 16. Of each key 16 bytes lie together (4 numbers in fp32, 8 in bf16): [T/16][Ep/4][16][4], in
// bf16 [T/16][Ep/8][16][8]. So appending a key writes 16 bytes at a time, and the scores read straight ahead. A vector
// holds pieces of LANES / 4 keys. The order of the 16 keys within a block (slot_of) is the one in which sum_fours gives
// the scores in the order of the keys. Values are rows, [T][Ep], and in bf16 pairs of rows, [T/2][Ep][2].
//
// Where the machine multiplies pairs of bf16, queries and probabilities are rounded to bf16 as well. Elsewhere they
// stay fp32. A score is the sum of 8 chains over the head, and an output is the sum of two chains over the keys. No
// order of summation depends on the number of queries, the row or the thread, so a query has the same bits alone and in
// a window. Keys after a query's own count for nothing, whatever they hold, NaN included.
#pragma once
#include "operand.h"

namespace tf::TF_ISA {
namespace {

constexpr int64_t VALUES = 64;  // this many values at a time are read once for all queries of a window

// ---- what a cache of fp32 or bf16 does differently ----------------------------------------------------------------

// The type in which the scores take a query.
template <class Cache>
struct QueryOf {
    typedef float Type;
};
#if defined(__AVX512BF16__)
template <>
struct QueryOf<bf16> {
    typedef operand_bf16 Type;
};
#endif

// How many numbers of a key lie together.
template <class Cache>
constexpr int64_t PIECE = 16 / sizeof(Cache);

inline int64_t slot_of(int64_t t) { return (t & (KEYS - LANES)) + t % 4 * (LANES / 4) + t % LANES / 4; }

// Where numbers e .. e + PIECE of key t lie.
template <class Cache>
inline Cache* piece(Cache* keys, int64_t Ep, int64_t e, int64_t t) {
    return keys + t / KEYS * (KEYS * Ep) + e * KEYS + slot_of(t) * PIECE<Cache>;
}

// Stores numbers e .. e + 16 of key t.
inline void store_key(float* keys, int64_t Ep, int64_t e, int64_t t, const float* key) {
    for (int64_t k = 0; k < 16; k += 4) memcpy(piece(keys, Ep, e + k, t), key + k, 16);
}

inline void store_key(bf16* keys, int64_t Ep, int64_t e, int64_t t, const float* key) {
    vh narrow[16 / LANES];
    for (int k = 0; k < 16 / LANES; ++k) narrow[k] = narrow_operand(load(key + k * LANES));
    memcpy(piece(keys, Ep, e, t), narrow, 16);
    memcpy(piece(keys, Ep, e + 8, t), reinterpret_cast<const char*>(narrow) + 16, 16);
}

// Stores 16 numbers of a query at q, multiplied by the factor.
template <class Cache>
inline void store_query(typename QueryOf<Cache>::Type* q, const float* query, float factor) {
    for (int k = 0; k < 16; k += LANES) store(q + k, load(query + k) * factor);
}

#if !defined(__AVX512BF16__)
template <>  // of each 8 numbers first the even ones, then the odd ones, as add_piece takes them
inline void store_query<bf16>(float* q, const float* query, float factor) {
    for (int k = 0; k < 16; ++k) q[k / 8 * 8 + k % 2 * 4 + k % 8 / 2] = query[k] * factor;
}
#endif

inline void store_value(float* values, int64_t Ep, int64_t e, int64_t t, vf value) {
    store(values + t * Ep + e, value);
}

inline void store_value(bf16* values, int64_t Ep, int64_t e, int64_t t, vf value) {
    bf16* at = values + (t & ~int64_t(1)) * Ep + 2 * e;
    vu pair = __builtin_convertvector(narrow_operand(value), vu);
    if (t % 2) {  // a new pair is not read, which would wait for the cache
        vu even;
        memcpy(&even, at, sizeof even);
        pair = (even & 0xffffu) | pair << 16;
    }
    memcpy(at, &pair, sizeof pair);
}

// sum += the products of a piece of LANES / 4 keys and the same piece of the query.
inline vf add_piece(vf sum, const float* q, const float* keys) { return fma(load_again(q), load(keys), sum); }

inline vu load_pairs(const bf16* p) {
    vu pairs;
    memcpy(&pairs, p, sizeof pairs);
    return pairs;
}

#if defined(__AVX512BF16__)
inline vf dot(vf sum, const operand_bf16* pair, vu pairs) {
    int32_t factor;
    memcpy(&factor, pair, sizeof factor);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(factor), (__m512bh)pairs);
}

inline vf add_piece(vf sum, const operand_bf16* q, const bf16* keys) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load_again(q), (__m512bh)load_pairs(keys));
}
#else
inline vf add_piece(vf sum, const float* q, const bf16* keys) {
    const vu pairs = load_pairs(keys);
    return fma(load_again(q + 4), bits<vf>(pairs & 0xffff0000u), fma(load_again(q), bits<vf>(pairs << 16), sum));
}
#endif

// Adds the products of probabilities and values of keys t .. t + 3 to two chains.
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
inline void add_four(const operand_bf16* p, const bf16* values, int64_t Ep, int64_t e, int64_t t, vf& first,
                     vf& second) {
    values += t * Ep + 2 * e;
    first = dot(first, p + t, load_pairs(values));
    second = dot(second, p + t + 2, load_pairs(values + 2 * Ep));
}

inline void add_one(const operand_bf16* p, const bf16* values, int64_t Ep, int64_t e, int64_t t, vf& sum) {
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

// ---- scores, softmax, values --------------------------------------------------------------------------------------

// The scores of a block of 16 keys.
template <class Query, class Cache>
inline void score_block(const Query* q, const Cache* keys, int64_t Ep, float* scores) {
    for (int64_t part = 0; part < KEYS; part += LANES) {
        vf even[4] = {}, odd[4] = {};
        for (int64_t e = 0; e < Ep; e += 2 * PIECE<Cache>) {
            const Cache *first = keys + e * KEYS + part * PIECE<Cache>, *second = first + PIECE<Cache> * KEYS;
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) even[v] = add_piece(even[v], q + e, first + v * (LANES / 4) * PIECE<Cache>);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v)
                odd[v] = add_piece(odd[v], q + e + PIECE<Cache>, second + v * (LANES / 4) * PIECE<Cache>);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) even[v] += odd[v];
        store(scores + part, sum_fours(even));
    }
}

// Replaces scores[0 .. n) by exp(score - max) and sets the rest of the last block to 0. Returns the sum. When Query is
// bf16 the probabilities are left as bf16 at the start of the row, and the sum is that of the rounded ones.
template <class Query>
inline float soft_max(float* scores, int64_t n) {
    const int64_t end = round_up(n, KEYS);
    const vf none = splat(-INFINITY);
    for (int64_t t = n / LANES * LANES; t < end; t += LANES)
        store(scores + t, n > t ? first_of(load(scores + t), int(n - t), none) : none);
    vf most = none;
    for (int64_t t = 0; t < end; t += LANES) most = max(most, load(scores + t));
    const vf largest = splat(max_lane(most));
    vf total = zero();
    Query* p = reinterpret_cast<Query*>(scores);  // it writes at or behind what it reads, never ahead
    for (int64_t t = 0; t < end; t += LANES) {
        const vf probability = exp(load(scores + t) - largest);
        store(p + t, probability);
        total += load(p + t);
    }
    return sum(total);
}

// Adds p[t] values[t] for begin <= t < end to `sums`, for V vectors of the head from e on. `sums` holds two chains of
// Ep numbers each, which start at 0 when begin is 0. begin is a multiple of 4.
template <int V, class Query, class Cache>
inline void add_values(const Query* p, const Cache* values, int64_t Ep, int64_t e, int64_t begin, int64_t end,
                       float* sums) {
    vf sum[2][V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
        sum[0][v] = begin ? load(sums + e + v * LANES) : zero();
        sum[1][v] = begin ? load(sums + Ep + e + v * LANES) : zero();
    }
    int64_t t = begin;
    for (; t + 4 <= end; t += 4)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_four(p, values, Ep, e + v * LANES, t, sum[0][v], sum[1][v]);
    for (; t < end; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_one(p, values, Ep, e + v * LANES, t, sum[t & 1][v]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(sums + e + v * LANES, sum[0][v]), store(sums + Ep + e + v * LANES, sum[1][v]);
}

template <class Query, class Cache>
inline void add_values(const Query* p, const Cache* values, int64_t Ep, int64_t begin, int64_t end, float* sums) {
    int64_t e = 0;
    for (; e + 4 * LANES <= Ep; e += 4 * LANES) add_values<4>(p, values, Ep, e, begin, end, sums);
    if (e + 2 * LANES <= Ep) add_values<2>(p, values, Ep, e, begin, end, sums), e += 2 * LANES;
    if (e < Ep) add_values<1>(p, values, Ep, e, begin, end, sums);
}

inline Bytes attention_scratch(int64_t queries, int64_t Ep, int64_t Tp) {
    return Bytes{queries, false} * (Tp + 2 * Ep) + Bytes{round_up(queries, 16), false};
}

// The queries of one (row, head), and where their answers go.
template <class Query, class Cache, class Operand>
struct Attention {
    int64_t E, Ep, Tp;  // as in Shape
    int64_t queries;    // how many; the first stands at `position` and sees the keys 0 .. position
    int64_t position;
    const Query* q;  // rows of Ep numbers, already scaled, `q_stride` apart
    int64_t q_stride;
    const Cache *keys, *values;
    Operand* out;  // E operands for each query, `out_stride` apart
    int64_t out_stride;
    float* scratch;  // attention_scratch() floats, 64-byte aligned
};

template <class Query, class Cache, class Operand>
inline void attend(const Attention<Query, Cache, Operand>& job) {
    const int64_t queries = job.queries, position = job.position, E = job.E, Ep = job.Ep, Tp = job.Tp;
    float* scratch = job.scratch;
    float* sums = scratch + queries * Tp;
    float* totals = sums + queries * 2 * Ep;
    const int64_t blocks = (position + queries + KEYS - 1) / KEYS;
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t w = 0; w < queries; ++w)
            score_block(job.q + w * job.q_stride, job.keys + b * Ep * KEYS, Ep, scratch + w * Tp + b * KEYS);
    for (int64_t w = 0; w < queries; ++w) totals[w] = soft_max<Query>(scratch + w * Tp, position + w + 1);
    for (int64_t begin = 0; begin < position + queries; begin += VALUES)
        for (int64_t w = 0; w < queries; ++w) {
            const int64_t last = position + w + 1, end = begin + VALUES < last ? begin + VALUES : last;
            const Query* p = reinterpret_cast<const Query*>(scratch + w * Tp);
            if (begin < end) add_values(p, job.values, Ep, begin, end, sums + w * 2 * Ep);
        }
    for (int64_t w = 0; w < queries; ++w) {
        const float *even = sums + w * 2 * Ep, *odd = even + Ep;
        const vf factor = splat(1.0f / totals[w]);
        store_row(job.out + w * job.out_stride, E,
                  [=](int64_t k, int) { return (load(even + k) + load(odd + k)) * factor; });
    }
}

}  // namespace
}  // namespace tf::TF_ISA
