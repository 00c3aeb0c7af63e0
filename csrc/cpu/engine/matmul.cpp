#include "matmul.h"

#include "operand.h"

namespace tf::TF_ISA {
namespace {

// Several tiles take so many bytes of a panel in turn: all but the first tile find them in the L1 cache.
constexpr int64_t CHUNK_BYTES = 16384;
constexpr int MAX_ROWS = 6;

// How many vectors of columns a tile of M rows has. All accumulators, one row of weights and a factor stay in
// registers.
constexpr int columns_of(int M) {
    if (LANES == 16) return 4;
    if (M == 1) return 8;
    return M <= 3 ? 4 : 2;
}

// Whether a row of weights is held in registers beside the accumulators. With 16 registers there is not always room.
template <int M, int V>
constexpr bool held = M > 1 && (M + 1) * V < (LANES == 16 ? 32 : 16);

// step() adds the products of one stored row of weights, V vectors from w on, with M rows of a. Such a row covers
// INPUTS inputs. After RUN steps the sums are added to the total and start again at 0. This makes the rounding error of
// a long sum a third of what one chain would have.
struct MathF32 {
    typedef float Operand;
    typedef float Weight;
    static constexpr int INPUTS = 1, RUN = 32;
    static constexpr int64_t AHEAD = 0;

    template <int M, int V>
    static inline __attribute__((always_inline)) void step(vf (&sum)[M][V], const Operand* a, int64_t stride,
                                                           const Weight* w) {
        vf row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            row[v] = load(w + v * LANES);
            if (held<M, V>) hold(row[v]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf factor = splat(a[m * stride]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[m][v] = fma(factor, row[v], sum[m][v]);
        }
    }
};

struct MathBf16 {
    typedef PrecisionBf16::Operand Operand;
    typedef uint16_t Weight;
    static constexpr int INPUTS = 2, RUN = 64;
    static constexpr int64_t AHEAD = 0;

    template <int M, int V>
    static inline __attribute__((always_inline)) void step(vf (&sum)[M][V], const Operand* a, int64_t stride,
                                                           const Weight* w) {
#if defined(__AVX512BF16__)
        __m512bh row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            __m512i pairs = _mm512_loadu_si512(w + 2 * v * LANES);
            // They are held as integers, because some compilers know no register for 16-bit floats.
            if (held<M, V>) hold(pairs);
            row[v] = (__m512bh)pairs;
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            int32_t pair;
            memcpy(&pair, a + m * stride, sizeof pair);
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[m][v] = (vf)_mm512_dpbf16_ps((__m512)sum[m][v], factor, row[v]);
        }
#else
        vf even[V], odd[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            vu pair;
            memcpy(&pair, w + 2 * v * LANES, sizeof pair);
            even[v] = bits<vf>(pair << 16), odd[v] = bits<vf>(pair & 0xffff0000u);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf first = splat(a[m * stride].value), second = splat(a[m * stride + 1].value);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[m][v] = fma(second, odd[v], fma(first, even[v], sum[m][v]));
        }
#endif
    }
};

struct MathInt8 {
    typedef float Operand;
    typedef int8_t Weight;
    static constexpr int INPUTS = 1, RUN = 32;
    // In bytes. A row of int8 weights is one cache line, and the machine's own fetching ahead is too slow for that.
    static constexpr int64_t AHEAD = 8192;

    static inline vf widen(const int8_t* w) {
#if defined(__AVX512F__)
        return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w)));
#elif defined(__AVX2__)
        return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)w)));
#else
        typedef int8_t small __attribute__((vector_size(LANES)));
        small q;
        memcpy(&q, w, sizeof q);
        return __builtin_convertvector(__builtin_convertvector(q, vi), vf);
#endif
    }

    template <int M, int V>
    static inline __attribute__((always_inline)) void step(vf (&sum)[M][V], const Operand* a, int64_t stride,
                                                           const Weight* w) {
        vf row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) row[v] = widen(w + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const vf factor = splat(a[m * stride]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[m][v] = fma(factor, row[v], sum[m][v]);
        }
    }
};

// Where a chunk of inputs stands.
struct Ends {
    bool first, last;           // whether it is the first, the last chunk of its part
    bool start, end;            // whether its part is the first, the last part of the sum
    const float *scale, *bias;  // of the panel; they are applied at the end
};

// One row tile of one panel over one chunk of inputs.
struct TileJob {
    const void* operands;  // rows `stride` apart
    int64_t stride;
    const void* weights;
    int64_t steps;
    const Ends* ends;
    float* y;           // the sum of the parts before, and of all of them at the end
    float* of_part;     // the sum of this part so far
    const char* ahead;  // weights that will be needed next
};

