// The kernels of one instruction set. Every file of csrc/cpu/ except dispatch.cpp is compiled once for each set, with
// -DTF_ISA=<name>. A file exports functions of namespace tf::<name> and nothing else, and tf::<name>::table gathers
// them.
//
// To add a kernel: declare tf_name in csrc/tarflow.h, write tf::TF_ISA::name with the same parameters, add the name to
// TF_KERNELS, forward tf_name in dispatch.cpp, and declare it to ctypes in tarflow_fast/native.py.
#pragma once
#include "../tarflow.h"

#define TF_KERNELS(X)    \
    X(affine_forward)    \
    X(affine_backward)   \
    X(plan_bytes)        \
    X(plan_create)       \
    X(plan_pack)         \
    X(plan_rest)         \
    X(plan_destroy)      \
    X(workspace_bytes)   \
    X(workspace_create)  \
    X(workspace_rest)    \
    X(workspace_destroy) \
    X(invert)            \
    X(pass)              \
    X(invert_windows)    \
    X(made_numbers)      \
    X(made_pack)         \
    X(made_invert)       \
    X(peak_read)         \
    X(peak_flops)        \
    X(test_exp)          \
    X(test_round)        \
    X(test_gelu)         \
    X(test_matmul)

namespace tf {

struct Table {
    const char* name;
#define TF_FIELD(kernel) decltype(&::tf_##kernel) kernel;
    TF_KERNELS(TF_FIELD)
#undef TF_FIELD
};

}  // namespace tf
