// The threads of one run, and their barrier: one OpenMP region a run, many barriers inside.
#pragma once
#include <sched.h>
#include <stdint.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../vec.h"

namespace tf::TF_ISA {
namespace {

inline double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Waiting: spin (the others are a microsecond behind), then yield (they lost their core), then sleep.
struct Barrier {
    alignas(64) uint32_t arrived = 0;
    alignas(64) uint32_t epoch = 0;
    uint32_t sleepers = 0;
    int64_t lost = 0;  // nanoseconds slept, by all together: the others were not even running

    void wait(int size) {
        if (size == 1) return;
        const uint32_t now = __atomic_load_n(&epoch, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == uint32_t(size)) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&epoch, now + 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) wake();
            return;
        }
        for (int spin = 0; spin < 2048; ++spin) {
            if (__atomic_load_n(&epoch, __ATOMIC_ACQUIRE) != now) return;
            pause();
        }
        for (int yield = 0; yield < 256 && __atomic_load_n(&epoch, __ATOMIC_ACQUIRE) == now; ++yield) sched_yield();
        const double start = seconds();
        __atomic_add_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&epoch, __ATOMIC_SEQ_CST) == now) sleep_while(now);
        __atomic_sub_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&lost, int64_t((seconds() - start) * 1e9), __ATOMIC_RELAXED);
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
#if defined(__linux__)
    void wake() { syscall(SYS_futex, &epoch, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
    void sleep_while(uint32_t now) { syscall(SYS_futex, &epoch, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
#else
    void wake() {}
    void sleep_while(uint32_t) {
        const timespec moment = {0, 50000};
        nanosleep(&moment, nullptr);
    }
#endif
};

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

// Part `part` of `parts` of n items: contiguous, as even as can be.
inline Range share(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

// Where one thread's time goes; without parts nothing is counted.
struct Clock {
    double* parts = nullptr;
    double last = 0.0;

    explicit Clock(double* where) : parts(where), last(where ? seconds() : 0.0) {}
    void mark(int part) {  // the time since the last mark went into `part`
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

}  // namespace
}  // namespace tf::TF_ISA
