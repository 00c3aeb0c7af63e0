// Chooses an instruction set when the library is loaded, and forwards every exported function to it. This file is
// compiled once, for the plain machine: nothing here may need more than every processor has.
#include <string.h>
#include <unistd.h>

#include "table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tf {

#define TF_DECLARE(isa)       \
    namespace isa {           \
    extern const Table table; \
    }
TF_DECLARE(baseline)
#ifdef TF_HAVE_avx2
TF_DECLARE(avx2)
#endif
#ifdef TF_HAVE_avx512
TF_DECLARE(avx512)
#endif
#ifdef TF_HAVE_avx512bf16
TF_DECLARE(avx512bf16)
#endif

namespace {

enum Level { BASELINE, AVX2, AVX512, AVX512BF16 };

struct Entry {
    Level level;
    const Table* table;
};

// Slowest first.
const Entry entries[] = {
    {BASELINE, &baseline::table},
#ifdef TF_HAVE_avx2
    {AVX2, &avx2::table},
#endif
#ifdef TF_HAVE_avx512
    {AVX512, &avx512::table},
#endif
#ifdef TF_HAVE_avx512bf16
    {AVX512BF16, &avx512bf16::table},
#endif
};

const Table* chosen = &baseline::table;

// It is not enough that the processor has the wide registers. The operating system must also save them (XCR0). If it
// does not, using them raises an illegal instruction or loses state at a context switch.
Level machine_level() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    const auto has = [](unsigned reg, int bit) { return (reg >> bit & 1u) != 0; };
    if (!__get_cpuid(1, &a, &b, &c, &d)) return BASELINE;
    if (!has(c, 27) || !has(c, 28) || !has(c, 12) || !has(c, 29)) return BASELINE;  // OSXSAVE, AVX, FMA, F16C
    unsigned xcr0, high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & 0x6) != 0x6) return BASELINE;  // SSE and AVX state
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, 5)) return BASELINE;
    if ((xcr0 & 0xe0) != 0xe0) return AVX2;  // the state of opmask, of the upper halves of zmm0-15, and of zmm16-31
    const bool f_dq_bw_vl = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);
    if (!f_dq_bw_vl) return AVX2;
    const bool vnni = has(c, 11);
    if (vnni && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5)) return AVX512BF16;
    return AVX512;
#else
    return BASELINE;
#endif
}

// A child that was forked after the library was loaded has lost the threads of its parent's OpenMP pool, and waiting
// for them never ends. It uses one thread. (A child that loads the library itself, when its parent had used torch's
// pool, waits as torch does.)
const pid_t loaded_in = getpid();

int usable(int threads) { return getpid() == loaded_in ? threads : 1; }

}  // namespace
}  // namespace tf

using tf::chosen;

int tf_abi_version(void) { return TF_ABI_VERSION; }

const char* tf_built_isas(void) {
    return "baseline"
#ifdef TF_HAVE_avx2
           ",avx2"
#endif
#ifdef TF_HAVE_avx512
           ",avx512"
#endif
#ifdef TF_HAVE_avx512bf16
           ",avx512bf16"
#endif
        ;
}

int tf_select_isa(const char* name) {
    const tf::Level level = tf::machine_level();
    if (name == nullptr) {
        const tf::Table* best = nullptr;
        for (const tf::Entry& entry : tf::entries)
            if (entry.level <= level) best = entry.table;
        chosen = best;  // it is set once, because two threads may load the library at the same time
        return TF_OK;
    }
    for (const tf::Entry& entry : tf::entries) {
        if (strcmp(entry.table->name, name) != 0) continue;
        if (entry.level > level) return TF_ISA_UNSUPPORTED;
        chosen = entry.table;
        return TF_OK;
    }
    return TF_ISA_UNKNOWN;
}

const char* tf_isa(void) { return chosen->name; }

int tf_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int tf_affine_forward(const void* x, const void* ab, void* z, void* log_det, int64_t B, int64_t T, int64_t D, int scale,
                      int flip, int x_dtype, int ab_dtype, int threads) {
    return chosen->affine_forward(x, ab, z, log_det, B, T, D, scale, flip, x_dtype, ab_dtype, tf::usable(threads));
}

int tf_affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab, void* dx, void* dab,
                       int64_t B, int64_t T, int64_t D, int scale, int flip, int x_dtype, int ab_dtype, int threads) {
    return chosen->affine_backward(dz, dlog_det, x, ab, dx, dab, B, T, D, scale, flip, x_dtype, ab_dtype,
                                   tf::usable(threads));
}

int64_t tf_plan_bytes(const tf_block* block) { return chosen->plan_bytes(block); }

int tf_plan_create(const tf_block* block, tf_plan** plan) { return chosen->plan_create(block, plan); }

int tf_plan_pack(tf_plan* plan, const void* const* tensors, int dtype, int threads, int64_t* bad) {
    return chosen->plan_pack(plan, tensors, dtype, tf::usable(threads), bad);
}

int tf_plan_rest(tf_plan* plan) { return chosen->plan_rest(plan); }
void tf_plan_destroy(tf_plan* plan) { chosen->plan_destroy(plan); }

int64_t tf_workspace_bytes(const tf_block* block, int64_t rows, int64_t window, int threads) {
    return chosen->workspace_bytes(block, rows, window, threads);
}

int tf_workspace_create(const tf_block* block, int64_t rows, int64_t window, int threads, tf_workspace** workspace) {
    return chosen->workspace_create(block, rows, window, threads, workspace);
}

int tf_workspace_rest(tf_workspace* workspace) { return chosen->workspace_rest(workspace); }
void tf_workspace_destroy(tf_workspace* workspace) { chosen->workspace_destroy(workspace); }

int tf_invert(const tf_plan* plan, tf_workspace* workspace, const tf_inversion* inversion, int64_t* stage,
              double seconds, int threads) {
    return chosen->invert(plan, workspace, inversion, stage, seconds, tf::usable(threads));
}

int tf_pass(const tf_plan* plan, tf_workspace* workspace, const tf_pass_arguments* arguments, int threads) {
    return chosen->pass(plan, workspace, arguments, tf::usable(threads));
}

int tf_invert_windows(const tf_plan* plan, tf_workspace* workspace, const tf_inversion* inversion, tf_windows* state,
                      double seconds, int threads) {
    return chosen->invert_windows(plan, workspace, inversion, state, seconds, tf::usable(threads));
}

int64_t tf_made_numbers(const tf_made* made) { return chosen->made_numbers(made); }

int tf_made_pack(const tf_made* made, void* packed, int threads) {
    return chosen->made_pack(made, packed, tf::usable(threads));
}

int tf_made_invert(const tf_made* made, const void* packed, const tf_made_rows* rows, int threads) {
    return chosen->made_invert(made, packed, rows, tf::usable(threads));
}

void tf_test_gelu(const float* x, float* y, int64_t n) { chosen->test_gelu(x, y, n); }

int tf_test_matmul(const float* x, const float* w, const float* bias, float* y, int64_t rows, int64_t columns,
                   int64_t inputs, int precision) {
    return chosen->test_matmul(x, w, bias, y, rows, columns, inputs, precision);
}

double tf_peak_read(const float* p, int64_t n, int threads) { return chosen->peak_read(p, n, threads); }

double tf_peak_flops(int dtype, int64_t steps, int threads) { return chosen->peak_flops(dtype, steps, threads); }

void tf_test_exp(const float* x, float* y, int64_t n) { chosen->test_exp(x, y, n); }

int tf_test_round(const float* x, float* y, int64_t n, int dtype) { return chosen->test_round(x, y, n, dtype); }
