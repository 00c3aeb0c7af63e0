// Packing: a Linear's weights (columns, inputs) into panels, checked for NaN and infinity on the way.
#include "../parallel.h"
#include "operand.h"
#include "plan.h"
#include "transpose.h"

namespace tf::TF_ISA {
namespace {

constexpr int64_t PART = 64;  // inputs of a panel transposed at a time, in the L1 cache

// One tensor of the block, or several rows of one: what lands in a matrix or a vector.
struct Source {
    const void* data;  // nullptr: absent
    int dtype;
    int64_t index;  // of the tensor, to name it

    // n floats from element `at` on; true when all are finite.
    bool read(int64_t at, int64_t n, float* y) const {
        vu worst = {};
        for (int64_t k = 0; k < n; k += W) {
            const int m = n - k < W ? int(n - k) : W;
            vf v;
            if (dtype == TF_F32)
                v = load_part(static_cast<const float*>(data) + at + k, m);
            else if (dtype == TF_BF16)
                v = load(static_cast<const bf16*>(data) + at + k, m);
            else
                v = load(static_cast<const f16*>(data) + at + k, m);
            const vu magnitude = bits<vu>(v) & 0x7fffffffu;
            worst |= vu(magnitude >= 0x7f800000u);
            if (m == W)
                store(y + k, v);
            else
                store(y + k, v, m);
        }
        uint32_t any = 0;
        for (int k = 0; k < W; ++k) any |= worst[k];
        return any == 0;
    }
};

// Where the packed columns of a matrix come from: column c is row `row(c)` of the Linear, or none (zeros).
struct Columns {
    const Shape* qkv = nullptr;  // the columns of qkv are regrouped by head
    int64_t count = 0;           // rows of the Linear