// Every step fetches LINES cache lines from `ahead` on. Tiles after the first find their own weights in the cache, and
// without this would leave the memory idle.
template <class Math, int M, int LINES>
void tile(const TileJob& job) {
    const int64_t stride = job.stride, steps = job.steps;
    // This is a reference because with a copy g++ 12 makes the code of a tile half as long again.
    const Ends& ends = *job.ends;
    float *const y = job.y, *const of_part = job.of_part;
    const char* ahead = job.ahead;
    constexpr int V = columns_of(M);
    for (int column = 0; column < PANEL; column += V * LANES) {
        const auto* w = static_cast<const typename Math::Weight*>(job.weights) + column * Math::INPUTS;
        const auto* a = static_cast<const typename Math::Operand*>(job.operands);
        for (int64_t done = 0; done < steps; done += Math::RUN) {
            const bool first = ends.first && done == 0, last = ends.last && done + Math::RUN >= steps;
            const int64_t run = steps - done < Math::RUN ? steps - done : Math::RUN;
            vf sum[M][V];
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
                for (int v = 0; v < V; ++v) sum[m][v] = zero();
            for (int64_t k = 0; k < run; ++k) {
#pragma GCC unroll 4
                for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
                ahead += 64 * LINES;
                Math::template step<M, V>(sum, a, stride, w);
                a += Math::INPUTS;
                w += PANEL * Math::INPUTS;
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
                for (int v = 0; v < V; ++v) {
                    const int64_t at = m * PANEL + column + v * LANES;
                    vf value = first ? sum[m][v] : load(of_part + at) + sum[m][v];
                    if (last && !ends.start) value = load(y + at) + value;
                    if (last && ends.end && ends.scale) value = value * load(ends.scale + column + v * LANES);
                    if (last && ends.end) value = value + load(ends.bias + column + v * LANES);
                    store((last ? y : of_part) + at, value);
                }
        }
    }
}

typedef void (*TileOf)(const TileJob& job);

template <class Math, int LINES>
TileOf choose(int64_t rows) {
    switch (rows) {
        case 1:
            return tile<Math, 1, LINES>;
        case 2:
            return tile<Math, 2, LINES>;
        case 3:
            return tile<Math, 3, LINES>;
        case 4:
            return tile<Math, 4, LINES>;
        case 5:
            return tile<Math, 5, LINES>;
        default:
            return tile<Math, 6, LINES>;
    }
}

template <class Math>
void multiply(const Product& product) {
    typedef typename Math::Weight Weight;
    const Matrix& m = *product.matrix;
    const auto* operands = static_cast<const typename Math::Operand*>(product.operands);
    const Weight* weights = static_cast<const Weight*>(m.weights);
    const int64_t rows = product.rows, stride = product.stride, part = product.part;
    const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    constexpr int64_t SHARED = CHUNK_BYTES / PANEL / int64_t(sizeof(Weight));
    static_assert(SHARED % (Math::RUN * Math::INPUTS) == 0, "a chunk is whole runs");
    float *const y = product.y, *const of_part = y + rows * PANEL;
    const bool whole = part == ALL;
    const int64_t from = whole ? 0 : part, to = whole ? m.parts : part + 1;
    for (int64_t panel = product.first; panel < product.last; ++panel) {
        Ends ends = {};
        ends.scale = m.scale ? m.scale + panel * PANEL : nullptr;
        ends.bias = m.bias + panel * PANEL;
        for (int64_t each_part = from; each_part < to; ++each_part) {
            const int64_t begin_k = each_part ? m.ends[each_part - 1] : 0, end_k = m.ends[each_part];
            const int64_t chunk = tiles == 1 ? end_k - begin_k : SHARED;
            ends.start = each_part == from, ends.end = whole && each_part + 1 == to;
            for (int64_t k = begin_k; k < end_k; k += chunk) {
                const int64_t inputs = end_k - k < chunk ? end_k - k : chunk, steps = inputs / Math::INPUTS;
                ends.first = k == begin_k, ends.last = k + inputs == end_k;
                const Weight* w = weights + panel * m.inputs * PANEL + k * PANEL;
                // What follows in memory is what comes next. Past the last panel of this share it may be another
                // thread's, or nobody's. Fetching ahead never faults.
                const char* next = reinterpret_cast<const char*>(w + inputs * PANEL);
                const int64_t lines = inputs * PANEL * int64_t(sizeof(Weight)) / 64;
                for (int64_t t = 0; t < tiles; ++t) {
                    const int64_t begin = rows * t / tiles, height = rows * (t + 1) / tiles - begin;
                    const int64_t each = (lines / tiles + steps - 1) / steps;
                    TileOf run = each >= 2 ? choose<Math, 2>(height) : choose<Math, 1>(height);
                    TileJob job = {};
                    job.operands = operands + begin * stride + k, job.stride = stride;
                    job.weights = w, job.steps = steps, job.ends = &ends;
                    job.y = y + begin * PANEL, job.of_part = of_part + begin * PANEL;
                    job.ahead = next + lines * t / tiles * 64;
                    if (tiles == 1) {
                        // This tile meets its weights first and in order, so the machine fetches ahead by itself. In
                        // int8 it is told to, except for a part alone: that is short, and what follows it is another
                        // thread's.
                        run = Math::AHEAD && whole ? choose<Math, 1>(height) : choose<Math, 0>(height);
                        job.ahead = reinterpret_cast<const char*>(w) + Math::AHEAD;
                    }
                    run(job);
                }
            }
        }
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
            product.finish(product.context, {product.row + begin, end - begin, panel, y + begin * PANEL});
        }
    }
}

}  // namespace

void matmul(const Product& product) {
    switch (product.matrix->storage) {
        case STORE_F32:
            return multiply<MathF32>(product);
        case STORE_BF16:
            return multiply<MathBf16>(product);
        case STORE_INT8:
            return multiply<MathInt8>(product);
    }
}

}  // namespace tf::TF_ISA
