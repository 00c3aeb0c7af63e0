// The affine step of a flow block and its gradient; formulas in tarflow_fast/ops/affine.py.
//
// One work item is a run of tokens of one row, its length fixed by D alone: a batch of one row still fills the threads,
// and the log-determinant is always the same sums added in the same order, whatever the batch and the threads.
#include <stdlib.h>

#include "parallel.h"
#include "table.h"
#include "vec.h"

namespace tf::TF_ISA {
namespace {

constexpr int64_t ITEM_ELEMENTS = 4096;  // an item is worth a thread, and 4 kB of partial sums cover a million elements
constexpr int64_t SERIAL_ELEMENTS = 16384;  // below, waking other threads costs more than they save

struct Problem {
    int64_t B, T, D;
    bool scale, flip;

    int64_t item_tokens() const { return D < ITEM_ELEMENTS ? ITEM_ELEMENTS / D : 1; }
    int64_t row_items() const { return (T + item_tokens() - 1) / item_tokens(); }
    int64_t ab_width() const { return scale ? 2 * D : D; }
    int limit(int threads) const { return B * T * D < SERIAL_ELEMENTS ? 1 : threads; }
    // Where token j of net order lies in a (B, T, D) tensor.
    int64_t place(int64_t row, int64_t j) const { return (row * T + (flip ? T - 1 - j : j)) * D; }
};

// f(row, first token, past the last token, number of the item)
template <class F>
void for_items(const Problem& p, int threads, F f) {
    const int64_t tokens = p.item_tokens(), row_items = p.row_items();
    parallel_for(p.limit(threads), p.B * row_items, [&](int64_t item) {
        const int64_t row = item / row_items, first = item % row_items * tokens;
        f(row, first, first + tokens < p.T ? first + tokens : p.T, item);
    });
}

// ---- one token: D elements. The float versions compute W lanes at a time, the double versions are there for exactness
// ---- tests and gradcheck and may be slow.

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

// z = (x - b) exp(-a); returns the sum of a. a may be null: then it is zero.
template <class X, class A>
double forward_token(const X* x, const A* a, const A* b, X* z, int64_t D) {
    FloatSum total;
    int64_t d = 0;
    for (; d + W <= D; d += W) {
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

double forward_token(const double* x, const double* a, const double* b, double* z, int64_t D) {
    double total = 0;
    for (int64_t d = 0; d < D; ++d) {
        z[d] = (x[d] - b[d]) * (a ? ::exp(-a[d]) : 1.0);
        total += a ? a[d] : 0.0;
    }
    return total;
}

// The gradients of one token: dx = dz exp(-a), db = -dx, da = -dx (x - b) - dlog_det.
template <class X, class A>
void backward_token(const X* dz, double dlog_det, const X* x, const A* a, const A* b, X* dx, A* da, A* db, int64_t D) {
    const vf dld = splat(float(dlog_det));
    int64_t d = 0;
    for (; d + W <= D; d += W) {
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

void backward_token(const double* dz, double dlog_det, const double* x, const double* a, const double* b, double* dx,
                    double* da, double* db, int64_t D) {
    for (int64_t d = 0; d < D; ++d) {
        const double g = dz[d] * (a ? ::exp(-a[d]) : 1.0);
        if (a) da[d] = -(g * (x[d] - b[d])) - dlog_det;
        dx[d] = g;
        db[d] = -g;
    }
}

// ---- whole tensors -------------------------------------------------------------------------------------------------

template <class X, class A, class L>
int forward(const X* x, const A* ab, X* z, L* log_det, const Problem& p, int threads) {
    const int64_t items = p.B * p.row_items();
    double* partial = static_cast<double*>(malloc(size_t(items ? items : 1) * sizeof(double)));
    if (!partial) return TF_NO_MEMORY;
    for_items(p, threads, [&](int64_t row, int64_t first, int64_t last, int64_t item) {
        double total = 0;
        for (int64_t j = first; j < last; ++j) {
            const int64_t at = p.place(row, j);
            if (j == 0) {
                memcpy(z + at, x + at, size_t(p.D) * sizeof(X));
                continue;
            }
            const A* a = ab + (row * p.T + j - 1) * p.ab_width();
            total += forward_token(x + at, p.scale ? a : nullptr, p.scale ? a + p.D : a, z + at, p.D);
        }
        partial[item] = total;
    });
    for (int64_t row = 0; row < p.B; ++row) {
        double total = 0;
        for (int64_t k = 0; k < p.row_items(); ++k) total += partial[row * p.row_items() + k];
        log_det[row] = L(0.0 - total);  // 0 - 0 is +0
    }
    free(partial);
    return TF_OK;
}

template <class X, class A, class L>
int backward(const X* dz, const L* dlog_det, const X* x, const A* ab, X* dx, A* dab, const Problem& p, int threads) {
    for_items(p, threads, [&](int64_t row, int64_t first, int64_t last, int64_t) {
        for (int64_t j = first; j < last; ++j) {
            const int64_t at = p.place(row, j);
            if (j == 0) {
                memcpy(dx + at, dz + at, size_t(p.D) * sizeof(X));
                // The ab of the last token conditions nothing.
                memset(static_cast<void*>(dab + (row * p.T + p.T - 1) * p.ab_width()), 0,
                       size_t(p.ab_width()) * sizeof(A));
                continue;
            }
            const int64_t from = (row * p.T + j - 1) * p.ab_width();
            const A *a = p.scale ? ab + from : nullptr, *b = ab + from + (p.scale ? p.D : 0);
            A *da = p.scale ? dab + from : nullptr, *db = dab + from + (p.scale ? p.D : 0);
            backward_token(dz + at, double(dlog_det[row]), x + at, a, b, dx + at, da, db, p.D);
        }
    });
    return TF_OK;
}

// Calls f with null pointers of the storage types of x, ab and log_det.
template <class F>
int for_types(int x_dtype, int ab_dtype, F f) {
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
    return for_types(x_dtype, ab_dtype, [&](auto* X, auto* A, auto* L) {
        return forward((decltype(X))x, (decltype(A))ab, (decltype(X))z, (decltype(L))log_det, p, threads);
    });
}

int affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab, void* dx, void* dab, int64_t B,
                    int64_t T, int64_t D, int scale, int flip, int x_dtype, int ab_dtype, int threads) {
    const Problem p = {B, T, D, scale != 0, flip != 0};
    return for_types(x_dtype, ab_dtype, [&](auto* X, auto* A, auto* L) {
        return backward((decltype(X))dz, (decltype(L))dlog_det, (decltype(X))x, (decltype(A))ab, (decltype(X))dx,
                        (decltype(A))dab, p, threads);
    });
}

}  // namespace tf::TF_ISA
