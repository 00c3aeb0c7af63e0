// Packing puts a Linear's weights (columns, inputs) into panels, and finds NaN and infinity on the way.
#include "../parallel.h"
#include "operand.h"
#include "plan.h"
#include "transpose.h"

namespace tf::TF_ISA {
namespace {

constexpr int64_t PART = 64;  // so many inputs of 16 rows are read before the next 16 rows are

// One tensor of the block, which lands in a matrix or a vector.
struct Source {
    const void* data;  // nullptr where the tensor is absent
    int dtype;
    int64_t index;  // the number of the tensor, by which a message names it
};

// Turns the sign bits of `bad` to 1 for a NaN or an infinity. Only one instruction of a vector waits for the vector
// before. Of a maximum, the comparison and the select both waited. Packing a block of 4 layers of C 128 took 95 us
// then, and takes 75 us now.
inline void note_finite(vu& bad, vf v) { bad |= (bits<vu>(v) & 0x7fffffffu) + 0x00800000u; }

inline bool finite(vu bad) {
    uint32_t any = 0;
    for (int k = 0; k < LANES; ++k) any |= bad[k];
    return any < 0x80000000u;
}

// The numbers from k on, up to n, as a vector. Past n it holds zeros and reads nothing.
template <class Element>
inline vf load_left(const Element* p, int64_t k, int64_t n) {
    return n - k >= LANES ? load(p + k) : n > k ? load(p + k, int(n - k)) : zero();
}

// Rows first .. first + count of a Linear, which 16 columns come from. Where count < 16 the last columns are zeros.
struct Rows {
    int64_t first;
    int count;
};

// Says which rows the packed columns of a matrix come from, 16 columns at a time.
struct Columns {
    const Shape* qkv = nullptr;  // not nullptr for qkv, whose columns are regrouped by head
    int64_t count = 0;           // rows of the Linear

    Rows rows(int64_t column) const {
        if (!qkv) return {column, up_to_16(count - column)};
        const int64_t width = qkv->group_panels * PANEL, in_group = column % width;
        const int64_t head = column / width * qkv->group + in_group / (3 * qkv->Ep);
        const int64_t within = in_group % (3 * qkv->Ep), which = within / qkv->Ep, e = within % qkv->Ep;
        const bool none = in_group >= 3 * qkv->Ep * qkv->group || head >= qkv->H;
        return {which * qkv->C + head * qkv->E + e, none ? 0 : up_to_16(qkv->E - e)};
    }

    static int up_to_16(int64_t n) { return n <= 0 ? 0 : n < 16 ? int(n) : 16; }
};

struct Job {
    const Matrix* matrix;
    Source weight, bias;
    Columns columns;
    int64_t inputs;  // of the Linear; the matrix may have one more, which is zero
};

// One panel of a matrix.
struct Item {
    Job job;
    int64_t panel;

    Rows rows(int group) const { return job.columns.rows(panel * PANEL + group * 16); }
};

constexpr int GROUPS = PANEL / 16;

// Packs one panel of weights of type Element, stored as STORAGE.
template <class Element, Storage STORAGE>
struct Packer {
    // A word holds a float, a pair of bf16, or an int8. A tile is 16 words of each of 16 columns.
    static constexpr int64_t A_WORD = STORAGE == STORE_BF16 ? 2 : 1, TILE = 16 * A_WORD;

    // The rows of 16 columns.
    struct Group {
        const Element* data;
        int count;
        int64_t inputs;
    };

    const Job& job;
    const int64_t panel;
    Group groups[GROUPS], next[GROUPS];  // next: those of the item that follows
    float scales[PANEL];
    vu bad = {};

    Packer(const Item& item, const Item& following) : job(item.job), panel(item.panel) {
        for (int g = 0; g < GROUPS; ++g) groups[g] = group(item, g), next[g] = group(following, g);
    }

    static Group group(const Item& item, int g) {
        const Rows rows = item.rows(g);
        if (rows.count == 0) return {};
        const Element* weights = static_cast<const Element*>(item.job.weight.data);
        return {weights + rows.first * item.job.inputs, rows.count, item.job.inputs};
    }

    static inline void words(const Element* row, int64_t k, int64_t n, float scale, uint32_t* out, vu& bad) {
        for (int at = 0; at < TILE; at += LANES) {
            const vf v = load_left(row, k + at, n);
            if (STORAGE == STORE_F32) {
                memcpy(out + at, &v, sizeof v);
            } else if (STORAGE == STORE_BF16) {
                const vh h = narrow_bf16(v);
                memcpy(out + at / 2, &h, sizeof h);
            } else {
                const float round_to_int = 0x1.8p23f;
                const vi q = bits<vi>(v / splat(scale) + round_to_int) - bits<int32_t>(round_to_int);
                memcpy(out + at, &q, sizeof q);
            }
            note_finite(bad, v);
        }
    }

