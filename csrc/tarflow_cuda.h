// The C ABI of the CUDA library. Torch-free: device pointers, sizes and a stream in; a status out.
//
// Rules for every function
//   - Arguments are validated in Python; pointers are device memory of the current device, contiguous.
//   - Work is enqueued on `stream` (a cudaStream_t) and not waited for. Nothing is allocated, so every call may be
//     captured in a graph; scratch memory is the caller's.
//   - The status is 0, TF_CUDA_BAD_DTYPE, or TF_CUDA_FAILED plus the cudaError_t of the launch.
//   - The same call gives the same bits.
#pragma once
#include <stdint.h>

#define TF_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

// Raised by one whenever a signature or its meaning changes; tarflow_fast/native_cuda.py refuses a library of another
// number.
#define TF_CUDA_ABI_VERSION 2

enum tf_cuda_status { TF_CUDA_OK = 0, TF_CUDA_BAD_DTYPE = 1, TF_CUDA_FAILED = 1000 };

// Storage types are numbered as in enum tf_dtype of tarflow.h.

TF_CUDA_EXPORT int tf_cuda_abi_version(void);

// What CUDA says of a status of TF_CUDA_FAILED or more. Static storage.
TF_CUDA_EXPORT const char* tf_cuda_error(int status);

// ---- affine (formula: tarflow_fast/ops/affine.py) -------------------------------------------------------------------

// Bytes of scratch memory that forward needs, 8-byte aligned.
TF_CUDA_EXPORT int64_t tf_cuda_affine_scratch(int64_t B, int64_t T, int64_t D);

// z = (x - b) exp(-a) with the shift by one token, log_det[row] = -sum a. Shapes and types as tf_affine_forward.
// Computed in fp32 (fp64 for f64), sums of a in fp64.
TF_CUDA_EXPORT int tf_cuda_affine_forward(const void* x, const void* ab, void* z, void* log_det, void* scratch,
                                          int64_t B, int64_t T, int64_t D, int scale, int flip, int x_dtype,
                                          int ab_dtype, void* stream);

// Gradients of the above. Shapes and types as tf_affine_backward.
TF_CUDA_EXPORT int tf_cuda_affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab,
                                           void* dx, void* dab, int64_t B, int64_t T, int64_t D, int scale, int flip,
                                           int x_dtype, int ab_dtype, void* stream);

// One token of every row solved in place of the workspace: with p = position[row], the net's output ab[row] there and
//     a += ga[p] (a - a_u),  b += gb[p] (b - b_u)      rows B .. 2B-1 of ab being the unguided ones, if `guided`
// it sets x[row, next] = z[row, next] exp(a) + b and sums[row, p] = sum_d a, with next = order[p + 1].
//   ab: (B or 2B, 2D or D) of ab_dtype (f32, bf16 or f16); z, x: (B, T, D) f32, not overlapping; sums: (B, T) f32;
//   position: (B,) int32, rows with p outside 0 .. T-2 are left alone; guidance: (2, T) f32, ga, gb;
//   order: (T,) int32, a permutation: order[i] is the place in x and z of the i-th token that the net sees.
TF_CUDA_EXPORT int tf_cuda_affine_inverse(const void* ab, const float* z, float* x, float* sums,
                                          const int32_t* position, const int32_t* order, const float* guidance,
                                          int64_t B, int64_t T, int64_t D, int scale, int guided, int ab_dtype,
                                          void* stream);
