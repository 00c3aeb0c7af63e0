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
        context_ = take(made.context);
        for (int l = 1; l <= made.layer_count; ++l) {
            const tf_made_layer& layer = made.layers[l - 1];
            const bool last = l == made.layer_count;
            raw_[l] = take(last ? widest_block(made, l) : layer.units);
            const bool both = !last && layer.activation != TF_MADE_IDENTITY && layer.keeps_raw;
            seen_[l] = both ? take(layer.units) : raw_[l];
            of_context_[l] = layer.gate.weight || layer.term.weight ? take(widest_block(made, l)) : nullptr;
        }
    }

    static int64_t numbers(const tf_made& made) {
        int64_t units = 2 * made.features + made.context + 2;
        for (int l = 1; l <= made.layer_count; ++l)
            units += (l == made.layer_count ? 0 : 2 * made.layers[l - 1].units) + 2 * widest_block(made, l);
        return units * ROWS;
    }

    // Rows [first, last) of the batch, at most ROWS.
    void run(const T* packed, const tf_made_rows& rows, int64_t first, int64_t last) {
        read(rows, first, last);
        const int L = made_.layer_count;
        int64_t parameters_from = 0;  // the place of the first parameter kept
        const auto units_of = [&](int l, int64_t place) {
            return raw_[l + 1] + (l + 1 == L ? place - parameters_from : place) * ROWS;
        };
        const Schedule schedule = {made_};
        walk(
            made_,
            [&](int64_t s0, int64_t) {
                block_ = s0;
                parameters_from = schedule.starts(L)[s0];
            },
            [&](int l, int64_t from, int64_t to) { packed = begin(packed, l, to - from, units_of(l, from)); },
            [&](const Part& part) {
                const tf_made_layer& layer = made_.layers[part.l];
                const T* in = (layer.reads_raw ? raw_ : seen_)[layer.source] + part.from * ROWS;
                const int64_t inputs = part.to - part.from;
                packed = product(packed, in, inputs, part.last - part.first, units_of(part.l, part.first));
            },
            [&](int l, int64_t s) {
                const int32_t* starts = schedule.starts(l + 1);
                finish(l, starts[s], starts[s + 1], starts[block_], units_of(l, starts[s]));
            },
            [&](int64_t s) {
                for (int64_t d = made_.starts[s]; d < made_.starts[s + 1]; ++d)
                    invert(d, raw_[L] + (d * made_.parameters - parameters_from) * ROWS);
            });
        write(rows, first, last);
    }

    static constexpr int MOST_LAYERS = 64;

  private:
    static int64_t widest_block(const tf_made& made, int vector) {
        const int32_t* starts = made.layers[vector - 1].starts;
        int64_t widest = 0;
        for (int64_t k = 0; k < made.block_count; ++k) {
            const int64_t units = starts[made.blocks[k + 1]] - starts[made.blocks[k]];
            widest = units > widest ? units : widest;
        }
        return widest;
    }

    // Adds to `units` units their weighted inputs. Returns the end of the weights.
    static const T* product(const T* w, const T* in, int64_t inputs, int64_t units, T* out) {
        if (inputs == 0) return w;
        for (int64_t u = 0; u < units; u += PANEL, w += PANEL * inputs, out += PANEL * ROWS)
            panel(int(units - u < PANEL ? units - u : PANEL), w, in, inputs, out);
        return w - ((units + PANEL - 1) / PANEL * PANEL - units) * inputs;
    }

    static void panel(int width, const T* w, const T* in, int64_t inputs, T* out) {
        switch (width) {
            case 1: return multiply<T, VECTORS, 1>(w, in, inputs, out);
            case 2: return multiply<T, VECTORS, 2>(w, in, inputs, out);
            case 3: return multiply<T, VECTORS, 3>(w, in, inputs, out);
            case 4: return multiply<T, VECTORS, 4>(w, in, inputs, out);
            case 5: return multiply<T, VECTORS, 5>(w, in, inputs, out);
            default: return multiply<T, VECTORS, PANEL>(w, in, inputs, out);
        }
    }

    void read(const tf_made_rows& rows, int64_t first, int64_t last) {
        const int64_t D = made_.features;
        const auto column = [&](const T* from, int64_t stride, T* to) {
            for (int64_t row = 0; row < ROWS; ++row) to[row] = row < last - first ? from[row * stride] : T(0);
        };
        const T* y = static_cast<const T*>(rows.y) + first * D;
        for (int64_t d = 0; d < D; ++d) column(y + made_.places[d], D, y_ + d * ROWS);
        const T* context = static_cast<const T*>(rows.context) + first * rows.context_stride;
        for (int64_t k = 0; k < made_.context; ++k) column(context + k, rows.context_stride, context_ + k * ROWS);
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

    static const T* spread(const T* biases, int64_t units, T* to) {
        for (int64_t u = 0; u < units; ++u)
            for (int k = 0; k < ROWS; k += LANES_OF) store(to + u * ROWS + k, splat(biases[u]));
        return biases + units;
    }

    // What a function of the context is for `units` units.
    const T* compute(const tf_made_context& function, const T* packed, int64_t units, T* to) {
        packed = spread(packed, units, to);
        packed = product(packed, context_, made_.context, units, to);
        if (function.activation != TF_MADE_IDENTITY) activate(function.activation, function.slope, to, to, units * ROWS);
        return packed;
    }

    // The units of a block begin as their biases and what the context adds. Their gates are kept for `finish`.
    const T* begin(const T* packed, int l, int64_t units, T* to) {
        const tf_made_layer& layer = made_.layers[l];
        T* of_context = of_context_[l + 1];
        packed = spread(packed, units, to);
        if (layer.term.weight) {
            packed = compute(layer.term, packed, units, of_context);
            for (int64_t k = 0; k < units * ROWS; k += LANES_OF) store(to + k, load(to + k) + load(of_context + k));
        }
        return layer.gate.weight ? compute(layer.gate, packed, units, of_context) : packed;
    }

    // The sums of units [from, to) of a layer are complete: the gate, what is added, the activation.
    void finish(int l, int64_t from, int64_t to, int64_t block_from, T* out) {
        const tf_made_layer& layer = made_.layers[l];
        if (layer.gate.weight) {
            const T* gate = of_context_[l + 1] + (from - block_from) * ROWS;
            for (int64_t k = 0; k < (to - from) * ROWS; k += LANES_OF) store(out + k, load(out + k) * load(gate + k));
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
    T *y_, *log_det_, *lost_, *context_;
    int64_t block_ = 0;  // the first step of this block
    T* raw_[MOST_LAYERS + 1];   // the vectors as they are, and
    T* seen_[MOST_LAYERS + 1];  // after their activation
    T* of_context_[MOST_LAYERS + 1];  // gates of the units of this block, or scratch memory for their terms
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
