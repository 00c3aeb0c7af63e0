// The sweep: rows in tiles of a few vectors, units one under the other, [unit][row]. A tile's activations stay in the
// cache, and the packed weights are read once, from front to back, for each tile.
#include <stdlib.h>

#include "../parallel.h"
#include "../table.h"
#include "activations.h"
#include "sweep.h"
#include "univariate.h"

namespace tf::TF_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDEST = 4;  // vectors of rows in a tile: 32 registers hold 4 x PANEL accumulators
#else
constexpr int WIDEST = 2;
#endif

// out[u][row] += sum over k of w[k][u] in[k][row], for UNITS units and VECTORS vectors of rows.
template <class T, int VECTORS, int UNITS>
void multiply(const T* w, const T* in, int64_t inputs, T* out) {
    typedef typename LanesOf<T>::Vector V;
    constexpr int LANES_OF = LanesOf<T>::COUNT, ROWS = VECTORS * LANES_OF;
    V sum[UNITS][VECTORS];
    for (int u = 0; u < UNITS; ++u)
        for (int v = 0; v < VECTORS; ++v) sum[u][v] = load(out + u * ROWS + v * LANES_OF);
    for (int64_t k = 0; k < inputs; ++k, in += ROWS, w += UNITS) {
        V a[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            a[v] = load(in + v * LANES_OF);
            hold(a[v]);
        }
        for (int u = 0; u < UNITS; ++u) {
            const V factor = splat(w[u]);
            for (int v = 0; v < VECTORS; ++v) sum[u][v] = fma(factor, a[v], sum[u][v]);
        }
    }
    for (int u = 0; u < UNITS; ++u)
        for (int v = 0; v < VECTORS; ++v) store(out + u * ROWS + v * LANES_OF, sum[u][v]);
}

// One tile: its memory, and the sweep over it.
template <class T, int VECTORS>
class Tile {
    typedef typename LanesOf<T>::Vector V;
    static constexpr int LANES_OF = LanesOf<T>::COUNT, ROWS = VECTORS * LANES_OF;

  public:
    Tile(const tf_made& made, T* memory) : made_(made) {
        const auto take = [&](int64_t units) {
            T* here = memory;
            memory += units * ROWS;
            return here;
        };
        y_ = take(made.features);
        log_det_ = take(1);
        lost_ = take(1);
        raw_[0] = seen_[0] = take(made.features);
        for (int l = 1; l <= made.layer_count; ++l) {
            const tf_made_layer& layer = made.layers[l - 1];
            const bool last = l == made.layer_count;
            raw_[l] = take(last ? widest_block(made) : layer.units);
            const bool both = !last && layer.activation != TF_MADE_IDENTITY && layer.keeps_raw;
            seen_[l] = both ? take(layer.units) : raw_[l];
        }
    }

    static int64_t numbers(const tf_made& made) {
        int64_t units = 2 * made.features + 2 + widest_block(made);
        for (int l = 0; l + 1 < made.layer_count; ++l) units += 2 * made.layers[l].units;
        return units * ROWS;
    }

    // Rows [first, last) of the batch, at most ROWS.
    void run(const T* packed, const tf_made_rows& rows, int64_t first, int64_t last) {
        read(static_cast<const T*>(rows.y), first, last);
        const int L = made_.layer_count;
        const T* biases[MOST_LAYERS];
        for (int l = 0; l < L; ++l) {
            biases[l] = packed;
            packed += made_.layers[l].units;
        }
        int64_t parameters_from = 0;  // the place of the first parameter kept
        const auto units_of = [&](int l, int64_t place) {
            return raw_[l + 1] + (l + 1 == L ? place - parameters_from : place) * ROWS;
        };
        const Schedule schedule = {made_};
        walk(
            made_,
            [&](int64_t s0, int64_t s1) {
                parameters_from = schedule.starts(L)[s0];
                for (int l = 0; l < L; ++l) {
                    const int32_t* starts = schedule.starts(l + 1);
                    for (int64_t u = starts[s0]; u < starts[s1]; ++u)
                        begin(biases[l][u], rows, l, u, first, last, units_of(l, u));
                }
            },
            [&](const Part& part) {
                const tf_made_layer& layer = made_.layers[part.l];
                const T* in = (layer.reads_raw ? raw_ : seen_)[layer.source] + part.from * ROWS;
                const int64_t inputs = part.to - part.from;
                for (int64_t u = part.first; u < part.last; u += PANEL) {
                    const int width = int(part.last - u < PANEL ? part.last - u : PANEL);
                    product(width, packed, in, inputs, units_of(part.l, u));
                    packed += inputs * width;
                }
            },
            [&](int l, int64_t s) {
                const int32_t* starts = schedule.starts(l + 1);
                finish(rows, l, starts[s], starts[s + 1], first, last, units_of(l, starts[s]));
            },
            [&](int64_t s) {
                for (int64_t d = made_.starts[s]; d < made_.starts[s + 1]; ++d)
                    invert(d, raw_[L] + (d * made_.parameters - parameters_from) * ROWS);
            });
        write(rows, first, last);
    }