    // A machine does not guess an order that reads short pieces of 64 rows. So what is packed some time later is
    // fetched now. Packing 226 MB of fp32 took 16 ms when the next panel was fetched, and takes 11 ms with this. The
    // function is always inlined, because compilers drop the call of a function that only fetches.
    static inline __attribute__((always_inline)) void fetch(const Group& from, int64_t k) {
        for (int i = 0; i < from.count; ++i)
            for (int64_t at = k; at < k + TILE; at += 64 / int64_t(sizeof(Element)))
                __builtin_prefetch(from.data + i * from.inputs + at, 0, 2);
    }

    // Packs the columns of group g of the panel, inputs k .. k + TILE.
    void tile(int g, int64_t k) {
        const Matrix& m = *job.matrix;
        alignas(64) uint32_t read[16][16], turned[16][16];
        if (STORAGE == STORE_INT8)
            fetch(g + 1 < GROUPS ? groups[g + 1] : next[0], k);
        else if (k + PART < job.inputs)
            fetch(groups[g], k + PART);
        else
            fetch(next[g], k % PART);
        const Group& from = groups[g];
        vu found = {};
        for (int i = 0; i < from.count; ++i)
            words(from.data + i * job.inputs, k, job.inputs, scales[g * 16 + i], read[i], found);
        for (int i = from.count; i < 16; ++i) memset(read[i], 0, sizeof read[i]);
        bad |= found;
        const int64_t left = (m.inputs - k) / A_WORD, lines = left < 16 ? left : 16, at = panel * m.inputs * PANEL;
        uint32_t* packed =
            STORAGE == STORE_INT8 ? nullptr : static_cast<uint32_t*>(m.weights) + (at + k * PANEL) / A_WORD + g * 16;
        if (packed && lines == 16) return transpose16(read[0], 16, packed, PANEL);
        transpose16(read[0], 16, turned[0], 16);
        for (int64_t j = 0; j < lines; ++j) {
            if (STORAGE == STORE_INT8) {
                // These are not written straight to the weights: bytes may alias anything, and would then be written
                // one by one.
                int8_t narrow[16];
                for (int i = 0; i < 16; ++i) narrow[i] = int8_t(turned[j][i]);
                memcpy(static_cast<int8_t*>(m.weights) + at + (k + j) * PANEL + g * 16, narrow, sizeof narrow);
            } else {
                memcpy(packed + j * PANEL, turned[j], sizeof turned[j]);
            }
        }
    }

    // Finds the scale of each column of group g, which makes its largest weight 127.
    void find_scales(int g) {
        const Group& from = groups[g];
        for (int i = 0; i < 16; ++i) {
            vf column = {};
            for (int64_t k = 0; i < from.count && k < from.inputs; k += LANES) {
                const vf v = load_left(from.data + i * from.inputs, k, from.inputs);
                column = max(column, max(v, -v));
            }
            const float most = max_lane(column);
            const int c = g * 16 + i;
            job.matrix->scale[panel * PANEL + c] = scales[c] = most > 0.0f ? most / 127.0f : 1.0f;
        }
    }