    int64_t row(int64_t column) const {
        if (!qkv) return column < count ? column : -1;
        const int64_t width = qkv->group_panels * PANEL, in_group = column % width;
        const int64_t head = column / width * qkv->group + in_group / (3 * qkv->Ep);
        const int64_t within = in_group % (3 * qkv->Ep), which = within / qkv->Ep, e = within % qkv->Ep;
        if (in_group >= 3 * qkv->Ep * qkv->group || head >= qkv->H || e >= qkv->E) return -1;
        return which * qkv->C + head * qkv->E + e;
    }
};

struct Job {
    const Matrix* matrix;
    Source weight, bias;
    Columns columns;
    int64_t inputs;  // of the Linear; the matrix may have one more, zero
};

// Rows of a part become the words that are transposed: a float, a pair of bf16, an int8 in a word of its own.
int64_t to_words(Storage storage, float scale, const float* row, uint32_t* words) {
    for (int k = 0; k < PART; k += W) {
        const vf v = load(row + k);
        if (storage == STORE_F32) {
            memcpy(words + k, &v, sizeof v);
        } else if (storage == STORE_BF16) {
            const vh h = narrow_bf16(v);
            memcpy(words + k / 2, &h, sizeof h);
        } else {
            const float round_to_int = 0x1.8p23f;
            const vi q = bits<vi>(v / splat(scale) + round_to_int) - bits<int32_t>(round_to_int);
            memcpy(words + k, &q, sizeof q);
        }
    }
    return storage == STORE_BF16 ? PART / 2 : PART;
}

void put(const Job& job, int64_t panel, int64_t k, int64_t n, const float (*rows)[PART]) {
    const Matrix& m = *job.matrix;
    const int64_t at = panel * m.inputs * PANEL + k * PANEL;
    alignas(64) uint32_t words[PANEL][PART], turned[16][PANEL];
    int64_t count = 0;
    for (int c = 0; c < PANEL; ++c)
        count = to_words(m.storage, m.scale ? m.scale[panel * PANEL + c] : 1.0f, rows[c], words[c]);
    const int64_t used = m.storage == STORE_BF16 ? n / 2 : n;
    for (int64_t j = 0; j < used && j < count; j += 16) {
        for (int c = 0; c < PANEL; c += 16) transpose16(words[c] + j, PART, turned[0] + c, PANEL);
        const int64_t lines = used - j < 16 ? used - j : 16;
        if (m.storage == STORE_F32)
            memcpy(static_cast<float*>(m.weights) + at + j * PANEL, turned, size_t(lines) * PANEL * 4);
        else if (m.storage == STORE_BF16)
            memcpy(static_cast<bf16*>(m.weights) + at + 2 * j * PANEL, turned, size_t(lines) * PANEL * 4);
        else
            for (int64_t c = 0; c < lines * PANEL; ++c)
                static_cast<int8_t*>(m.weights)[at + j * PANEL + c] = int8_t(turned[0][c]);
    }
}

// The scale of each column: its largest weight becomes 127.
bool find_scales(const Job& job, int64_t panel, float* row) {
    bool finite = true;
    for (int c = 0; c < PANEL; ++c) {
        const int64_t r = job.columns.row(panel * PANEL + c);
        float most = 0.0f;
        for (int64_t k = 0; r >= 0 && k < job.inputs; k += PART) {
            const int64_t n = job.inputs - k < PART ? job.inputs - k : PART;
            finite &= job.weight.read(r * job.inputs + k, n, row);
            for (int64_t j = n; j < PART; ++j) row[j] = 0.0f;
            vf largest = splat(most);
            for (int j = 0; j < PART; j += W) largest = max(largest, bits<vf>(bits<vu>(load(row + j)) & 0x7fffffffu));
            most = max_lane(largest);
        }
        job.matrix->scale[panel * PANEL + c] = most > 0.0f ? most / 127.0f : 1.0f;
    }
    return finite;
}

// -1, or the index of a tensor that is not finite.
int64_t pack_panel(const Job& job, int64_t panel) {
    alignas(64) float rows[PANEL][PART];
    int64_t bad = -1;
    if (job.matrix->storage == STORE_INT8 && !find_scales(job, panel, rows[0])) return job.weight.index;
    for (int64_t k = 0; k < job.matrix->inputs; k += PART) {
        const int64_t n = job.matrix->inputs - k < PART ? job.matrix->inputs - k : PART;
        for (int c = 0; c < PANEL; ++c) {
            const int64_t r = job.columns.row(panel * PANEL + c), there = job.inputs - k < n ? job.inputs - k : n;
            for (int64_t j = r < 0 ? 0 : there; j < PART; ++j) rows[c][j] = 0.0f;
            if (r >= 0 && !job.weight.read(r * job.inputs + k, there, rows[c])) bad = job.weight.index;
        }
        put(job, panel, k, n, rows);
    }
    for (int c = 0; c < PANEL; ++c) {
        const int64_t r = job.columns.row(panel * PANEL + c);
        float* bias = job.matrix->bias + panel * PANEL + c;
        *bias = 0.0f;
        if (r >= 0 && job.bias.data && !job.bias.read(r, 1, bias)) bad = job.bias.index;
    }
    return bad;
}

int64_t pack_vector(const Source& source, float missing, int64_t n, float* y) {
    if (source.data) return source.read(0, n, y) ? -1 : source.index;
    for (int64_t k = 0; k < n; ++k) y[k] = missing;
    return -1;
}

}  // namespace

int test_matmul(const float* x, const float* w, const float* bias, float* y, int64_t M, int64_t N, int64_t K,
                int precision) {
    const Storage storage = Storage(precision);
    Matrix m = {storage == STORE_BF16 ? round_up(K, 2) : K, panels(N) * PANEL, storage, nullptr, nullptr, nullptr};
    const int64_t bytes = (m.inputs + 2) * m.columns * 4 + M * stride(K) * 4 + ROW_BLOCK * PANEL * 4;
    char* memory = static_cast<char*>(allocate(bytes));
    if (!memory) return TF_NO_MEMORY;
    m.weights = memory;
    m.bias = reinterpret_cast<float*>(memory + m.inputs * m.columns * 4);
    m.scale = storage == STORE_INT8 ? m.bias + m.columns : nullptr;
    char* operands = reinterpret_cast<char*>(m.bias + 2 * m.columns);
    float* room = reinterpret_cast<float*>(operands + M * stride(K) * 4);
    const Job job = {&m, {w, TF_F32, 0}, {bias, TF_F32, 1}, {nullptr, N}, K};
    for (int64_t panel = 0; panel < panels(N); ++panel) pack_panel(job, panel);
    const auto fill = [=](auto* a) {
        for (int64_t r = 0; r < M; ++r)
            store_row(a + r * stride(K), K, [=](int64_t k, int n) { return load_part(x + r * K + k, n); });
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
        int64_t N;
    } out = {y, N};
    for (int64_t row = 0; row < M; row += ROW_BLOCK) {
        const int64_t rows = M - row < ROW_BLOCK ? M - row : ROW_BLOCK;
        matmul(m, operands + row * stride(K) * size, stride(K), row, rows, 0, panels(N), room,
               [](void* context, const Tile& tile) {
                   const Out& to = *static_cast<Out*>(context);
                   for (int64_t r = 0; r < tile.rows; ++r)
                       for (int64_t c = 0; c < PANEL && tile.panel * PANEL + c < to.N; ++c)
                           to.y[(tile.row + r) * to.N + tile.panel * PANEL + c] = tile.y[r * PANEL + c];
               },
               &out);
    }
    release(memory, bytes);
    return TF_OK;
}

// Tensors, in this order: proj_in weight and bias, pos_embed, proj_out weight and bias, then for each layer norm weight and
// bias, qkv, proj, norm, fc1, fc2 likewise.
int plan_pack(tf_plan* handle, const void* const* tensors, int dtype, int threads, int64_t* bad) {
    const Plan& plan = *reinterpret_cast<Plan*>(handle);
    const Shape& s = plan.shape;
    if (dtype != TF_F32 && dtype != TF_BF16 && dtype != TF_F16) return TF_BAD_DTYPE;
    const auto source = [=](int64_t index) { return Source{tensors[index], dtype, index}; };
    const int64_t LAYER = 12, FIRST = 5;
    const auto job = [&](int64_t number) -> Job {  // of matrix `number`: the two ends, then four a layer
        if (number == 0) return {&plan.in, source(0), source(1), {nullptr, s.C}, s.D};
        if (number == 1) return {&plan.out, source(3), source(4), {nullptr, s.out}, s.C};
        const int64_t l = (number - 2) / 4, at = FIRST + LAYER * l;
        const Layer& layer = plan.layers[l];
        switch ((number - 2) % 4) {
            case 0: return {&layer.qkv, source(at + 2), source(at + 3), {&s, 3 * s.C}, s.C};
            case 1: return {&layer.proj, source(at + 4), source(at + 5), {nullptr, s.C}, s.C};
            case 2: return {&layer.fc1, source(at + 8), source(at + 9), {nullptr, s.F}, s.C};
            default: return {&layer.fc2, source(at + 10), source(at + 11), {nullptr, s.C}, s.F};
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
    // Items are the panels of one layer; the ends count as a layer of their own. An item finds its matrix by counting.
    const int64_t qkv = s.groups * s.group_panels, proj = panels(s.C), fc1 = panels(s.F), fc2 = panels(s.C);
    const int64_t in = panels(s.C), out = panels(s.out), layer = qkv + proj + fc1 + fc2;
    parallel_for(threads, in + out + s.L * layer, [&](int64_t item) {
        if (item < in) return note(pack_panel(job(0), item));
        if ((item -= in) < out) return note(pack_panel(job(1), item));
        item -= out;
        const int64_t first = 2 + item / layer * 4;
        item %= layer;
        if (item < qkv) return note(pack_panel(job(first), item));
        if ((item -= qkv) < proj) return note(pack_panel(job(first + 1), item));
        if ((item -= proj) < fc1) return note(pack_panel(job(first + 2), item));
        note(pack_panel(job(first + 3), item - fc1));
    });
    *bad = found;
    return found >= 0 ? TF_NOT_FINITE : TF_OK;
}

}  // namespace tf::TF_ISA