    static constexpr int MOST_LAYERS = 64;

  private:
    static int64_t widest_block(const tf_made& made) {
        const int32_t* starts = made.layers[made.layer_count - 1].starts;
        int64_t widest = 0;
        for (int64_t k = 0; k < made.block_count; ++k) {
            const int64_t units = starts[made.blocks[k + 1]] - starts[made.blocks[k]];
            widest = units > widest ? units : widest;
        }
        return widest;
    }

    static void product(int width, const T* w, const T* in, int64_t inputs, T* out) {
        if (inputs == 0) return;
        switch (width) {
            case 1: return multiply<T, VECTORS, 1>(w, in, inputs, out);
            case 2: return multiply<T, VECTORS, 2>(w, in, inputs, out);
            case 3: return multiply<T, VECTORS, 3>(w, in, inputs, out);
            case 4: return multiply<T, VECTORS, 4>(w, in, inputs, out);
            case 5: return multiply<T, VECTORS, 5>(w, in, inputs, out);
            default: return multiply<T, VECTORS, PANEL>(w, in, inputs, out);
        }
    }

    void read(const T* y, int64_t first, int64_t last) {
        const int64_t D = made_.features;
        for (int64_t d = 0; d < D; ++d) {
            const T* from = y + first * D + made_.places[d];
            T* to = y_ + d * ROWS;
            for (int64_t row = 0; row < ROWS; ++row) to[row] = row < last - first ? from[row * D] : T(0);
        }
        memset(log_det_, 0, ROWS * sizeof(T));
        memset(lost_, 0, ROWS * sizeof(T));
    }

    void write(const tf_made_rows& rows, int64_t first, int64_t last) {
        const int64_t D = made_.features;
        T* x = static_cast<T*>(rows.x) + first * D;
        for (int64_t row = 0; row < last - first; ++row)
            for (int64_t d = 0; d < D; ++d) x[row * D + made_.places[d]] = raw_[0][d * ROWS + row];
        memcpy(static_cast<T*>(rows.log_det) + first, log_det_, size_t(last - first) * sizeof(T));
    }

    // A unit begins as its bias, and what the context adds to it.
    void begin(T bias, const tf_made_rows& rows, int l, int64_t u, int64_t first, int64_t last, T* to) {
        const T* term = static_cast<const T*>(rows.terms[l]);
        if (!term || rows.term_strides[l] == 0) {
            if (term) bias += term[made_.layers[l].places[u]];
            for (int v = 0; v < VECTORS; ++v) store(to + v * LANES_OF, splat(bias));
            return;
        }
        term += first * rows.term_strides[l] + made_.layers[l].places[u];
        for (int64_t row = 0; row < ROWS; ++row)
            to[row] = row < last - first ? bias + term[row * rows.term_strides[l]] : bias;
    }

