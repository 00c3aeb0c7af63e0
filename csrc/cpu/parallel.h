// Threads. The sizes of the problem alone decide how work is cut into items, never the number of threads, and every
// item owns what it writes. So the result has the same bits on any number of threads.
#pragma once
#include <stdint.h>

namespace tf::TF_ISA {
namespace {

// Calls f(item) for every item in [0, items), on at most `threads` threads. Torch's own OpenMP pool does the work:
// torch is loaded first, and when it was built with GCC the two share one libgomp, so no second pool competes for the
// cores.
template <class Function>
inline void parallel_for(int threads, int64_t items, Function f) {
#ifdef _OPENMP
    if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t item = 0; item < items; ++item) f(item);
        return;
    }
#endif
    (void)threads;
    for (int64_t item = 0; item < items; ++item) f(item);
}

}  // namespace
}  // namespace tf::TF_ISA
