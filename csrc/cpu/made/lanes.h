// Vectors of floats (vf) and of doubles (vd, half as many lanes) behind the same names, and the functions of a real
// number that nets and univariate transforms need, for both.
#pragma once
#include "../gelu.h"
#include "../vec.h"

namespace tf::TF_ISA {
namespace {

typedef int64_t vl __attribute__((vector_size(4 * LANES)));  // comparing two vd also gives this

template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
    typedef vf Vector;
    typedef vi Whole;
    typedef int32_t Bits;
    static constexpr int COUNT = LANES, EXPM1_TERMS = 8, LOG_TERMS = 5, FRACTION = 23;
    static constexpr double SMALLEST = 0x1p-126;  // normal
};
template <>
struct LanesOf<double> {
    typedef vd Vector;
    typedef vl Whole;
    typedef int64_t Bits;
    static constexpr int COUNT = LANES / 2, EXPM1_TERMS = 14, LOG_TERMS = 12, FRACTION = 52;
    static constexpr double SMALLEST = 0x1p-1022;
};

template <class V>
struct ElementOf;
template <>
struct ElementOf<vf> {
    typedef float Type;
};
template <>
struct ElementOf<vd> {
    typedef double Type;
};
template <class V>
using Element = typename ElementOf<V>::Type;

inline vd splat(double x) {
#if defined(__AVX512F__)
    return (vd)_mm512_set1_pd(x);
#elif defined(__AVX2__)
    return (vd)_mm256_set1_pd(x);
#else
    vd v;
    for (int k = 0; k < LANES / 2; ++k) v[k] = x;
    return v;
#endif
}

// x in every lane, rounded to the type of a lane.
template <class V>
inline V all(double x) {
    return splat(Element<V>(x));
}

inline vd load(const double* p) {
    vd v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store(double* p, vd v) { memcpy(p, &v, sizeof v); }

inline vd fma(vd a, vd b, vd c) {
#if defined(__AVX512F__)
    return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    return (vd)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

inline vd sqrt(vd a) {
#if defined(__AVX512F__)
    return (vd)_mm512_sqrt_pd((__m512d)a);
#elif defined(__AVX2__)
    return (vd)_mm256_sqrt_pd((__m256d)a);
#else
    for (int k = 0; k < LANES / 2; ++k) a[k] = ::sqrt(a[k]);
    return a;
#endif
}

template <class V>
inline V absolute(V x) {
    return x < V{} ? -x : x;
}

// e^x of doubles. The polynomial is the series to x^13, whose rest is 4e-18 on |r| <= ln 2 / 2.
inline vd exp(vd x) {
    const vd bounded = x > splat(710.0) ? splat(710.0) : (x < splat(-746.0) ? splat(-746.0) : x);
    const double round_to_int = 0x1.8p52;  // doubles this large are whole numbers
    const vd shifted = bounded * 0x1.71547652b82fep0 + round_to_int;
    const vd n = shifted - round_to_int;
    const vd head = bounded - n * 0x1.62e42fee00000p-1;  // exact: n has 11 bits, its factor has 32
    const vd tail = n * 0x1.a39ef35793c76p-33;
    const vd r = head - tail;
    const vd r_error = (head - r) - tail;
    double factor = 1.0 / 6227020800.0;  // 1 / 13!
    vd q = splat(factor);
    for (int k = 13; k > 2; --k) q = fma(q, r, splat(factor *= k));
    const vd high = 1.0 + r;
    const vd low = (r - (high - 1.0)) + fma(q * r, r, r_error);
    const vd y = high + low;
    const vl whole = bits<vl>(shifted) - bits<int64_t>(round_to_int);
    const vl first_half = whole >> 1;
    const vl second_half = whole - first_half;
    return y * bits<vd>((first_half + 1023) << 52) * bits<vd>((second_half + 1023) << 52);
}

// e^x - 1. Near 0 it is the series of x, elsewhere nothing cancels.
template <class V>
inline V expm1(V x) {
    constexpr int TERMS = LanesOf<Element<V>>::EXPM1_TERMS;
    double factor = 1;
    for (int k = 2; k <= TERMS; ++k) factor /= k;
    V q = all<V>(factor);
    for (int k = TERMS; k > 2; --k) q = fma(q, x, all<V>(factor *= k));
    const V near = fma(q * x, x, x);
    return absolute(x) < all<V>(0.35) ? near : exp(x) - all<V>(1);
}

// ln x: of 0 it is -infinity, below 0 NaN. x = 2^e (1 + f) with 1 + f in [sqrt 1/2, sqrt 2), and with s = f / (2 + f)
// ln (1 + f) = f - (f^2/2 - s (f^2/2 + R)), R = 2 s^2 (1/3 + s^2/5 + ...).
template <class V>
inline V log(V x) {
    typedef LanesOf<Element<V>> Kind;
    typedef typename Kind::Whole Whole;
    typedef Element<V> T;
    const auto denormal = x < all<V>(Kind::SMALLEST);
    const V scaled = denormal ? x * all<V>(0x1p60) : x;
    const T half_root = T(0.70710678118654752);
    const Whole shifted = bits<Whole>(scaled) - bits<typename Kind::Bits>(half_root);
    const Whole e = shifted >> Kind::FRACTION;
    const V f = bits<V>(bits<Whole>(scaled) - (e << Kind::FRACTION)) - all<V>(1);
    const V s = f / (f + all<V>(2));
    const V z = s * s;
    V r = all<V>(2.0 / (2 * Kind::LOG_TERMS + 1));
    for (int k = Kind::LOG_TERMS - 1; k >= 1; --k) r = fma(r, z, all<V>(2.0 / (2 * k + 1)));
    r *= z;
    const V half_square = all<V>(0.5) * f * f;
    const V exponent = __builtin_convertvector(e, V) - (denormal ? all<V>(60) : V{});
    // The first part of ln 2 has trailing zeros, so that its product with the exponent is exact.
    constexpr bool SINGLE = sizeof(T) == 4;
    const V high = exponent * all<V>(SINGLE ? 0x1.62e4p-1 : 0x1.62e42fee00000p-1);
    const V low = exponent * all<V>(SINGLE ? 0x1.7f7d1cp-20 : 0x1.a39ef35793c76p-33);
    const V y = high + ((f - (half_square - s * (half_square + r))) + low);
    const V special = x == V{} ? all<V>(-INFINITY) : (x < V{} ? all<V>(NAN) : x);  // infinity and NaN are their own
    return x > V{} && x < all<V>(INFINITY) ? y : special;
}

// ln (1 + t) for 0 <= t <= 1.
template <class V>
inline V log1p(V t) {
    const V y = t + all<V>(1);
    return log(y) + (t - (y - all<V>(1))) / y;
}

template <class V>
inline V sigmoid(V x) {
    return all<V>(1) / (all<V>(1) + exp(-x));
}

// ln (1 + e^x), and x above 20, as PyTorch has it.
template <class V>
inline V softplus(V x) {
    const V above = x < V{} ? V{} : x;  // keeps NaN
    return x > all<V>(20) ? x : above + log1p(exp(-absolute(x)));
}

template <class V>
inline V tanh(V x) {
    const V size = absolute(x);
    const V e = expm1(all<V>(2) * (size > all<V>(20) ? all<V>(20) : size));
    const V t = e / (e + all<V>(2));
    return x < V{} ? -t : t;
}

inline vd gelu(vd x) {
    for (int k = 0; k < LANES / 2; ++k) x[k] = 0.5 * x[k] * ::erfc(-x[k] * 0.70710678118654752);
    return x;
}

}  // namespace
}  // namespace tf::TF_ISA
