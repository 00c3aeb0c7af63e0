// The inverses of univariate transforms y = f(x; phi), a vector of rows at a time: x, and log |dx / dy|.
// The parameters are raw outputs of a net; each library constrains them in its own form. The form of a transform is its
// kind and a few constants (tarflow_fast/made/engine.py).
#pragma once
#include "../../tarflow.h"
#include "lanes.h"

namespace tf::TF_ISA {
namespace {

constexpr int MOST_BINS = 64;

template <class V>
struct Inverse {
    V x, ladj;
};

// ---- affine: y = scale x + shift -----------------------------------------------------------------------------------

// u / (1 + |u / limit|): zuko keeps logarithms below |limit| so.
template <class V>
inline V soft_clip(V u, double limit) {
    return u / (all<V>(1) + absolute(u * all<V>(1 / limit)));
}

template <class V>
inline Inverse<V> affine_inverse(int kind, const double* constant, V y, V first, V second) {
    if (kind == TF_MADE_AFFINE_ZUKO) {
        const V log_scale = soft_clip(second, constant[0]);
        return {(y - first) / exp(log_scale), -log_scale};
    }
    V scale;
    if (kind == TF_MADE_AFFINE_SOFTPLUS)
        scale = softplus(first) + all<V>(constant[0]);
    else if (kind == TF_MADE_AFFINE_SIGMOID)
        scale = sigmoid(first + all<V>(constant[0])) + all<V>(constant[1]);
    else
        scale = exp(all<V>(constant[0]) + all<V>(constant[1]) * first) + all<V>(constant[2]);
    return {(y - second) / scale, -log(scale)};
}

// ---- monotone rational-quadratic splines (arXiv 1906.04032) ---------------------------------------------------------

// What the libraries' forms of it differ in. Widths and heights are softmaxes of raw parameters, at least min_width and
// min_height, from `low` to `high`; below and above, where there are tails, x = y.
struct Spline {
    int bins;
    double low, high, min_width, min_height, min_derivative;
    double scale;              // of the raw widths and heights
    double limit;              // of zuko's soft clip; 0: none
    double width_in_height;    // how much of the raw width is added to the raw height
    double height_scale;       // of the raw heights
    double derivative_offset;  // added to the raw derivatives, times derivative_scale
    double derivative_scale;
    double edge;    // the raw derivative at both ends, where there are tails
    bool tails;     // then only the inner derivatives are parameters
    bool exponent;  // derivatives are exponentials; else softplus, plus min_derivative
};

inline Spline spline_of(int kind, const double* c) {
    Spline s = {};
    s.bins = int(c[0]);
    s.scale = s.height_scale = s.derivative_scale = 1;
    s.tails = true;
    if (kind == TF_MADE_SPLINE_ZUKO) {  // bins, bound, log of the slope
        s.low = -c[1], s.high = c[1], s.limit = c[2], s.exponent = true;
    } else if (kind == TF_MADE_SPLINE) {  // bins, low, high, the three least values, scale, tails
        s.low = c[1], s.high = c[2], s.min_width = c[3], s.min_height = c[4], s.min_derivative = c[5];
        s.scale = c[6], s.tails = c[7] != 0;
        s.edge = ::log(::exp(1 - c[5]) - 1);
    } else {  // torchflows: bins, bound, the least size and derivative, offset of the derivatives
        s.low = -c[1], s.high = c[1], s.min_width = s.min_height = c[2], s.min_derivative = c[3];
        s.width_in_height = 1, s.height_scale = s.derivative_scale = 1e-3;
        s.derivative_offset = c[4], s.edge = c[4] + c[4] * 1e-3;
    }
    return s;
}

// e[k] = exp(raw[k] - max) of all bins; returns their sum. raw(k) gives the k-th raw number.
template <class V, class Raw>
inline V exponentials(int bins, V* e, Raw raw) {
    V largest = e[0] = raw(0);
    for (int k = 1; k < bins; ++k) {
        e[k] = raw(k);
        largest = e[k] > largest ? e[k] : largest;
    }
    V sum = {}, lost = {};  // Kahan's: an error of the sum moves all knots to the same side
    for (int k = 0; k < bins; ++k) {
        e[k] = exp(e[k] - largest);
        const V more = e[k] - lost, next = sum + more;
        lost = (next - sum) - more;
        sum = next;
    }
    return sum;
}

// A knot as two numbers, whose sum has half as many digits again. Rounded to one, as it is in the libraries, it is off by
// an ulp of the whole interval, and where a spline is steep its inverse multiplies that.
template <class V>
struct Knot {
    V high, low;
};

// Calls f(k, knot k, size of bin k) for all bins. The last one ends at the bound, as in the libraries: what the sizes lack
// of the whole by rounding would be a large part of a narrow bin.
template <class V, class Function>
inline void for_bins(const Spline& s, double least, const V* e, V sum, Function f) {
    const V span = all<V>(s.high - s.low), bottom = all<V>(s.low), minimum = all<V>(least);
    const V rest = all<V>(1 - least * s.bins);
    V total = {}, lost = {};  // Kahan's sum
    for (int k = 0; k < s.bins; ++k) {
        const V size = fma(rest, e[k] / sum, minimum);  // times 1 / sum, all would be off to the same side
        const V above = span * total, knot = above + bottom, back = knot - above;
        const V rounded = (above - (knot - back)) + (bottom - back);
        const V under = rounded + (fma(span, total, -above) - span * lost);
        f(k, Knot<V>{knot, under}, k + 1 < s.bins ? span * size : (all<V>(s.high) - knot) - under);
        const V more = size - lost, next = total + more;
        lost = (next - total) - more;
        total = next;
    }
}

// phi: the raw parameters, `stride` numbers apart.
template <class V>
inline Inverse<V> spline_inverse(const Spline& s, V y, const Element<V>* phi, int64_t stride) {
    const int K = s.bins;
    const auto clipped = [&](V raw, double limit) { return s.limit != 0 ? soft_clip(raw, limit) : raw; };
    const auto width = [&](int k) {
        return clipped(load(phi + k * stride) * all<V>(s.scale), s.limit / 2);
    };
    const auto height = [&](int k) {
        const V own = load(phi + (K + k) * stride) * all<V>(s.scale * s.height_scale);
        return s.width_in_height != 0 ? own + width(k) : clipped(own, s.limit / 2);
    };

    V e[MOST_BINS];
    V sum = exponentials(K, e, height);
    Knot<V> y0 = {}, x0 = {};
    V rise = {}, run = {}, bin = {};
    const auto choose = [](auto here, Knot<V> yes, Knot<V> no) {
        return Knot<V>{here ? yes.high : no.high, here ? yes.low : no.low};
    };
    for_bins(s, s.min_height, e, sum, [&](int k, Knot<V> knot, V size) {
        const auto here = k == 0 ? y == y : y >= knot.high;
        y0 = choose(here, knot, y0), rise = here ? size : rise, bin = here ? all<V>(k) : bin;
    });
    sum = exponentials(K, e, width);
    V d0 = all<V>(s.edge), d1 = all<V>(s.edge);
    const Element<V>* derivatives = phi + 2 * K * stride;
    for_bins(s, s.min_width, e, sum, [&](int k, Knot<V> knot, V size) {
        const auto here = bin == all<V>(k);
        x0 = choose(here, knot, x0), run = here ? size : run;
        const auto raw = [&](int number) {
            return fma(load(derivatives + number * stride), all<V>(s.derivative_scale), all<V>(s.derivative_offset));
        };
        if (!s.tails || k > 0) d0 = here ? raw(s.tails ? k - 1 : k) : d0;
        if (!s.tails || k + 1 < K) d1 = here ? raw(s.tails ? k : k + 1) : d1;
    });
    if (s.exponent) {
        d0 = exp(clipped(d0, s.limit)), d1 = exp(clipped(d1, s.limit));
    } else {
        d0 = softplus(d0) + all<V>(s.min_derivative), d1 = softplus(d1) + all<V>(s.min_derivative);
    }

    // Equations 6 to 8 of the paper, with t = y - y0 of the bin.
    const V slope = rise / run, t = (y - y0.high) - y0.low;
    const V bend = d0 + d1 - all<V>(2) * slope;
    const V a = rise * (slope - d0) + t * bend, b = rise * d0 - t * bend, c = -slope * t;
    V under_root = b * b - all<V>(4) * a * c;
    under_root = under_root < V{} ? V{} : under_root;  // rounding alone makes it negative
    const V z = all<V>(2) * c / (-b - sqrt(under_root));
    const V left = all<V>(1) - z, mixed = z * left;
    const V denominator = slope + bend * mixed;
    const V numerator = slope * slope * (d1 * z * z + all<V>(2) * slope * mixed + d0 * left * left);
    // At a bound with tails torchflows is outside, where the slope is 1. That of the others' splines is 1 there, too.
    const V low = all<V>(s.low), high = all<V>(s.high);
    const auto inside = s.tails ? (y > low) & (y < high) : (y >= low) & (y <= high);
    return {inside ? x0.high + fma(z, run, x0.low) : y, inside ? -log(numerator / (denominator * denominator)) : V{}};
}

}  // namespace
}  // namespace tf::TF_ISA
