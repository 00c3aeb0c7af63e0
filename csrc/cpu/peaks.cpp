// What this machine can do at best in reading memory and in multiplying and adding. The benchmarks compare themselves
// with it.
#include "parallel.h"
#include "table.h"
#include "vec.h"

namespace tf::TF_ISA {
namespace {

// 12 chains hide the latency of an instruction: a fused multiply-add takes 4 cycles and the bfloat16 dot product 6, and
// two can start in a cycle.
constexpr int CHAINS = 12;

float read_part(const float* p, int64_t n) {
    vf partial[8] = {};
    int64_t k = 0;
    for (; k + 8 * LANES <= n; k += 8 * LANES)
        for (int j = 0; j < 8; ++j) partial[j] += load(p + k + j * LANES);
    vf total = zero();
    for (int j = 0; j < 8; ++j) total += partial[j];
    return sum(total);
}

float multiply_add(int64_t steps) {
    vf chain[CHAINS];
    for (int j = 0; j < CHAINS; ++j) chain[j] = splat(float(j));
    const vf scale = splat(0.999f), shift = splat(0.001f);
    for (int64_t k = 0; k < steps; ++k)
        for (int j = 0; j < CHAINS; ++j) chain[j] = fma(chain[j], scale, shift);
    vf total = zero();
    for (int j = 0; j < CHAINS; ++j) total += chain[j];
    return sum(total);
}

#if defined(__AVX512BF16__)
float dot_bf16(int64_t steps) {
    __m512 chain[CHAINS];
    for (int j = 0; j < CHAINS; ++j) chain[j] = _mm512_set1_ps(float(j));
    const __m512bh a = bits<__m512bh>(_mm512_set1_epi16(0x3a83)), b = bits<__m512bh>(_mm512_set1_epi16(0x3a82));
    for (int64_t k = 0; k < steps; ++k)
        for (int j = 0; j < CHAINS; ++j) chain[j] = _mm512_dpbf16_ps(chain[j], a, b);
    vf total = zero();
    for (int j = 0; j < CHAINS; ++j) total += (vf)chain[j];
    return sum(total);
}
#endif

// Keeps a result whose value nobody wants, so that the compiler does not drop the work behind it.
void keep(float value) {
    volatile float sink = value;
    (void)sink;
}

}  // namespace

double peak_read(const float* p, int64_t n, int threads) {
    const int64_t part = n / threads;
    parallel_for(threads, threads, [&](int64_t t) { keep(read_part(p + t * part, part)); });
    return 4.0 * double(part / (8 * LANES) * (8 * LANES)) * threads;
}

double peak_flops(int dtype, int64_t steps, int threads) {
    if (dtype == TF_F32) {
        parallel_for(threads, threads, [&](int64_t) { keep(multiply_add(steps)); });
        return 2.0 * LANES * CHAINS * double(steps) * threads;
    }
#if defined(__AVX512BF16__)
    if (dtype == TF_BF16) {
        parallel_for(threads, threads, [&](int64_t) { keep(dot_bf16(steps)); });
        return 4.0 * LANES * CHAINS * double(steps) * threads;
    }
#endif
    return 0.0;
}

}  // namespace tf::TF_ISA
