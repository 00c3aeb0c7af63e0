// What one thread of a team does in each stage of a pass, which takes W tokens of each row through the net. Threads own
// columns and meet at the end of a stage, so that the next stage may read what any thread wrote. Or they share sums
// (Pass::by_parts) and meet only over these. project_out leaves the meeting to its caller. A team of one owns
// everything.
#pragma once
#include "../gelu.h"
#include "attention.h"
#include "norm.h"
#include "plan.h"
#include "team.h"
#include "workspace.h"

namespace tf::TF_ISA {
namespace {

// The tokens that a pass starts from, rows of D floats. One row of them serves `share` engine rows (2 under guidance):
// the first takes the label of the row, and the second takes none.
struct Tokens {
    const float* base;
    int64_t row_stride, token_stride, share;
    const int64_t* labels;  // of each row, negative for none; nullptr: no row has one

    const float* at(int64_t row, int64_t token) const { return base + row / share * row_stride + token * token_stride; }
    const float* class_embedding(const Plan& plan, int64_t row) const {
        const int64_t label = labels && row % share == 0 ? labels[row / share] : -1;
        return plan.classes + (label < 0 ? 0 : 1 + label) * plan.shape.C;
    }
};

// Whether the labels of n rows, where there are any, are below the number of classes.
inline bool are_labels(const Shape& s, const int64_t* labels, int64_t n) {
    for (int64_t row = 0; labels && s.classes && row < n; ++row)
        if (labels[row] >= s.classes) return false;
    return true;
}

// Whether an order, where there is one, holds places of tokens and nothing else.
inline bool are_places(const Shape& s, const int32_t* order) {
    for (int64_t i = 0; order && i < s.T; ++i)
        if (order[i] < 0 || order[i] >= s.T) return false;
    return true;
}

// Weights of so many bytes are read in little more time than a meeting takes.
constexpr int64_t SMALL_PLAN = int64_t(8) << 20;

// Whether a team shares sums (Pass::by_parts) for so many activation rows. Measured on two threads of a Zen 5 with one
// row through 4 layers of C 128 in bf16: 10 us with shared sums, 11 without. While the two cores were far apart: 17 and
// 21. At C 256 in fp32, which is 12 MB of weights, nothing is gained.
inline bool share_sums(const Plan& plan, const Team& team, int64_t rows) {
    return team.size > 1 && team.size <= plan.shape.parts && rows <= PART_ROWS && plan.bytes <= SMALL_PLAN;
}

// A pass as one thread sees it. The constructor's caller sets what has a default.
struct Pass {
    const Plan& plan;
    Workspace& space;
    const Scratch& scratch;  // of this thread
    const Team team;
    const Range rows;      // engine rows of this team
    const int64_t window;  // W, the tokens of each row
    // Threads share the sums over the inputs of proj and fc2 rather than their columns: each multiplies what it has
    // made itself, and keeps all of h. This takes two meetings a layer instead of four. It is for few rows, whose sums
    // are few.
    const bool by_parts;
    float* const h;                      // [m][stride(C)]
    Clock* const clock;                  // of this thread
    int64_t position = 0;                // of the first token of the window, in net order
    const int64_t* positions = nullptr;  // of each unit of rows; nullptr: `position` for all
    const int64_t* slots = nullptr;      // the unit of the cache in which each unit of rows is kept; nullptr: their own
    int64_t unit = 1;                    // rows of a unit: 2 under guidance
    const float* query_scale = nullptr;  // [R]: 1 over the temperature of the row; nullptr stands for 1
    const int32_t* order = nullptr;      // [T]: the row of pos_embed of the i-th token that the net sees; nullptr: i

    Pass(const Plan& plan, Workspace& space, const Member& member, int64_t window, Clock* clock)
        : plan(plan),
          space(space),
          scratch(space.scratch[member.thread]),
          team(member.team),
          rows(member.rows),
          window(window),
          by_parts(share_sums(plan, team, rows.size() * window)),
          h(by_parts ? scratch.h : space.h),
          clock(clock) {}