    // Packs the panel. Returns whether all weights were finite.
    bool run() {
        const int64_t inputs = job.matrix->inputs;
        if (STORAGE == STORE_INT8)  // it reads its rows twice, so it takes few, which stay in the cache
            for (int g = 0; g < GROUPS; ++g) {
                find_scales(g);
                for (int64_t k = 0; k < inputs; k += TILE) tile(g, k);
            }
        else
            for (int64_t part = 0; part < inputs; part += PART)
                for (int g = 0; g < GROUPS; ++g)
                    for (int64_t k = part; k < part + PART && k < inputs; k += TILE) tile(g, k);
        return finite(bad);
    }
};

template <class Element>
bool pack_weights(const Item& item, const Item& next) {
    switch (item.job.matrix->storage) {
        case STORE_F32:
            return Packer<Element, STORE_F32>(item, next).run();
        case STORE_BF16:
            return Packer<Element, STORE_BF16>(item, next).run();
        default:
            return Packer<Element, STORE_INT8>(item, next).run();
    }
}

// Reads n floats from element `first` on. Returns whether all are finite.
template <class Element>
bool read(const void* data, int64_t first, int64_t n, float* y) {
    const Element* x = static_cast<const Element*>(data) + first;
    vu bad = {};
    store_row(y, n, [&](int64_t k, int m) {
        const vf v = m == LANES ? load(x + k) : load(x + k, m);
        note_finite(bad, v);
        return v;
    });
    return finite(bad);
}

bool read(const Source& source, int64_t first, int64_t n, float* y) {
    if (source.dtype == TF_F32) return read<float>(source.data, first, n, y);
    return source.dtype == TF_BF16 ? read<bf16>(source.data, first, n, y) : read<f16>(source.data, first, n, y);
}

// Packs a panel. Returns -1, or the number of a tensor that is not finite. `next` is packed after it, and is fetched.
int64_t pack_panel(const Item& item, const Item& next) {
    const Job& job = item.job;
    const int dtype = job.weight.dtype;
    const bool fine = dtype == TF_F32    ? pack_weights<float>(item, next)
                      : dtype == TF_BF16 ? pack_weights<bf16>(item, next)
                                         : pack_weights<f16>(item, next);
    int64_t bad = fine ? -1 : job.weight.index;
    for (int g = 0; g < GROUPS; ++g) {
        const Rows rows = item.rows(g);
        float* bias = job.matrix->bias + item.panel * PANEL + g * 16;
        memset(bias, 0, 16 * sizeof *bias);
        if (job.bias.data && !read(job.bias, rows.first, rows.count, bias)) bad = job.bias.index;
    }
    return bad;
}

int64_t pack_vector(const Source& source, float missing, int64_t n, float* y) {
    if (source.data) return read(source, 0, n, y) ? -1 : source.index;
    for (int64_t k = 0; k < n; ++k) y[k] = missing;
    return -1;
}

// The mean of n rows of C floats. It is summed as PyTorch sums: 16 rows at a time, and then the sums of those. For few
// rows the numbers are PyTorch's own.
void mean_of_rows(const float* rows, int64_t n, int64_t C, float* mean) {
    constexpr int64_t SOME = 64, TOGETHER = 16;
    for (int64_t begin = 0; begin < C; begin += SOME) {
        const int64_t count = C - begin < SOME ? C - begin : SOME;
        float sums[SOME] = {};
        for (int64_t row = 0; row < n; row += TOGETHER) {
            float some[SOME] = {};
            for (int64_t r = row; r < n && r < row + TOGETHER; ++r)
                for (int64_t c = 0; c < count; ++c) some[c] += rows[r * C + begin + c];
            for (int64_t c = 0; c < count; ++c) sums[c] += some[c];
        }
        for (int64_t c = 0; c < count; ++c) mean[begin + c] = sums[c] / float(n);
    }
}

}  // namespace

int test_matmul(const float* x, const float* w, const float* bias, float* y, int64_t rows, int64_t columns,
                int64_t inputs, int precision) {
    const Storage storage = Storage(precision);
    Matrix m = {};
    m.inputs = storage == STORE_BF16 ? round_up(inputs, 2) : inputs, m.columns = panels(columns) * PANEL,
    m.storage = storage;
    m.parts = 1, m.ends[0] = m.inputs;
    const int64_t bytes = (m.inputs + 2) * m.columns * 4 + rows * stride(inputs) * 4 + 2 * ROW_BLOCK * PANEL * 4;
    char* memory = static_cast<char*>(allocate(bytes));
    if (!memory) return TF_NO_MEMORY;
    m.weights = memory;
    m.bias = reinterpret_cast<float*>(memory + m.inputs * m.columns * 4);
    m.scale = storage == STORE_INT8 ? m.bias + m.columns : nullptr;
    char* operands = reinterpret_cast<char*>(m.bias + 2 * m.columns);
    float* room = reinterpret_cast<float*>(operands + rows * stride(inputs) * 4);
    const Job job = {&m, {w, TF_F32, 0}, {bias, TF_F32, 1}, {nullptr, columns}, inputs};
    for (int64_t panel = 0; panel < panels(columns); ++panel) pack_panel({job, panel}, {job, panel});
    const auto fill = [=](auto* a) {
        for (int64_t r = 0; r < rows; ++r)
            store_row(a + r * stride(inputs), inputs,
                      [=](int64_t k, int n) { return load_part(x + r * inputs + k, n); });
    };
    int64_t size = 4;
    if (storage == STORE_BF16) {
        fill(reinterpret_cast<PrecisionBf16::Operand*>(operands));
        size = sizeof(PrecisionBf16::Operand);
    } else {
        fill(reinterpret_cast<float*>(operands));
    }
    struct Out {
        float* y;
        int64_t columns;
    } out = {y, columns};
    for (int64_t row = 0; row < rows; row += ROW_BLOCK) {
        Product product = {};
        product.matrix = &m;
        product.operands = operands + row * stride(inputs) * size, product.stride = stride(inputs);
        product.row = row, product.rows = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
        product.first = 0, product.last = panels(columns), product.part = ALL;
        product.y = room, product.context = &out;
        product.finish = [](void* context, const Tile& tile) {
            const Out& to = *static_cast<Out*>(context);
            for (int64_t r = 0; r < tile.rows; ++r)
                for (int64_t c = 0; c < PANEL && tile.panel * PANEL + c < to.columns; ++c)
                    to.y[(tile.row + r) * to.columns + tile.panel * PANEL + c] = tile.y[r * PANEL + c];
        };
        matmul(product);
    }
    release(memory, bytes);
    return TF_OK;
}

// The tensors come in this order: proj_in weight and bias, pos_embed, proj_out weight and bias; for each layer the
// weight and bias of norm, qkv, proj, norm, fc1 and fc2; then class_embed.
int plan_pack(tf_plan* handle, const void* const* tensors, int dtype, int threads, int64_t* bad) {
    const Plan& plan = *reinterpret_cast<Plan*>(handle);
    const Shape& s = plan.shape;
    if (dtype != TF_F32 && dtype != TF_BF16 && dtype != TF_F16) return TF_BAD_DTYPE;
    const auto source = [=](int64_t index) { return Source{tensors[index], dtype, index}; };
    const int64_t LAYER = 12, FIRST = 5;
    const auto job = [&](int64_t number) -> Job {  // of matrix `number`: the two ends come first, then four a layer
        if (number == 0) return {&plan.in, source(0), source(1), {nullptr, s.C}, s.D};
        if (number == 1) return {&plan.out, source(3), source(4), {nullptr, s.out}, s.C};
        const int64_t l = (number - 2) / 4, at = FIRST + LAYER * l;
        const Layer& layer = plan.layers[l];
        switch ((number - 2) % 4) {
            case 0:
                return {&layer.qkv, source(at + 2), source(at + 3), {&s, 3 * s.C}, s.C};
            case 1:
                return {&layer.proj, source(at + 4), source(at + 5), {nullptr, s.C}, s.C};
            case 2:
                return {&layer.fc1, source(at + 8), source(at + 9), {nullptr, s.F}, s.C};
            default:
                return {&layer.fc2, source(at + 10), source(at + 11), {nullptr, s.C}, s.F};
        }
    };
    int64_t found = -1;
    const auto note = [&](int64_t index) {
        if (index >= 0) __atomic_store_n(&found, index, __ATOMIC_RELAXED);
    };
    note(pack_vector(source(2), 0.0f, s.T * s.C, plan.pos));
    for (int64_t l = 0; l < s.L; ++l) {
        const int64_t at = FIRST + LAYER * l;
        note(pack_vector(source(at), 1.0f, s.C, plan.layers[l].norm1.gain));
        note(pack_vector(source(at + 1), 0.0f, s.C, plan.layers[l].norm1.shift));
        note(pack_vector(source(at + 6), 1.0f, s.C, plan.layers[l].norm2.gain));
        note(pack_vector(source(at + 7), 0.0f, s.C, plan.layers[l].norm2.shift));
    }
    if (s.classes) {
        float* embeddings = plan.classes + s.C;
        note(pack_vector(source(FIRST + LAYER * s.L), 0.0f, s.classes * s.C, embeddings));
        mean_of_rows(embeddings, s.classes, s.C, plan.classes);
    }
    // Items are the panels of the matrices, layer after layer. The two ends come before the first layer. An item finds
    // its matrix by counting.
    const int64_t qkv = s.groups * s.group_panels, proj = panels(s.C), fc1 = panels(s.F), fc2 = panels(s.C);
    const int64_t in = panels(s.C), out = panels(s.out), layer = qkv + proj + fc1 + fc2;
    const auto find = [&](int64_t item) -> Item {
        if (item < in) return {job(0), item};
        if ((item -= in) < out) return {job(1), item};
        item -= out;
        const int64_t first = 2 + item / layer * 4;
        item %= layer;
        if (item < qkv) return {job(first), item};
        if ((item -= qkv) < proj) return {job(first + 1), item};
        if ((item -= proj) < fc1) return {job(first + 2), item};
        return {job(first + 3), item - fc1};
    };
    const int64_t items = in + out + s.L * layer;
    parallel_for(threads, items,
                 [&](int64_t item) { note(pack_panel(find(item), find(item + 1 < items ? item + 1 : item))); });
    *bad = found;
    return found >= 0 ? TF_NOT_FINITE : TF_OK;
}

}  // namespace tf::TF_ISA
