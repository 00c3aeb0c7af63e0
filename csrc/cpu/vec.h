// The SIMD layer: vectors of LANES floats, of the instruction set for which this file is compiled. Arithmetic is the
// compiler's vector extension: + - * / and comparisons work on vf and vi. Below is only what the extension lacks.
// Everything has internal linkage. A function that two instruction sets shared would be one weak symbol, and the linker
// might keep the AVX-512 copy of it.
#pragma once
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "16-bit numbers are packed in pairs, first half low: little-endian machines only"
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifdef __FAST_MATH__
#error "tarflow_fast promises NaN, infinities and reproducible bits: it cannot be built with -ffast-math"
#endif

namespace tf::TF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));  // comparing two vf also gives this, with 0 or -1 in a lane
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));  // LANES 16-bit numbers, as stored
typedef float half_vf __attribute__((vector_size(2 * LANES)));
typedef double vd __attribute__((vector_size(4 * LANES)));  // LANES / 2 doubles

// Storage types. They are only loaded and stored; nothing is computed in them.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// x in every lane. It is not written vf{} + x: the compiler may not drop the addition 0 + x (because of -0), and it
// would cost every factor of a product an instruction.
inline vf splat(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vf)_mm256_set1_ps(x);
#elif defined(__SSE__)
    return (vf)_mm_set1_ps(x);
#else
    vf v;
    for (int k = 0; k < LANES; ++k) v[k] = x;
    return v;
#endif
}
inline vf zero() { return vf{}; }

// From here on v is in a register. Without this the compiler may read v again from memory at every use, which it likes
// to do with the operand of several products. Those loads would then be the limit: tiles of 4 rows in fp32 with AVX-512
// reached 175 GFLOP/s on a core of a Zen 5. With this they reach 215.
template <class Vector>
inline void hold(Vector& v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__SSE__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
}

template <class To, class From>
inline To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "bits reinterprets");
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vu select(vi mask, vu yes, vu no) { return mask ? yes : no; }

// a * b + c, rounded once wherever the machine can do that.
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The larger of the two, and b where either is NaN. So a maximum may lose a NaN. In a softmax the sum of the
// exponentials still shows it.
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

inline vf sqrt(vf a) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE__)
    return (vf)_mm_sqrt_ps((__m128)a);
#else
    for (int k = 0; k < LANES; ++k) a[k] = sqrtf(a[k]);
    return a;
#endif
}

// ---- reductions: always the same tree, halves added to halves -------------------------------------------------------

inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__SSE2__)
#if defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    const __m128 four = (__m128)v;
#endif
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float lane[LANES];
    memcpy(lane, &v, sizeof lane);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
    return lane[0];
#endif
}

inline double sum(vd v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_pd((__m512d)v);
#else
    double lane[LANES / 2];
    memcpy(lane, &v, sizeof lane);
    for (int width = LANES / 4; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
    return lane[0];
#endif
}

// Lane 4 j + v of the result is the sum of lanes 4 j .. 4 j + 3 of a[v].
inline vf sum_fours(const vf (&a)[4]) {
#if defined(__AVX512F__)
    const __m512 a0 = (__m512)a[0], a1 = (__m512)a[1], a2 = (__m512)a[2], a3 = (__m512)a[3];
    const __m512d low = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1));
    const __m512d high = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));
    return (vf)_mm512_unpacklo_pd(low, high) + (vf)_mm512_unpackhi_pd(low, high);
#elif defined(__AVX2__)
    const __m256 a0 = (__m256)a[0], a1 = (__m256)a[1], a2 = (__m256)a[2], a3 = (__m256)a[3];
    const __m256d low = (__m256d)_mm256_add_ps(_mm256_unpacklo_ps(a0, a1), _mm256_unpackhi_ps(a0, a1));
    const __m256d high = (__m256d)_mm256_add_ps(_mm256_unpacklo_ps(a2, a3), _mm256_unpackhi_ps(a2, a3));
    return (vf)_mm256_unpacklo_pd(low, high) + (vf)_mm256_unpackhi_pd(low, high);
