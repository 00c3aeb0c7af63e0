// The inverse of a block, one token after another:  x_0 = z_0;  x_{i+1} = transform(z_{i+1}, parameters of token i).
//
// Work is counted in stages, L + 2 for a token (embed, the layers, the tail), so that a run can stop and go on between
// any two of them.
#include "guided.h"
#include "run.h"

namespace tf::TF_ISA {
namespace {

struct Job;

// Finds the token that follows token i, of the batch rows `rows`, and adds their share of the log-det.
typedef void (*Update)(const Job& job, Range rows, int64_t i);

struct Job {
    const Plan& plan;
    Workspace& space;
    const tf_inversion& in;
    int64_t share;  // engine rows of a batch row: the conditional one and, under guidance, the unguided one after it
    Update update;  // for the block's transform

    int64_t token(int64_t i) const { return in.order ? in.order[i] : i; }
    float* x(int64_t b, int64_t i) const { return in.x + (b * plan.shape.T + token(i)) * plan.shape.D; }
    const float* z(int64_t b, int64_t i) const { return in.z + (b * plan.shape.T + token(i)) * plan.shape.D; }
};

template <class Transform>
void update(const Job& job, Range rows, int64_t i) {
    const Shape& s = job.plan.shape;
    Guided<Transform::PARTS> parameters(s, job.in.guided_parts, job.in.annealed);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
        const float* own = job.space.ab + b * job.share * stride(s.out);
        if (job.share == 2)
            parameters.take(own, own + stride(s.out), job.in.guidance[b], i);
        else
            parameters.take(own);
        job.in.log_det[b] += Transform::inverse(job.z(b, i + 1), parameters, s.D, job.x(b, i + 1));
    }
}

template <class Precision>
void run_stage(const Job& job, const Pass& p, int64_t stage) {
    const int64_t stages = p.plan.shape.L + 2, number = stage % stages;
    const Shape& s = p.plan.shape;
    if (number == 0) {
        const Tokens tokens = {job.x(0, p.position), s.T * s.D, 0, job.share, job.in.labels};
        Stages<Precision>::embed(p, tokens);
    } else if (number <= s.L) {
        Stages<Precision>::layer(p, number - 1);
    } else {
        Stages<Precision>::project_out(p);
        Range mine = p.team.mine(p.rows.size() / job.share);
        // The thread that made the one panel updates all rows, which saves a meeting.
        if (p.by_parts && panels(s.out) == 1)
            mine = {0, p.team.mine(1).size() * (p.rows.size() / job.share)};
        else
            p.meet();
        const int64_t first = p.rows.begin / job.share;
        job.update(job, {first + mine.begin, first + mine.end}, p.position);
        p.clock->mark(TF_PART_UPDATE);
        p.meet();
    }
}

// Threads that share columns meet every few microseconds. A thread that has lost its core to another program stops them
// all for a time slice. When most of CROWDED seconds went into such waits, one thread goes on alone for ALONE seconds;
// the bits are the same. A shorter CROWDED would mistake the waking of an idle core, which takes up to milliseconds on
// a virtual machine, for a crowd.
constexpr double CROWDED = 0.05, ALONE = 0.5;

void note_waits(Workspace& space, double elapsed, double waited) {
    space.met += elapsed, space.waited += waited;
    if (space.met < CROWDED) return;
    if (space.waited > 0.6 * space.met) space.alone_until = seconds() + ALONE;
    space.met = space.waited = 0.0;
}

// Runs from *stage until `limit` seconds have passed or the end is reached.
template <class Precision>
void run(const Job& job, int64_t* stage, int64_t end, double limit, int threads) {
    const tf_inversion& in = job.in;
    const int64_t stages = job.plan.shape.L + 2, begin = *stage;
    const bool by_rows = rows_over_threads(job.plan, in.batch * job.share, in.batch, threads, in.split);
    const double start = seconds();
    if (!by_rows && in.split == TF_SPLIT_AUTO && start < job.space.alone_until) threads = 1;
    int64_t stop = end;
    if (by_rows) {
        // These threads never meet, so where they stop is settled before they start, by the time that a stage took in
        // the last run.
        const double each = job.space.unit_seconds;
        const int64_t fit = each > 0 ? int64_t(limit / each) : stages;
        stop = begin + (fit < 1 ? 1 : fit);
        if (stop > end) stop = end;
    }
    // Two flags are used in turn, because a slow thread may still read one while the next is written.
    int64_t reached = begin, late[2] = {0, 0};
    double waited = 0.0;
    run_teams(useful_threads(job.plan, threads, by_rows), by_rows, in.batch, job.share, [&](const Member& member) {
        const Team& team = member.team;
        Clock clock(in.clock ? in.clock + member.thread * TF_PARTS : nullptr);
        Pass p(job.plan, job.space, member, 1, &clock);
        p.query_scale = in.query_scale, p.order = in.order;
        const size_t h_bytes = size_t(p.rows.size() * stride(job.plan.shape.C)) * sizeof(float);
        // The run that goes on from here may have another number of threads, so between two runs h is in the workspace.
        if (p.by_parts && begin % stages) memcpy(p.h, job.space.h, h_bytes);
        int64_t checks = 0;
        for (int64_t at = begin; at < stop; ++at) {
            p.position = at / stages;
            // This is decided before the stage's own meetings, so all threads know it after them.
            const bool check = !by_rows && !(p.by_parts && at % stages == 0);
            int64_t* flag = &late[(checks += check) & 1];
            if (check && team.rank == 0) __atomic_store_n(flag, seconds() - start > limit, __ATOMIC_RELEASE);
            run_stage<Precision>(job, p, at);
            if (team.rank == 0 && member.thread == 0) reached = at + 1;
            if (check && __atomic_load_n(flag, __ATOMIC_ACQUIRE)) break;
        }
        if (p.by_parts && team.rank == 0) memcpy(job.space.h, p.h, h_bytes);
        if (team.rank == 0 && team.size > 1)
            waited = 1e-9 * double(__atomic_load_n(&team.barrier->lost, __ATOMIC_RELAXED)) / (team.size - 1);
    });
    const double elapsed = seconds() - start;
    job.space.unit_seconds = elapsed / double(reached - begin);
    if (!by_rows && threads > 1) note_waits(job.space, elapsed, waited);
    *stage = reached;
}

}  // namespace

