// The kernels of one instruction set. Every file of csrc/cpu/ except dispatch.cpp is compiled once for each, with
// -DTF_ISA=<name>; all it exports are the members of tf::<name>, gathered here by table.cpp.
//
// To add a kernel: declare it in csrc/tarflow.h, write it in namespace tf::TF_ISA, then one line in struct Table, one in
// table.cpp and one in dispatch.cpp.
#pragma once
#include "../tarflow.h"

namespace tf {

struct Table {
    const char* name;
    void (*test_exp)(const float* x, float* y, int64_t n);
    int (*test_round)(const float* x, float* y, int64_t n, int dtype);
};

}  // namespace tf