#else
    vf out;
    for (int v = 0; v < 4; ++v) out[v] = (a[v][0] + a[v][2]) + (a[v][1] + a[v][3]);
    return out;
#endif
}

inline float max_lane(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);  // waiting for this maximum is a tenth of the time of a short attention
#else
    float lane[LANES];
    memcpy(lane, &v, sizeof lane);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) lane[k] = lane[k] > lane[k + width] ? lane[k] : lane[k + width];
    return lane[0];
#endif
}

// The floats as doubles, the low lanes first.
inline void widen(vf v, vd& low, vd& high) {
    half_vf half[2];
    memcpy(half, &v, sizeof v);
    low = __builtin_convertvector(half[0], vd);
    high = __builtin_convertvector(half[1], vd);
}

// ---- float load and store ------------------------------------------------------------------------------------------
// The forms with n take the first n < LANES lanes. They touch no memory past these, and read 0 in the other lanes.

inline vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// The 16 bytes at p, repeated over the whole vector.
inline vf load_again(const void* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(p)));
#elif defined(__AVX2__)
    return (vf)_mm256_broadcast_ps(static_cast<const __m128*>(p));
#else
    return load(static_cast<const float*>(p));
#endif
}

#if defined(__AVX512F__)
inline __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }
inline vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
#elif defined(__AVX2__)
inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vf load(const float* p, int n) { return (vf)_mm256_maskload_ps(p, first(n)); }
inline void store(float* p, vf v, int n) { _mm256_maskstore_ps(p, first(n), (__m256)v); }
#else
inline vf load(const float* p, int n) {
    vf v = {};
    for (int k = 0; k < n; ++k) v[k] = p[k];
    return v;
}
inline void store(float* p, vf v, int n) {
    for (int k = 0; k < n; ++k) p[k] = v[k];
}
#endif

// The first n lanes of v, and the other lanes of `rest`.
inline vf first_of(vf v, int n, vf rest) {
#if defined(__AVX512F__)
    return (vf)_mm512_mask_mov_ps((__m512)rest, first(n), (__m512)v);
#else
    vi lane;
    for (int k = 0; k < LANES; ++k) lane[k] = k;
    return select(lane < n, v, rest);
#endif
}

// ---- 16-bit storage ------------------------------------------------------------------------------------------------
// Stores round to the nearest number, ties to even. They keep denormals, and a NaN stays a NaN. They compute on
// integers where the machine's own instruction would flush denormals (bfloat16) or is missing (half precision on the
// plain machine).

inline vf widen_bf16(vh h) { return bits<vf>(__builtin_convertvector(h, vu) << 16); }

inline vh narrow_bf16(vf v) {
    const vu u = bits<vu>(v);
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu quiet_nan = (u >> 16) | 0x40u;
    return __builtin_convertvector(select(v == v, rounded, quiet_nan), vh);
}

inline vf widen_f16(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(bits<__m256i>(h));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(bits<__m128i>(h));
#else
    const vu u = __builtin_convertvector(h, vu);
    const vu sign = (u & 0x8000u) << 16, magnitude = (u & 0x7fffu) << 13, exponent = magnitude & (0x1fu << 23);
    const vu normal = magnitude + ((127u - 15u) << 23);
    const vu special = normal + ((128u - 16u) << 23);  // for infinity and NaN the exponent must be all ones
    const vf denormal = bits<vf>(normal + (1u << 23)) - bits<float>(113u << 23);
    vu result = select((vi)(exponent == (0x1fu << 23)), special, normal);
    result = select((vi)(exponent == 0u), bits<vu>(denormal), result);
    return bits<vf>(result | sign);
#endif
}

