#include "workspace.h"

#include "attention.h"

namespace tf::TF_ISA {
namespace {

void place(Arena& arena, Workspace& w) {
    const Shape& s = w.shape;
    const Bytes rows = Bytes{w.rows, false} * w.window;
    const int64_t operand = s.operand_bytes(), block = rows.bad || rows.value > ROW_BLOCK ? ROW_BLOCK : rows.value;
    const int64_t widest = stride(s.C > s.D ? s.C : s.D);
    w.scratch = arena.take<Scratch>(int64_t(w.threads));
    w.header = arena.used.value;
    w.h = arena.take<float>(rows * stride(s.C));
    w.q = arena.take<float>(rows * stride(s.H * s.Ep));
    w.mixed = arena.take<char>(rows * stride(s.C) * operand);
    w.hidden = arena.take<char>(rows * stride(s.F) * operand);
    w.ab = arena.take<float>(rows * stride(s.out));
    const int64_t few = rows.bad || rows.value > PART_ROWS ? PART_ROWS : rows.value;
    for (float*& sums : w.sums) sums = arena.take<float>(s.parts * few * stride(s.C));
    w.cache = arena.take<char>(Bytes{s.L, false} * w.rows * s.H * s.Tp * (2 * s.Ep) * s.cache_bytes());
    Scratch counted;
    for (int t = 0; t < w.threads; ++t) {
        Scratch& scratch = arena.base ? w.scratch[t] : counted;
        scratch.operands = arena.take<float>(Bytes{block, false} * widest);
        scratch.y = arena.take<float>(2 * block * PANEL);
        scratch.h = arena.take<float>(few * stride(s.C));
        scratch.attention = arena.take<float>(attention_scratch(w.window, s.Ep, s.Tp));
        arena.take<char>(
            int64_t(128));  // so no two threads share a cache line, nor the pair of lines that a processor fetches
    }
}

bool describe(const tf_block* block, int64_t rows, int64_t window, int threads, Workspace* w) {
    if (!make_shape(*block, &w->shape) || rows < 1 || window < 1 || window > block->tokens) return false;
    if (threads < 1 || threads > 4096 || rows >= int64_t(1) << 31) return false;
    w->rows = rows, w->window = window, w->threads = threads;
    return true;
}

}  // namespace

int64_t workspace_bytes(const tf_block* block, int64_t rows, int64_t window, int threads) {
    Workspace w = {};
    if (!describe(block, rows, window, threads, &w)) return -1;
    Arena arena;
    arena.take<Workspace>(int64_t(1));
    place(arena, w);
    return arena.used.bad ? -1 : arena.used.value;
}

int workspace_create(const tf_block* block, int64_t rows, int64_t window, int threads, tf_workspace** out) {
    const int64_t bytes = workspace_bytes(block, rows, window, threads);
    if (bytes < 0) return TF_BAD_SIZE;
    void* memory = allocate(bytes);
    if (!memory) return TF_NO_MEMORY;
    Arena arena;
    arena.base = static_cast<char*>(memory);
    Workspace* w = arena.take<Workspace>(int64_t(1));
    describe(block, rows, window, threads, w);
    w->memory = memory, w->bytes = bytes;
    place(arena, *w);
    *out = reinterpret_cast<tf_workspace*>(w);
    return TF_OK;
}

bool fits(const Shape& s, const Workspace& w, int64_t rows, int64_t window) {
    const Shape& o = w.shape;
    return s.T == o.T && s.D == o.D && s.C == o.C && s.L == o.L && s.E == o.E && s.F == o.F &&
           s.transform == o.transform && s.precision == o.precision && rows <= w.rows && window <= w.window;
}

int workspace_rest(tf_workspace* workspace) {
    const Workspace* w = reinterpret_cast<Workspace*>(workspace);
    return rest(w->memory, w->header, w->bytes);
}

void workspace_destroy(tf_workspace* workspace) {
    const Workspace* w = reinterpret_cast<Workspace*>(workspace);
    if (w) release(w->memory, w->bytes);
}

}  // namespace tf::TF_ISA
