// The inverse of a block by windows: many tokens of a row in a pass, each tested against its own equation. The loop is
// that of tarflow_fast/solvers/windows.py, for rows that move on by themselves, and it has the bits of that loop.
#include <initializer_list>

#include "guided.h"
#include "run.h"

namespace tf::TF_ISA {

decltype(::tf_pass) pass;  // pass.cpp

namespace {

// First values of a token that enters the window: as if the parameters of the last final token were its own.
typedef void (*Guess)(const Shape& s, const float* z, const float* parameters, float* x);

template <class Transform>
void guess(const Shape& s, const float* z, const float* parameters, float* x) {
    Guided<Transform::PARTS> those(s, 0, 0);  // they are guided already
    those.take(parameters);
    Transform::inverse(z, those, s.D, x);
}

struct Job {
    const Plan& plan;
    Workspace& space;
    const tf_inversion& in;
    tf_windows& state;
    int64_t share;  // engine rows of a batch row
    Guess guess;    // for the block's transform

    int64_t last() const { return plan.shape.T - 1; }
    int64_t token(int64_t i) const { return in.order ? in.order[i] : i; }
    float* x(int64_t b, int64_t i) const { return in.x + (b * plan.shape.T + token(i)) * plan.shape.D; }
    const float* z(int64_t b, int64_t i) const { return in.z + (b * plan.shape.T + token(i)) * plan.shape.D; }
    // The next unfinished row from b on, or `batch`.
    int64_t unfinished(int64_t b) const {
        while (b < in.batch && state.rows[b].final_place == last()) ++b;
        return b;
    }
};

// The rows of one native pass, gathered from the batch. It has room for the most rows and tokens that a call takes.
struct Gathered {
    int64_t *rows, *positions, *labels;  // rows: their numbers in the batch
    float *tokens, *z, *x, *ab, *query_scale, *guidance;
    double* log_det;
};

Gathered place(Arena& arena, const Job& job, int64_t window) {
    const Shape& s = job.plan.shape;
    const int64_t B = job.in.batch, share = job.share, fit = job.state.call_tokens / share, one = fit < 1 ? 1 : fit;
    const int64_t rows = B < one ? B : one;
    Bytes tokens = Bytes{B, false} * window;
    if (tokens.bad || tokens.value > one) tokens = Bytes{window > one ? window : one, false};
    Gathered g;
    for (int64_t** each : {&g.rows, &g.positions, &g.labels}) *each = arena.take<int64_t>(rows);
    for (float** each : {&g.tokens, &g.z, &g.x}) *each = arena.take<float>(tokens * s.D);
    g.ab = arena.take<float>(tokens * share * s.out);
    g.query_scale = arena.take<float>(rows * share);
    g.guidance = arena.take<float>(rows);
    g.log_det = arena.take<double>(tokens);
    return g;
}

bool all_finite(const float* x, int64_t D) {
    for (int64_t d = 0; d < D; ++d)
        if (!(fabsf(x[d]) <= __FLT_MAX__)) return false;
    return true;
}

// The largest |v - u|, NaN where one is.
float distance(const float* v, const float* u, int64_t D) {
    float most = 0.0f;
    for (int64_t d = 0; d < D; ++d) {
        const float each = fabsf(v[d] - u[d]);
        if (!(each <= most)) most = each;
        if (most != most) break;
    }
    return most;
}

// Takes what a pass over W tokens of row b from `begin` on gave. Returns how many tokens became final.
int64_t advance(const Job& job, int64_t b, int64_t begin, int64_t W, const float* v, const double* log_det,
                const float* parameters) {
    const Shape& s = job.plan.shape;
    tf_window_row& row = job.state.rows[b];
    const int64_t old = row.final_place, end = begin + W, last = job.last(), window = job.state.window;
    const bool slow = old < row.alone;
    // So many tokens keep the value that was tested. The last one was no input of the pass.
    int64_t kept = old - begin;
    while (!slow && !row.lost && kept < W - 1) {
        const float *now = v + kept * s.D, *tested = job.x(b, begin + 1 + kept);
        const float moved = distance(now, tested, s.D);
        if (job.state.tolerance == 0.0f ? memcmp(now, tested, size_t(s.D) * sizeof(float)) != 0
                                        : !(moved <= job.state.tolerance))
            break;
        float& residual = job.state.residual[b];
        if (!(moved <= residual)) residual = moved;
        ++kept;
    }
    for (int64_t w = kept; w < W; ++w) memcpy(job.x(b, begin + 1 + w), v + w * s.D, size_t(s.D) * sizeof(float));
    int64_t now = begin + 1 + kept < end ? begin + 1 + kept : end;
    if (row.lost && !slow) now = end;
    for (int64_t i = old; i < now; ++i) job.in.log_det[b] += log_det[i - begin];
    row.final_place = now;
    if (!all_finite(job.x(b, now), s.D)) row.lost = 1;
    // Guesses of the tokens that the next window may reach, if there is no draft of them, and again of those whose
    // values overflowed.
    const float* latest = parameters + (now - 1 - begin) * s.out;
    for (int64_t i = now + 1; i <= last && i <= end + window; ++i)
        if ((!job.state.drafted && (i > end || slow)) || !all_finite(job.x(b, i), s.D)) job.guess(s, job.z(b, i), latest, job.x(b, i));
    row.idle = old == begin && now == old + 1 ? row.idle + (!slow && W > 1) : 0;
    if (row.idle >= window && now < last && W > 1) ++row.fallbacks, row.idle = 0, row.alone = now + window;
    return now - old;
}

// Chooses how many tokens of each row the next pass takes: one while all rows are in windows that are solved one token
// after another.
void begin_pass(const Job& job) {
    tf_windows& state = job.state;
    state.width = 1, state.next = 0;
    for (int64_t b = job.unfinished(0); b < job.in.batch; b = job.unfinished(b + 1))
        if (state.rows[b].final_place >= state.rows[b].alone)
            state.width = state.window < job.last() ? state.window : job.last();
}

// One native pass: over all unfinished rows of the pass that is under way, or over some of them where they are many.
int run_some(const Job& job, const Gathered& g, int threads) {
    const Shape& s = job.plan.shape;
    tf_windows& state = job.state;
    const int64_t W = state.width, share = job.share, fit = state.call_tokens / (W * share), most = fit < 1 ? 1 : fit;
    int64_t left = 0, n = 0;
    for (int64_t b = job.unfinished(state.next); b < job.in.batch; b = job.unfinished(b + 1)) ++left;
    const int64_t calls = (left + most - 1) / most, take = (left + calls - 1) / calls;
    for (int64_t b = job.unfinished(state.next); n < take; b = job.unfinished(b + 1), ++n) {
        const int64_t place = state.rows[b].final_place;
        // A window that would reach past the end begins earlier, with tokens that are final.
        const int64_t begin = place < job.last() - W ? place : job.last() - W;
        g.rows[n] = b, g.positions[n] = begin;
        for (int64_t w = 0; w < W; ++w) {
            memcpy(g.tokens + (n * W + w) * s.D, job.x(b, begin + w), size_t(s.D) * sizeof(float));
            memcpy(g.z + (n * W + w) * s.D, job.z(b, begin + w + 1), size_t(s.D) * sizeof(float));
        }
        if (job.in.labels) g.labels[n] = job.in.labels[b];
        if (job.in.guidance) g.guidance[n] = job.in.guidance[b];
        for (int64_t k = 0; job.in.query_scale && k < share; ++k)
            g.query_scale[n * share + k] = job.in.query_scale[b * share + k];
    }
    tf_pass_arguments call = {};
    call.tokens = g.tokens, call.z = g.z, call.x = g.x, call.log_det = g.log_det, call.ab = g.ab;
    call.positions = g.positions, call.slots = g.rows, call.order = job.in.order;
    call.labels = job.in.labels ? g.labels : nullptr, call.guidance = job.in.guidance ? g.guidance : nullptr;
    call.query_scale = job.in.query_scale ? g.query_scale : nullptr;
    call.rows = n * share, call.window = W, call.split = job.in.split, call.guided = share == 2;
    call.guided_parts = job.in.guided_parts, call.annealed = job.in.annealed;
    const int status = pass(reinterpret_cast<const tf_plan*>(&job.plan), reinterpret_cast<tf_workspace*>(&job.space),
                            &call, threads);
    if (status != TF_OK) return status;
    for (int64_t k = 0; k < n; ++k) {
        const int64_t b = g.rows[k], first = k * W;
        const int64_t gained = advance(job, b, g.positions[k], W, g.x + first * s.D, g.log_det + first,
                                       g.ab + k * share * W * s.out);
        state.accepted[state.passes * job.in.batch + b] = gained;
        state.solved += gained;
    }
    state.work += n * W, state.next = g.rows[n - 1] + 1;
    if (job.unfinished(state.next) == job.in.batch) ++state.passes, state.single += W == 1, state.width = 0;
    return TF_OK;
}

// Writes what the first pass starts from.
void start(const Job& job) {
    const Shape& s = job.plan.shape;
    const int64_t B = job.in.batch;
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t i = 0; i < s.T; ++i)
            if (i == 0 || !job.state.drafted || !all_finite(job.x(b, i), s.D))
                memcpy(job.x(b, i), job.z(b, i), size_t(s.D) * sizeof(float));
        job.in.log_det[b] = 0.0, job.state.residual[b] = 0.0f;
        job.state.rows[b] = {};
        job.state.rows[b].lost = !all_finite(job.x(b, 0), s.D);
    }
}

}  // namespace

