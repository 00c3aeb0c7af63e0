// Storage types, the type that each is computed in, and loads of several neighbouring elements at once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../tarflow.h"
#include "../tarflow_cuda.h"

namespace tf {

template <class T>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};

// N neighbours, which are loaded and stored as one: N * sizeof(T) bytes, aligned to as many bytes (16 at most).
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T at[N];
};

// Calls f with null pointers of the storage types of x, ab and log_det. f gets types and no data.
template <class F>
int for_types(int x_dtype, int ab_dtype, F f) {
    if (x_dtype == TF_F64 && ab_dtype == TF_F64) return f((double*)nullptr, (double*)nullptr, (double*)nullptr);
    if (x_dtype == TF_F32 && ab_dtype == TF_F32) return f((float*)nullptr, (float*)nullptr, (float*)nullptr);
    if (x_dtype == TF_F32 && ab_dtype == TF_BF16) return f((float*)nullptr, (__nv_bfloat16*)nullptr, (float*)nullptr);
    if (x_dtype == TF_F32 && ab_dtype == TF_F16) return f((float*)nullptr, (__half*)nullptr, (float*)nullptr);
    if (x_dtype == TF_BF16 && ab_dtype == TF_BF16)
        return f((__nv_bfloat16*)nullptr, (__nv_bfloat16*)nullptr, (float*)nullptr);
    if (x_dtype == TF_F16 && ab_dtype == TF_F16) return f((__half*)nullptr, (__half*)nullptr, (float*)nullptr);
    return TF_CUDA_BAD_DTYPE;
}

inline int launched() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? TF_CUDA_OK : TF_CUDA_FAILED + int(error);
}

}  // namespace tf
