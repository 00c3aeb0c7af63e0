// The affine step of a flow block and its gradient. The formulas are in tarflow_fast/ops/affine.py.
//
// One work item is a run of tokens of one row, and D alone decides its length. So a batch of one row still fills the
// threads, and the log-determinant is always the same sums added in the same order, whatever the batch and the threads.
#include <stdlib.h>

#include "parallel.h"
#include "table.h"
#include "vec.h"

namespace tf::TF_ISA {
namespace {

constexpr int64_t ITEM_ELEMENTS = 4096;     // enough work for a thread; 4 kB of partial sums cover a million elements
constexpr int64_t SERIAL_ELEMENTS = 16384;  // for fewer elements waking other threads costs more than they save

struct Problem {
    int64_t B, T, D;
    bool scale, flip;

    int64_t item_tokens() const { return D < ITEM_ELEMENTS ? ITEM_ELEMENTS / D : 1; }
    int64_t row_items() const { return (T + item_tokens() - 1) / item_tokens(); }
    int64_t ab_width() const { return scale ? 2 * D : D; }
    int limit(int threads) const { return B * T * D < SERIAL_ELEMENTS ? 1 : threads; }
    // The first element of token j, in net order, in a (B, T, D) tensor.
    int64_t place(int64_t row, int64_t j) const { return (row * T + (flip ? T - 1 - j : j)) * D; }
};

// Calls f(row, first token, token past the last, number of the item).
template <class Function>
void for_items(const Problem& p, int threads, Function f) {
    const int64_t tokens = p.item_tokens(), row_items = p.row_items();
    parallel_for(p.limit(threads), p.B * row_items, [&](int64_t item) {
        const int64_t row = item / row_items, first = item % row_items * tokens;
        f(row, first, first + tokens < p.T ? first + tokens : p.T, item);
    });
}

// ---- one token of D elements ---------------------------------------------------------------------------------------
// The float versions compute LANES elements at a time. The double versions serve tests of exactness and gradcheck, and
// may be slow.

struct FloatSum {
    vd low = {}, high = {};
    void add(vf v) {
        vd l, h;
        widen(v, l, h);
        low += l;
        high += h;
    }
    double total() const { return sum(low + high); }
};

// z = (x - b) exp(-a). Returns the sum of a. a may be null, and then it is zero.
template <class Input, class Parameter>
double forward_token(const Input* x, const Parameter* a, const Parameter* b, Input* z, int64_t D) {
    FloatSum total;
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        vf y = load(x + d) - load(b + d);
        if (a) {
            const vf scale = load(a + d);
            total.add(scale);
            y *= exp(-scale);
        }
        store(z + d, y);
    }
    if (d < D) {
        const int rest = int(D - d);
        vf y = load(x + d, rest) - load(b + d, rest);
        if (a) {
            const vf scale = load(a + d, rest);
            total.add(scale);
            y *= exp(-scale);
        }
        store(z + d, y, rest);
    }
    return total.total();
}

// The sum is Neumaier's: what rounding takes from it is kept and added at the end. PyTorch adds by pairs. A plain sum of
// 4100 numbers was 4 to 8 times further off than the error rule allows.
double forward_token(const double* x, const double* a, const double* b, double* z, int64_t D) {
    double total = 0, lost = 0;
    for (int64_t d = 0; d < D; ++d) {
        z[d] = (x[d] - b[d]) * (a ? ::exp(-a[d]) : 1.0);
        const double value = a ? a[d] : 0.0, next = total + value;
        if (next - next == 0.0)  // else there is an infinity or a NaN, and nothing to keep
            lost += ::fabs(total) >= ::fabs(value) ? (total - next) + value : (value - next) + total;
        total = next;
    }
    return total + lost;
}

// The gradients of one token: dx = dz exp(-a), db = -dx, da = -dx (x - b) - dlog_det.
template <class Input, class Parameter>
struct TokenGradient {
    double dlog_det;
    const Input *dz, *x;
    const Parameter *a, *b;  // a and da may be null, and then a is zero
    Input* dx;
    Parameter *da, *db;
};

template <class Input, class Parameter>
void backward_token(const TokenGradient<Input, Parameter>& token, int64_t D) {
    const Input *dz = token.dz, *x = token.x;
    const Parameter *a = token.a, *b = token.b;
    Input* dx = token.dx;
    Parameter *da = token.da, *db = token.db;
    const vf dld = splat(float(token.dlog_det));
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        vf g = load(dz + d);
        if (a) {
            g *= exp(-load(a + d));
            store(da + d, -(g * (load(x + d) - load(b + d))) - dld);
        }
        store(dx + d, g);
        store(db + d, -g);
    }
    if (d < D) {
        const int rest = int(D - d);
        vf g = load(dz + d, rest);
        if (a) {
            g *= exp(-load(a + d, rest));
            store(da + d, -(g * (load(x + d, rest) - load(b + d, rest))) - dld, rest);
        }
        store(dx + d, g, rest);
        store(db + d, -g, rest);
    }
}