inline vh narrow_f16(vf v) {
#if defined(__AVX512F__)
    return bits<vh>(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return bits<vh>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const vu u = bits<vu>(v), sign = u & 0x80000000u, magnitude = u ^ sign;
    // The magic number is a float whose last place is the smallest half. Adding it makes the adder itself round to half
    // denormals.
    const uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
    const vu denormal = bits<vu>(bits<vf>(magnitude) + bits<float>(magic)) - magic;
    const vu normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    vu result = select((vi)(magnitude < (113u << 23)), denormal, normal);
    const vu infinity = vu{} + 0x7c00u, quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    result = select((vi)(magnitude >= (143u << 23)), infinity, result);
    result = select((vi)(magnitude > 0x7f800000u), quiet_nan, result);
    return __builtin_convertvector(result | (sign >> 16), vh);
#endif
}

inline vh load_bits(const void* p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return h;
}

inline vh load_bits(const uint16_t* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return bits<vh>(_mm256_maskz_loadu_epi16(first(n), p));
#else
    vh h = {};
    for (int k = 0; k < n; ++k) h[k] = p[k];
    return h;
#endif
}

inline void store_bits(uint16_t* p, vh h, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, first(n), bits<__m256i>(h));
#else
    for (int k = 0; k < n; ++k) p[k] = h[k];
#endif
}

inline vf load(const bf16* p) { return widen_bf16(load_bits(p)); }
inline vf load(const bf16* p, int n) { return widen_bf16(load_bits(&p->bits, n)); }
inline void store(bf16* p, vf v) {
    const vh h = narrow_bf16(v);
    memcpy(p, &h, sizeof h);
}
inline void store(bf16* p, vf v, int n) { store_bits(&p->bits, narrow_bf16(v), n); }

inline vf load(const f16* p) { return widen_f16(load_bits(p)); }
inline vf load(const f16* p, int n) { return widen_f16(load_bits(&p->bits, n)); }
inline void store(f16* p, vf v) {
    const vh h = narrow_f16(v);
    memcpy(p, &h, sizeof h);
}
inline void store(f16* p, vf v, int n) { store_bits(&p->bits, narrow_f16(v), n); }

// ---- exp -----------------------------------------------------------------------------------------------------------

// e^x. The largest error is 0.71 ulp, and 0.78 ulp where the result is denormal (measured). Past the range the result
// is 0 or infinity, and NaN gives NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 q(r), where q is the minimax polynomial (its error is 0.07
// ulp). The rounding errors of r and of 1 + r are carried along, because they would be most of the error: without FMA
// up to 1.2 ulp.
inline vf exp(vf x) {
    const vf bounded = select(x > splat(89.0f), splat(89.0f), select(x < splat(-104.0f), splat(-104.0f), x));
    const float round_to_int = 0x1.8p23f;  // floats this large are whole numbers
    const vf shifted = bounded * 0x1.715476p0f + round_to_int;
    const vf n = shifted - round_to_int;
    const vf head =
        bounded - n * 0x1.62e4p-1f;  // this is exact: n has 8 bits, its factor has 15, and the difference cancels
    const vf tail = n * 0x1.7f7d1cp-20f;
    const vf r = head - tail;
    const vf r_error = (head - r) - tail;
    vf q = fma(r, splat(0x1.6a2256p-10f), splat(0x1.123b02p-7f));
    q = fma(q, r, splat(0x1.5558f8p-5f));
    q = fma(q, r, splat(0x1.555490p-3f));
    q = fma(q, r, splat(0x1.fffffcp-2f));
    const vf high = 1.0f + r;
    const vf low = (r - (high - 1.0f)) + fma(q * r, r, r_error);
    const vf y = high + low;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    // 2^n is applied in two factors, which are both normal numbers. The first product is exact, so a denormal result is
    // rounded only once more.
    const vi whole = bits<vi>(shifted) - bits<int32_t>(round_to_int);
    const vi first_half = whole >> 1;
    const vi second_half = whole - first_half;
    return y * bits<vf>((first_half + 127) << 23) * bits<vf>((second_half + 127) << 23);
#endif
}

}  // namespace
}  // namespace tf::TF_ISA