int invert_windows(const tf_plan* plan_handle, tf_workspace* workspace, const tf_inversion* in, tf_windows* state,
                   double limit, int threads) {
    const Plan& plan = *reinterpret_cast<const Plan*>(plan_handle);
    Workspace& space = *reinterpret_cast<Workspace*>(workspace);
    const Shape& s = plan.shape;
    const Guess guess_of =
        with_transform(s.transform, [](auto transform) -> Guess { return guess<decltype(transform)>; });
    const Job job = {plan, space, *in, *state, in->guidance ? 2 : 1, guess_of};
    const int64_t B = in->batch, most = state->window < job.last() ? state->window : job.last();
    if (B < 1 || state->window < 1 || !fits(s, space, B * job.share, most)) return TF_BAD_SIZE;
    if (!are_places(s, in->order)) return TF_BAD_SIZE;
    if (!are_labels(s, in->labels, B)) return TF_BAD_LABEL;
    for (int64_t b = 0; b < B && state->solved; ++b)
        if (state->rows[b].final_place < 0 || state->rows[b].final_place > job.last()) return TF_BAD_SIZE;
    const bool fresh = state->passes == 0 && state->width == 0;
    if (fresh) start(job);
    if (state->solved == B * job.last()) return TF_OK;
    Arena arena;
    place(arena, job, most);
    if (arena.used.bad) return TF_BAD_SIZE;
    const int64_t bytes = arena.used.value;
    arena = {};
    arena.base = static_cast<char*>(allocate(bytes));
    if (!arena.base) return TF_NO_MEMORY;
    const Gathered g = place(arena, job, most);
    const double begin = seconds();
    int status = TF_OK;
    do {
        if (!state->width) begin_pass(job);
        status = run_some(job, g, threads);
    } while (status == TF_OK && state->solved < B * job.last() && seconds() - begin < limit);
    release(arena.base, bytes);
    return status;
}

}  // namespace tf::TF_ISA
