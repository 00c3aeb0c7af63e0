// What the two runs of the engine share. The runs are a pass over given tokens, and the inversion of a block token by
// token.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "layer.h"

namespace tf::TF_ISA {

namespace {

// Whether each thread takes rows, rather than columns. With rows nobody waits, and no thread reads what another wrote.
// But every thread reads all weights, so these must come from a cache and be used for enough rows. Four rows a thread
// hide the reads where the weights are a few MB. Measured with 4 layers of C 128 in bf16, 8 rows and two threads of a
// Zen 5: 29 us a step by rows, 34 by columns. With 12 MB of weights the reads would still be the limit. Fewer rows are
// enough where there are too few columns for all threads. `units` of rows stay together.
inline bool rows_over_threads(const Plan& plan, int64_t rows, int64_t units, int threads, int mode) {
    if (threads == 1) return false;
    if (mode != TF_SPLIT_AUTO) return mode == TF_SPLIT_ROWS;
    if (units < threads) return false;
    const int64_t enough = plan.bytes <= SMALL_PLAN ? 4 : 12;
    return plan.bytes <= 2 * SMALL_PLAN &&
           (rows >= enough * threads || (rows >= threads && panels(plan.shape.C) < threads));
}

// More threads than this would only wait for one another: a matrix has no more columns to share, and a barrier has no
// more counts.
inline int useful_threads(const Plan& plan, int threads, bool by_rows) {
    const int64_t columns = 2 * panels(plan.shape.C), most = columns < MOST_THREADS ? columns : MOST_THREADS;
    return by_rows || threads <= most ? threads : int(most);
}

// Calls f(member) on each of up to `threads` threads. By rows each thread is a team of its own with its `units` of
// rows; otherwise all threads are one team.
template <class Function>
inline void run_teams(int threads, bool by_rows, int64_t units, int64_t rows_a_unit, Function f) {
    Barrier barrier;
    if (by_rows && threads > units) threads = int(units);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const int rank = omp_get_thread_num(), size = omp_get_num_threads();
            if (by_rows) {
                const Range mine = share(units, rank, size);
                f(Member{{0, 1, &barrier}, rank, {mine.begin * rows_a_unit, mine.end * rows_a_unit}});
            } else {
                f(Member{{rank, size, &barrier}, rank, {0, units * rows_a_unit}});
            }
        }
        return;
    }
#endif
    f(Member{{0, 1, &barrier}, 0, {0, units * rows_a_unit}});
}

}  // namespace
}  // namespace tf::TF_ISA
