#include "guided.h"
#include "run.h"

namespace tf::TF_ISA {
namespace {

// Finds the tokens that follow, of the batch rows times window `mine`.
template <class Transform>
void update(const Plan& plan, const Workspace& space, const tf_pass_arguments& job, Range mine) {
    const Shape& s = plan.shape;
    Guided<Transform::PARTS> parameters(s, job.guided_parts, job.annealed);
    for (int64_t m = mine.begin; m < mine.end; ++m) {
        const int64_t row = m / job.window, w = m - row * job.window;
        const int64_t i = (job.positions ? job.positions[row] : job.position) + w;
        if (job.guided) {
            const float* own = space.ab + (2 * row * job.window + w) * stride(s.out);
            parameters.take(own, own + job.window * stride(s.out), job.guidance[row], i);
            float* guided = job.ab + (2 * row * job.window + w) * s.out;
            for (int part = 0; part < Transform::PARTS; ++part)
                store_row(guided + part * s.D, s.D, [&](int64_t d, int n) { return parameters.load(part, d, n); });
        } else {
            parameters.take(space.ab + m * stride(s.out));
        }
        job.log_det[m] = Transform::inverse(job.z + m * s.D, parameters, s.D, job.x + m * s.D);
    }
}

typedef void (*Update)(const Plan& plan, const Workspace& space, const tf_pass_arguments& job, Range mine);

template <class Precision>
void run_pass(const Plan& plan, Workspace& space, const tf_pass_arguments& job, int threads) {
    const Shape& s = plan.shape;
    const int64_t share = job.guided ? 2 : 1, source_rows = job.rows / share;
    const Tokens tokens = {job.tokens, job.window * s.D, s.D, share, job.labels};
    const bool by_rows = rows_over_threads(plan, job.rows * job.window, source_rows, threads, job.split);
    const Update update_of =
        with_transform(s.transform, [](auto transform) -> Update { return update<decltype(transform)>; });
    run_teams(useful_threads(plan, threads, by_rows), by_rows, source_rows, share, [&](const Member& member) {
        Clock clock(nullptr);
        Pass p(plan, space, member, job.window, &clock);
        p.position = job.position, p.query_scale = job.query_scale, p.order = job.order;
        p.positions = job.positions, p.slots = job.slots, p.unit = share;
        Stages<Precision>::embed(p, tokens);
        for (int64_t l = 0; l < s.L; ++l) Stages<Precision>::layer(p, l);
        Stages<Precision>::project_out(p);
        p.meet();
        const int64_t first = p.rows.begin * job.window;
        const Range mine = p.team.mine(p.rows.size() * job.window);
        for (int64_t m = first + mine.begin; m < first + mine.end; ++m)
            if (!job.z || !job.guided || m / job.window % 2)  // the others take the guided parameters
                memcpy(job.ab + m * s.out, space.ab + m * stride(s.out), size_t(s.out) * sizeof(float));
        if (!job.z) return;
        const Range found = p.team.mine(p.rows.size() / share * job.window);
        update_of(plan, space, job, {first / share + found.begin, first / share + found.end});
    });
}

// Whether all positions and slots of the rows are in range, and no two rows share a slot.
bool are_in_range(const Plan& plan, const Workspace& space, const tf_pass_arguments& job) {
    const int64_t share = job.guided ? 2 : 1, T = plan.shape.T, last = T - job.window - (job.z ? 1 : 0);
    for (int64_t row = 0; row < job.rows / share; ++row) {
        const int64_t position = job.positions ? job.positions[row] : job.position;
        if (position < 0 || position > last) return false;
        if (!job.slots) continue;
        if (job.slots[row] <= (row ? job.slots[row - 1] : -1) || job.slots[row] >= space.rows / share) return false;
    }
    return true;
}

}  // namespace

int pass(const tf_plan* plan_handle, tf_workspace* workspace, const tf_pass_arguments* job, int threads) {
    const Plan& plan = *reinterpret_cast<const Plan*>(plan_handle);
    Workspace& space = *reinterpret_cast<Workspace*>(workspace);
    if (!fits(plan.shape, space, job->rows, job->window)) return TF_BAD_SIZE;
    if (job->rows < 1 || job->window < 1 || (job->guided && job->rows % 2)) return TF_BAD_SIZE;
    if (!are_in_range(plan, space, *job)) return TF_BAD_SIZE;
    if (!are_places(plan.shape, job->order)) return TF_BAD_SIZE;
    if (!are_labels(plan.shape, job->labels, job->rows / (job->guided ? 2 : 1))) return TF_BAD_LABEL;
    if (threads > space.threads) threads = space.threads;
    switch (plan.shape.precision) {
        case TF_PRECISION_FP32:
            run_pass<PrecisionFp32>(plan, space, *job, threads);
            break;
        case TF_PRECISION_BF16:
            run_pass<PrecisionBf16>(plan, space, *job, threads);
            break;
        default:
            run_pass<PrecisionInt8>(plan, space, *job, threads);
    }
    return TF_OK;
}

}  // namespace tf::TF_ISA