    // The sums of units [from, to) of a layer are complete: the gate, what is added, the activation.
    void finish(const tf_made_rows& rows, int l, int64_t from, int64_t to, int64_t first, int64_t last, T* out) {
        const tf_made_layer& layer = made_.layers[l];
        if (const T* gate = static_cast<const T*>(rows.gates[l])) {
            gate += first * rows.gate_strides[l];
            for (int64_t u = from; u < to; ++u)
                for (int64_t row = 0; row < last - first; ++row)
                    out[(u - from) * ROWS + row] *= gate[row * rows.gate_strides[l] + layer.places[u]];
        }
        if (layer.residual >= 0)
            for (int64_t u = from; u < to; ++u) {
                const T* added = raw_[layer.residual] + layer.residual_at[u] * ROWS;
                T* sum = out + (u - from) * ROWS;
                for (int k = 0; k < ROWS; k += LANES_OF) store(sum + k, load(added + k) + load(sum + k));
            }
        if (layer.activation != TF_MADE_IDENTITY)
            activate(layer.activation, layer.slope, out, seen_[l + 1] + from * ROWS, (to - from) * ROWS);
    }

    // x of feature number d in the order of the steps, from its parameters.
    void invert(int64_t d, const T* phi) {
        const bool affine = made_.univariate < TF_MADE_SPLINE_ZUKO;
        const Spline spline = affine ? Spline{} : spline_of(made_.univariate, made_.constants);
        for (int k = 0; k < ROWS; k += LANES_OF) {
            const V y = load(y_ + d * ROWS + k);
            const Inverse<V> got =
                affine ? affine_inverse(made_.univariate, made_.constants, y, load(phi + k), load(phi + ROWS + k))
                       : spline_inverse(spline, y, phi + k, ROWS);
            store(raw_[0] + d * ROWS + k, got.x);
            // Kahan's sum, as good as PyTorch's by pairs. An infinity makes what is lost NaN, so it is dropped there.
            const V sum = load(log_det_ + k), more = got.ladj - load(lost_ + k), next = sum + more;
            const V lost = (next - sum) - more;
            store(log_det_ + k, next);
            store(lost_ + k, lost == lost ? lost : V{});
        }
    }

    const tf_made& made_;
    T *y_, *log_det_, *lost_;
    T* raw_[MOST_LAYERS + 1];   // the vectors as they are, and
    T* seen_[MOST_LAYERS + 1];  // after their activation
};

template <class T, int VECTORS>
int invert_tiles(const tf_made& made, const T* packed, const tf_made_rows& rows, int threads) {
    constexpr int64_t ROWS = VECTORS * LanesOf<T>::COUNT;
    const int64_t tiles = (rows.rows + ROWS - 1) / ROWS;
    const int64_t workers = tiles < threads ? tiles : threads;
    const size_t bytes = (size_t(Tile<T, VECTORS>::numbers(made)) * sizeof(T) + 63) & ~size_t(63);
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes * size_t(workers ? workers : 1)) != 0) return TF_NO_MEMORY;
    parallel_for(int(workers), workers, [&](int64_t worker) {
        Tile<T, VECTORS> tile(made, reinterpret_cast<T*>(static_cast<char*>(memory) + bytes * size_t(worker)));
        for (int64_t k = worker; k < tiles; k += workers)
            tile.run(packed, rows, k * ROWS, (k + 1) * ROWS < rows.rows ? (k + 1) * ROWS : rows.rows);
    });
    free(memory);
    return TF_OK;
}

// The widest tiles that leave no thread without one.
template <class T>
int invert_rows(const tf_made& made, const T* packed, const tf_made_rows& rows, int threads) {
    const int64_t vectors = (rows.rows + LanesOf<T>::COUNT - 1) / LanesOf<T>::COUNT;
    if (vectors <= threads) return invert_tiles<T, 1>(made, packed, rows, threads);
    if (WIDEST == 2 || vectors <= 2 * threads) return invert_tiles<T, 2>(made, packed, rows, threads);
    return invert_tiles<T, WIDEST>(made, packed, rows, threads);
}

}  // namespace

int made_invert(const tf_made* made, const void* packed, const tf_made_rows* rows, int threads) {
    if (made->layer_count > Tile<float, 1>::MOST_LAYERS) return TF_BAD_SIZE;
    if (made->dtype == TF_F64) return invert_rows(*made, static_cast<const double*>(packed), *rows, threads);
    return invert_rows(*made, static_cast<const float*>(packed), *rows, threads);
}

}  // namespace tf::TF_ISA
