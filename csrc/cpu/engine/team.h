// The threads of one run, and their barrier. A run is one OpenMP region with many barriers inside.
#pragma once
#include <sched.h>
#include <stdint.h>
#include <time.h>

#include "../vec.h"

namespace tf::TF_ISA {
namespace {

inline double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

constexpr int MOST_THREADS = 256;  // of a team

// Each thread counts the meetings that it has come to, where the others can see it. So with two threads one cache line
// changes hands each way. A single counter for both would be fetched, written and fetched again. A thread that waits
// first spins, because the others are a microsecond behind. Then it yields, because they have lost their core. Then it
// naps.
struct Barrier {
    struct alignas(128) Count {  // a processor fetches lines in pairs
        uint32_t value = 0;
    } count[MOST_THREADS];
    int64_t lost = 0;  // nanoseconds that all together have napped, while the others were not even running

    void wait(int rank, int size) {
        if (size == 1) return;
        const uint32_t now = count[rank].value + 1;
        __atomic_store_n(&count[rank].value, now, __ATOMIC_RELEASE);
        for (int other = 0; other < size; ++other)
            if (!came(other, now)) wait_for(other, now);
    }

  private:
    bool came(int other, uint32_t now) const {
        return int32_t(__atomic_load_n(&count[other].value, __ATOMIC_ACQUIRE) - now) >= 0;
    }
    void wait_for(int other, uint32_t now) {
        for (int spin = 0; spin < 2048; ++spin) {
            pause();
            if (came(other, now)) return;
        }
        for (int yield = 0; yield < 256; ++yield) {
            sched_yield();
            if (came(other, now)) return;
        }
        const double start = seconds();
        const timespec moment = {0, 50000};
        while (!came(other, now)) nanosleep(&moment, nullptr);
        __atomic_add_fetch(&lost, int64_t((seconds() - start) * 1e9), __ATOMIC_RELAXED);
    }
    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
};

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// Part `part` of `parts` of n items. The parts are contiguous and as even as can be.
inline Range share(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

// Counts where one thread's time goes. Without `parts` it counts nothing.
struct Clock {
    double* parts = nullptr;
    double last = 0.0;

    explicit Clock(double* where) : parts(where), last(where ? seconds() : 0.0) {}
    void mark(int part) {  // says that the time since the last mark went into `part`
        if (!parts) return;
        const double now = seconds();
        parts[part] += now - last;
        last = now;
    }
};

struct Team {
    int rank, size;
    Barrier* barrier;

    Range mine(int64_t items) const { return share(items, rank, size); }
};

// A thread of a run: its place in its team, its number among all threads, and the engine rows of its team.
struct Member {
    Team team;
    int thread;
    Range rows;
};

}  // namespace
}  // namespace tf::TF_ISA