    // Returns when all threads of the team have come here.
    void meet() const {
        team.barrier->wait(team.rank, team.size);
        clock->mark(TF_PART_WAIT);
    }
    // The share of n groups or panels, cut as the parts of a sum are, that belongs to this thread's parts.
    Range in_my_parts(int64_t n) const {
        const Range parts = team.mine(plan.shape.parts);
        return {share(n, parts.begin, plan.shape.parts).begin, share(n, parts.end - 1, plan.shape.parts).end};
    }
    int64_t row_of(int64_t m) const { return window == 1 ? m : m / window; }
    int64_t position_of(int64_t row) const { return positions ? positions[row / unit] : position; }
    int64_t kept_at(int64_t row) const { return slots ? slots[row / unit] * unit + row % unit : row; }
};

template <class Precision>
struct Stages {
    typedef typename Precision::Operand Operand;
    typedef typename Precision::Cache Cache;
    typedef typename QueryOf<Cache>::Type Query;

    // Multiplies panels `mine` of m with the activation rows of the team, a block of rows at a time. load(begin, end)
    // gives the operands of a block, of the matrix's kind, and done(tile) takes the results.
    template <class Load, class Done>
    static void product(const Pass& p, const Matrix& m, Range mine, int64_t operand_stride, Load load, Done done,
                        int64_t part = ALL) {
        if (mine.size() <= 0) return;
        const int64_t first = p.rows.begin * p.window, count = p.rows.size() * p.window;
        const int64_t blocks = (count + ROW_BLOCK - 1) / ROW_BLOCK;
        Product work = {};
        work.matrix = &m, work.stride = operand_stride;
        work.first = mine.begin, work.last = mine.end, work.part = part;
        work.y = p.scratch.y, work.context = &done;
        work.finish = [](void* context, const Tile& tile) { (*static_cast<Done*>(context))(tile); };
        for (int64_t b = 0; b < blocks; ++b) {
            const Range block = share(count, b, blocks);
            work.row = first + block.begin, work.rows = block.size();
            work.operands = load(work.row, work.row + work.rows);
            matmul(work);
        }
    }

    // Calls f(y, m, column, n) for every LANES columns of every row of a tile of a matrix with `width` columns. n <
    // LANES at the ragged end.
    template <class Function>
    static void each(const Tile& tile, int64_t width, Function f) {
        const int64_t first = tile.panel * PANEL, end = width - first < PANEL ? width - first : PANEL;
        for (int64_t r = 0; r < tile.rows; ++r) {
            const float* y = tile.y + r * PANEL;
            int64_t c = 0;
            for (; c + LANES <= end; c += LANES) f(load(y + c), tile.row + r, first + c, LANES);
            if (c < end) f(load(y + c), tile.row + r, first + c, int(end - c));
        }
    }

    static Operand* normalised(const Pass& p, const Norm& norm, int64_t begin, int64_t end) {
        const int64_t C = p.plan.shape.C;
        Operand* y = static_cast<Operand*>(p.scratch.operands);
        for (int64_t m = begin; m < end; ++m) {
            Operand* row = y + (m - begin) * stride(C);
            layer_norm(p.h + m * stride(C), norm.gain, norm.shift, C, row);
            store(row + C, zero(), 1);  // when C is odd this is the second of the last pair
        }
        return y;
    }

    // h = proj_in(token) + pos_embed + class_embed
    static void embed(const Pass& p, const Tokens& tokens) {
        const Shape& s = p.plan.shape;
        float* y = static_cast<float*>(p.scratch.operands);
        const auto load_tokens = [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) {
                const int64_t row = p.row_of(m);
                memcpy(y + (m - begin) * stride(s.D), tokens.at(row, m - row * p.window), size_t(s.D) * sizeof(float));
            }
            return y;
        };
        const Range mine = p.by_parts ? Range{0, panels(s.C)} : p.team.mine(panels(s.C));
        product(p, p.plan.in, mine, stride(s.D), load_tokens, [&](const Tile& tile) {
            each(tile, s.C, [&](vf y, int64_t m, int64_t c, int n) {
                const int64_t row = p.row_of(m), at = p.position_of(row) + m - row * p.window;
                const float* pos = p.plan.pos + (p.order ? p.order[at] : at) * s.C;
                y += load_part(pos + c, n);
                if (s.classes) y += load_part(tokens.class_embedding(p.plan, row) + c, n);
                float* h = p.h + m * stride(s.C) + c;
                n == LANES ? store(h, y) : store(h, y, n);
            });
        });
        p.clock->mark(TF_PART_IN);
        if (!p.by_parts) p.meet();
    }