int invert(const tf_plan* plan_handle, tf_workspace* workspace, const tf_inversion* in, int64_t* stage, double limit,
           int threads) {
    const Plan& plan = *reinterpret_cast<const Plan*>(plan_handle);
    Workspace& space = *reinterpret_cast<Workspace*>(workspace);
    const Shape& s = plan.shape;
    const Update update_of =
        with_transform(s.transform, [](auto transform) -> Update { return update<decltype(transform)>; });
    const Job job = {plan, space, *in, in->guidance ? 2 : 1, update_of};
    const int64_t end = (s.T - 1) * (s.L + 2);
    if (in->batch < 1 || !fits(plan.shape, space, in->batch * job.share, 1) || *stage < 0 || *stage > end)
        return TF_BAD_SIZE;
    if (!are_places(s, in->order)) return TF_BAD_SIZE;
    if (!are_labels(s, in->labels, in->batch)) return TF_BAD_LABEL;
    if (threads > space.threads) threads = space.threads;
    if (*stage == 0)
        for (int64_t b = 0; b < in->batch; ++b) {
            memcpy(job.x(b, 0), job.z(b, 0), size_t(s.D) * sizeof(float));
            in->log_det[b] = 0.0;
        }
    if (*stage == end) return TF_OK;
    switch (s.precision) {
        case TF_PRECISION_FP32:
            run<PrecisionFp32>(job, stage, end, limit, threads);
            break;
        case TF_PRECISION_BF16:
            run<PrecisionBf16>(job, stage, end, limit, threads);
            break;
        default:
            run<PrecisionInt8>(job, stage, end, limit, threads);
    }
    return TF_OK;
}

}  // namespace tf::TF_ISA