void backward_token(const TokenGradient<double, double>& token, int64_t D) {
    for (int64_t d = 0; d < D; ++d) {
        const double g = token.dz[d] * (token.a ? ::exp(-token.a[d]) : 1.0);
        if (token.a) token.da[d] = -(g * (token.x[d] - token.b[d])) - token.dlog_det;
        token.dx[d] = g;
        token.db[d] = -g;
    }
}

// ---- whole tensors -------------------------------------------------------------------------------------------------

template <class Input, class Parameter, class LogDet>
int forward(const Input* x, const Parameter* ab, Input* z, LogDet* log_det, const Problem& p, int threads) {
    const int64_t items = p.B * p.row_items();
    double* partial = static_cast<double*>(malloc(size_t(items ? items : 1) * sizeof(double)));
    if (!partial) return TF_NO_MEMORY;
    for_items(p, threads, [&](int64_t row, int64_t first, int64_t last, int64_t item) {
        double total = 0;
        for (int64_t j = first; j < last; ++j) {
            const int64_t at = p.place(row, j);
            if (j == 0) {
                memcpy(z + at, x + at, size_t(p.D) * sizeof(Input));
                continue;
            }
            const Parameter* a = ab + (row * p.T + j - 1) * p.ab_width();
            total += forward_token(x + at, p.scale ? a : nullptr, p.scale ? a + p.D : a, z + at, p.D);
        }
        partial[item] = total;
    });
    for (int64_t row = 0; row < p.B; ++row) {
        double total = 0;
        for (int64_t k = 0; k < p.row_items(); ++k) total += partial[row * p.row_items() + k];
        log_det[row] = LogDet(0.0 - total);  // 0 - 0 is +0
    }
    free(partial);
    return TF_OK;
}

template <class Input, class Parameter, class LogDet>
int backward(const Input* dz, const LogDet* dlog_det, const Input* x, const Parameter* ab, Input* dx, Parameter* dab,
             const Problem& p, int threads) {
    for_items(p, threads, [&](int64_t row, int64_t first, int64_t last, int64_t) {
        for (int64_t j = first; j < last; ++j) {
            const int64_t at = p.place(row, j);
            if (j == 0) {
                memcpy(dx + at, dz + at, size_t(p.D) * sizeof(Input));
                // The ab of the last token conditions nothing.
                memset(static_cast<void*>(dab + (row * p.T + p.T - 1) * p.ab_width()), 0,
                       size_t(p.ab_width()) * sizeof(Parameter));
                continue;
            }
            const int64_t a_at = (row * p.T + j - 1) * p.ab_width(), b_at = a_at + (p.scale ? p.D : 0);
            TokenGradient<Input, Parameter> token = {};
            token.dlog_det = double(dlog_det[row]);
            token.dz = dz + at, token.x = x + at, token.dx = dx + at;
            token.b = ab + b_at, token.db = dab + b_at;
            if (p.scale) token.a = ab + a_at, token.da = dab + a_at;
            backward_token(token, p.D);
        }
    });
    return TF_OK;
}

// Calls f with null pointers of the storage types of x, ab and log_det. f gets types and no data.
template <class Function>
int for_types(int x_dtype, int ab_dtype, Function f) {
    if (x_dtype == TF_F64 && ab_dtype == TF_F64) return f((double*)nullptr, (double*)nullptr, (double*)nullptr);
    if (x_dtype == TF_F32 && ab_dtype == TF_F32) return f((float*)nullptr, (float*)nullptr, (float*)nullptr);
    if (x_dtype == TF_F32 && ab_dtype == TF_BF16) return f((float*)nullptr, (bf16*)nullptr, (float*)nullptr);
    if (x_dtype == TF_F32 && ab_dtype == TF_F16) return f((float*)nullptr, (f16*)nullptr, (float*)nullptr);
    if (x_dtype == TF_BF16 && ab_dtype == TF_BF16) return f((bf16*)nullptr, (bf16*)nullptr, (float*)nullptr);
    if (x_dtype == TF_F16 && ab_dtype == TF_F16) return f((f16*)nullptr, (f16*)nullptr, (float*)nullptr);
    return TF_BAD_DTYPE;
}

}  // namespace

int affine_forward(const void* x, const void* ab, void* z, void* log_det, int64_t B, int64_t T, int64_t D, int scale,
                   int flip, int x_dtype, int ab_dtype, int threads) {
    const Problem p = {B, T, D, scale != 0, flip != 0};
    return for_types(x_dtype, ab_dtype, [&](auto input, auto parameter, auto sum) {
        typedef decltype(input) Input;  // pointers to the storage types
        typedef decltype(parameter) Parameter;
        return forward((Input)x, (Parameter)ab, (Input)z, (decltype(sum))log_det, p, threads);
    });
}

int affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab, void* dx, void* dab, int64_t B,
                    int64_t T, int64_t D, int scale, int flip, int x_dtype, int ab_dtype, int threads) {
    const Problem p = {B, T, D, scale != 0, flip != 0};
    return for_types(x_dtype, ab_dtype, [&](auto input, auto parameter, auto sum) {
        typedef decltype(input) Input;
        typedef decltype(parameter) Parameter;
        return backward((Input)dz, (decltype(sum))dlog_det, (Input)x, (Parameter)ab, (Input)dx, (Parameter)dab, p,
                        threads);
    });
}

}  // namespace tf::TF_ISA
