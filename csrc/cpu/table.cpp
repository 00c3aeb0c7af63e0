#include "table.h"

#define TF_STRING_(s) #s
#define TF_STRING(s) TF_STRING_(s)

namespace tf::TF_ISA {

void test_exp(const float* x, float* y, int64_t n);
int test_round(const float* x, float* y, int64_t n, int dtype);

extern const Table table;
const Table table = {
    TF_STRING(TF_ISA),
    test_exp,
    test_round,
};

}  // namespace tf::TF_ISA