    static Cache* keys(const Pass& p, int64_t layer, int64_t row, int64_t head) {
        const Shape& s = p.plan.shape;
        const int64_t at = layer * p.space.rows + p.kept_at(row);
        return static_cast<Cache*>(p.space.cache) + (at * s.H + head) * (s.Tp * 2 * s.Ep);
    }

    // Takes a tile of qkv: it scales and keeps queries, and appends keys and values to the cache in place. Where the
    // first 16 columns belong is computed once a tile, by division, and counted on from there.
    static void scatter(const Pass& p, int64_t layer, const Tile& tile) {
        const Shape& s = p.plan.shape;
        const float logits = 1.0f / sqrtf(float(s.E));
        const int64_t group = tile.panel / s.group_panels, first = (tile.panel - group * s.group_panels) * PANEL / s.Ep;
        int64_t e = (tile.panel - group * s.group_panels) * PANEL - first * s.Ep;
        int64_t which = first % 3, in_group = first / 3;
        for (int64_t chunk = 0; chunk < PANEL; chunk += 16, e += 16) {
            if (e == s.Ep) e = 0, ++which;
            if (which == 3) which = 0, ++in_group;
            const int64_t head = group * s.group + in_group;
            if (in_group >= s.group || head >= s.H) return;
            for (int64_t r = 0; r < tile.rows; ++r) {
                const int64_t m = tile.row + r, row = p.row_of(m), t = p.position_of(row) + m - row * p.window;
                const float* y = tile.y + r * PANEL + chunk;
                if (which == 0) {
                    const float factor = p.query_scale ? logits * p.query_scale[row] : logits;
                    Query* q = static_cast<Query*>(p.space.q) + m * stride(s.H * s.Ep) + head * s.Ep + e;
                    store_query<Cache>(q, y, factor);
                } else if (which == 1) {
                    store_key(keys(p, layer, row, head), s.Ep, e, t, y);
                } else {
                    Cache* values = keys(p, layer, row, head) + s.Tp * s.Ep;
                    for (int k = 0; k < 16; k += LANES) store_value(values, s.Ep, e + k, t, load(y + k));
                }
            }
        }
    }

    // All queries of one (row, head).
    static void attend_one(const Pass& p, int64_t layer, int64_t row, int64_t head) {
        const Shape& s = p.plan.shape;
        const int64_t m = row * p.window;
        Attention<Query, Cache, Operand> job = {};
        job.E = s.E, job.Ep = s.Ep, job.Tp = s.Tp;
        job.queries = p.window, job.position = p.position_of(row);
        job.q_stride = stride(s.H * s.Ep);
        job.q = static_cast<const Query*>(p.space.q) + m * job.q_stride + head * s.Ep;
        job.keys = keys(p, layer, row, head), job.values = job.keys + s.Tp * s.Ep;
        job.out_stride = stride(s.C);
        job.out = static_cast<Operand*>(p.space.mixed) + m * job.out_stride + head * s.E;
        job.scratch = p.scratch.attention;
        attend(job);
    }

    static void attention(const Pass& p, int64_t layer) {
        const Shape& s = p.plan.shape;
        const Layer& weights = p.plan.layers[layer];
        const auto load_rows = [&](int64_t begin, int64_t end) { return normalised(p, weights.norm1, begin, end); };
        const auto done = [&](const Tile& tile) { scatter(p, layer, tile); };
        if (p.by_parts || s.groups % p.team.size == 0) {  // this thread has its own heads from end to end
            const Range groups = p.by_parts ? p.in_my_parts(s.groups) : p.team.mine(s.groups);
            product(p, weights.qkv, {groups.begin * s.group_panels, groups.end * s.group_panels}, stride(s.C),
                    load_rows, done);
            p.clock->mark(TF_PART_QKV);
            for (int64_t row = p.rows.begin; row < p.rows.end; ++row)
                for (int64_t head = groups.begin * s.group; head < groups.end * s.group && head < s.H; ++head)
                    attend_one(p, layer, row, head);
        } else {
            product(p, weights.qkv, p.team.mine(s.groups * s.group_panels), stride(s.C), load_rows, done);
            p.clock->mark(TF_PART_QKV);
            p.meet();
            const Range items = p.team.mine(p.rows.size() * s.H);
            for (int64_t item = items.begin; item < items.end; ++item)
                attend_one(p, layer, p.rows.begin + item / s.H, item % s.H);
        }
        p.clock->mark(TF_PART_ATTENTION);
        if (!p.by_parts) p.meet();
    }

