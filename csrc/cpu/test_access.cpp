// Lets the tests reach the SIMD layer itself, on every instruction set.
#include "gelu.h"
#include "table.h"
#include "vec.h"

namespace tf::TF_ISA {

void test_exp(const float* x, float* y, int64_t n) {
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) store(y + k, exp(load(x + k)));
    if (k < n) store(y + k, exp(load(x + k, int(n - k))), int(n - k));
}

void test_gelu(const float* x, float* y, int64_t n) {
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) store(y + k, gelu(load(x + k)));
    if (k < n) store(y + k, gelu(load(x + k, int(n - k))), int(n - k));
}

template <class Stored>
static void round_trip(const float* x, float* y, int64_t n) {
    Stored stored[LANES];
    for (int64_t k = 0; k < n; k += LANES) {
        // Whole vectors and tails take different instructions: both are used here, whole ones wherever possible.
        if (k + LANES <= n) {
            store(stored, load(x + k));
            store(y + k, load(stored));
        } else {
            const int rest = int(n - k);
            store(stored, load(x + k, rest), rest);
            store(y + k, load(stored, rest), rest);
        }
    }
}

int test_round(const float* x, float* y, int64_t n, int dtype) {
    if (dtype == TF_BF16)
        round_trip<bf16>(x, y, n);
    else if (dtype == TF_F16)
        round_trip<f16>(x, y, n);
    else
        return TF_BAD_DTYPE;
    return TF_OK;
}

}  // namespace tf::TF_ISA
