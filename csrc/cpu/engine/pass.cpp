#include "run.h"

namespace tf::TF_ISA {
namespace {

template <class Precision>
void run_pass(const Plan& plan, Workspace& space, const tf_pass_arguments& job, int threads) {
    const Shape& s = plan.shape;
    const int64_t share = job.guided ? 2 : 1, source_rows = job.rows / share;
    const Tokens tokens = {job.tokens, job.window * s.D, s.D, share, job.labels};
    const bool by_rows = rows_over_threads(plan, job.rows * job.window, source_rows, threads, job.split);
    run_teams(useful_threads(plan, threads, by_rows), by_rows, source_rows, share, [&](const Member& member) {
        Clock clock(nullptr);
        Pass p(plan, space, member, job.window, &clock);
        p.position = job.position, p.query_scale = job.query_scale, p.order = job.order;
        Stages<Precision>::embed(p, tokens);
        for (int64_t l = 0; l < s.L; ++l) Stages<Precision>::layer(p, l);
        Stages<Precision>::project_out(p);
        p.meet();
        const int64_t first = p.rows.begin * job.window;
        const Range mine = p.team.mine(p.rows.size() * job.window);
        for (int64_t m = first + mine.begin; m < first + mine.end; ++m)
            memcpy(job.ab + m * s.out, space.ab + m * stride(s.out), size_t(s.out) * sizeof(float));
    });
}

}  // namespace

int pass(const tf_plan* plan_handle, tf_workspace* workspace, const tf_pass_arguments* job, int threads) {
    const Plan& plan = *reinterpret_cast<const Plan*>(plan_handle);
    Workspace& space = *reinterpret_cast<Workspace*>(workspace);
    if (!fits(plan.shape, space, job->rows, job->window) || job->position < 0 ||
        job->position + job->window > plan.shape.T)
        return TF_BAD_SIZE;
    if (job->rows < 1 || job->window < 1 || (job->guided && job->rows % 2)) return TF_BAD_SIZE;
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