    // h += a matrix times stored operands.
    static void residual(const Pass& p, const Matrix& matrix, const void* operands, int64_t operand_stride, int part) {
        const Shape& s = p.plan.shape;
        const Operand* a = static_cast<const Operand*>(operands);
        const auto load_rows = [&](int64_t begin, int64_t) { return a + begin * operand_stride; };
        if (p.by_parts) return residual_by_parts(p, matrix, load_rows, operand_stride, part);
        product(p, matrix, p.team.mine(panels(s.C)), operand_stride, load_rows, [&](const Tile& tile) {
            each(tile, s.C, [&](vf y, int64_t m, int64_t c, int n) {
                float* h = p.h + m * stride(s.C) + c;
                n == LANES ? store(h, load(h) + y) : store(h, load(h, n) + y, n);
            });
        });
        p.clock->mark(part);
        p.meet();
    }

    // Computes this thread's parts of the sums and, after the meeting, adds all parts in the order of `matmul`. The
    // sums of proj are overwritten only after all threads have met over the sums of fc2, and the other way round.
    template <class Load>
    static void residual_by_parts(const Pass& p, const Matrix& matrix, Load load_rows, int64_t operand_stride,
                                  int part) {
        const Shape& s = p.plan.shape;
        float* sums = p.space.sums[part == TF_PART_FC2];
        const Range mine = p.team.mine(s.parts);
        const int64_t rows = p.rows.size() * p.window, each_part = rows * stride(s.C);
        for (int64_t number = mine.begin; number < mine.end; ++number)
            product(
                p, matrix, {0, panels(s.C)}, operand_stride, load_rows,
                [&](const Tile& tile) {
                    each(tile, s.C, [&](vf y, int64_t m, int64_t c, int n) {
                        float* sum = sums + number * each_part + m * stride(s.C) + c;
                        n == LANES ? store(sum, y) : store(sum, y, n);
                    });
                },
                number);
        p.clock->mark(part);
        p.meet();
        for (int64_t m = 0; m < rows; ++m)
            store_row(p.h + m * stride(s.C), s.C, [&](int64_t c, int n) {
                const float* at = sums + m * stride(s.C) + c;
                vf y = load_part(at, n);
                for (int64_t number = 1; number < s.parts; ++number) y += load_part(at + number * each_part, n);
                if (matrix.scale) y = y * load(matrix.scale + c);
                return load_part(p.h + m * stride(s.C) + c, n) + (y + load(matrix.bias + c));
            });
        p.clock->mark(part);
    }

    static void layer(const Pass& p, int64_t number) {
        const Shape& s = p.plan.shape;
        const Layer& weights = p.plan.layers[number];
        attention(p, number);
        residual(p, weights.proj, p.space.mixed, stride(s.C), TF_PART_PROJ);
        product(
            p, weights.fc1, p.by_parts ? p.in_my_parts(panels(s.F)) : p.team.mine(panels(s.F)), stride(s.C),
            [&](int64_t begin, int64_t end) { return normalised(p, weights.norm2, begin, end); },
            [&](const Tile& tile) {
                each(tile, s.F, [&](vf y, int64_t m, int64_t c, int n) {
                    Operand* hidden = static_cast<Operand*>(p.space.hidden) + m * stride(s.F) + c;
                    n == LANES ? store(hidden, gelu(y)) : store(hidden, gelu(y), n);
                });
            });
        p.clock->mark(TF_PART_FC1);
        if (!p.by_parts) p.meet();
        residual(p, weights.fc2, p.space.hidden, stride(s.F), TF_PART_FC2);
    }

    // ab = proj_out(h). The team has yet to meet over it.
    static void project_out(const Pass& p) {
        const Shape& s = p.plan.shape;
        const auto load_rows = [&](int64_t begin, int64_t) { return p.h + begin * stride(s.C); };
        product(p, p.plan.out, p.team.mine(panels(s.out)), stride(s.C), load_rows, [&](const Tile& tile) {
            each(tile, s.out, [&](vf y, int64_t m, int64_t c, int n) {
                float* ab = p.space.ab + m * stride(s.out) + c;
                n == LANES ? store(ab, y) : store(ab, y, n);
            });
        });
        p.clock->mark(TF_PART_OUT);
    }
};

}  // namespace
}  // namespace tf::TF_ISA
