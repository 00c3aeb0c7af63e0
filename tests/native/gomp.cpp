// As much of the OpenMP runtime as the engine needs, on plain threads. ThreadSanitizer sees these threads begin and
// end. The system's libgomp is not built for ThreadSanitizer, which therefore sees nothing of its threads.
#include <pthread.h>

#include <vector>

namespace {

thread_local int rank = 0, size = 1;

struct Start {
    void (*body)(void*);
    void* data;
    int rank, size;
};

void* run(void* argument) {
    const Start& start = *static_cast<Start*>(argument);
    rank = start.rank, size = start.size;
    start.body(start.data);
    rank = 0, size = 1;
    return nullptr;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return rank; }
int omp_get_num_threads() { return size; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<Start> starts;
    for (unsigned k = 0; k < threads; ++k) starts.push_back({body, data, int(k), int(threads)});
    std::vector<pthread_t> others(threads);
    for (unsigned k = 1; k < threads; ++k) pthread_create(&others[k], nullptr, run, &starts[k]);
    run(&starts[0]);
    for (unsigned k = 1; k < threads; ++k) pthread_join(others[k], nullptr);
}
}
