// The C ABI of the CUDA library. It knows no torch: a function takes device pointers, sizes and a stream, and returns a
// status.
//
// Rules for every function
//   - Python has validated the arguments. Pointers are to contiguous memory of the current device.
//   - Work is enqueued on `stream` (a cudaStream_t), and nothing waits for it. Nothing is allocated, so every call may
//     be captured in a graph. Scratch memory is the caller's.
//   - The status is 0, TF_CUDA_BAD_DTYPE, or TF_CUDA_FAILED plus the cudaError_t of the launch.
//   - The same call gives the same bits.
#pragma once
#include <stdint.h>

#define TF_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

// Raised by one whenever a signature or its meaning changes. tarflow_fast/native_cuda.py refuses a library of another
// number.
#define TF_CUDA_ABI_VERSION 2

enum tf_cuda_status { TF_CUDA_OK = 0, TF_CUDA_BAD_DTYPE = 1, TF_CUDA_FAILED = 1000 };

// Storage types are numbered as in enum tf_dtype of tarflow.h.

TF_CUDA_EXPORT int tf_cuda_abi_version(void);

// What CUDA says of a status of TF_CUDA_FAILED or more. The string is static.
TF_CUDA_EXPORT const char* tf_cuda_error(int status);

// ---- affine (formula: tarflow_fast/ops/affine.py) -------------------------------------------------------------------

// Bytes of scratch memory that forward needs. The memory must be 8-byte aligned.
TF_CUDA_EXPORT int64_t tf_cuda_affine_scratch(int64_t B, int64_t T, int64_t D);

// z = (x - b) exp(-a) with the shift by one token, log_det[row] = -sum a. Shapes and types are those of
// tf_affine_forward. Everything is computed in fp32 (fp64 for f64), and the sums of a in fp64.
TF_CUDA_EXPORT int tf_cuda_affine_forward(const void* x, const void* ab, void* z, void* log_det, void* scratch,
                                          int64_t B, int64_t T, int64_t D, int scale, int flip, int x_dtype,
                                          int ab_dtype, void* stream);

// Gradients of the above. Shapes and types are those of tf_affine_backward.
TF_CUDA_EXPORT int tf_cuda_affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab,
                                           void* dx, void* dab, int64_t B, int64_t T, int64_t D, int scale, int flip,
                                           int x_dtype, int ab_dtype, void* stream);

// Solves one token of every row in place. With p = position[row], next = order[p + 1], and (a, b) = ab[row], the net's
// output at p, which guidance changes to
//     a += ga[p] (a - a_u),  b += gb[p] (b - b_u)      where (a_u, b_u) = ab[B + row], if `guided`
// it sets
//     x[row, next] = z[row, next] exp(a) + b,  sums[row, p] = sum_d a
//   ab: (B or 2B, 2D or D) of ab_dtype (f32, bf16 or f16); z, x: (B, T, D) f32, not overlapping; sums: (B, T) f32;
//   position: (B,) int32, and a row whose p is outside 0 .. T-2 is left alone; guidance: (2, T) f32, ga and gb;
//   order: (T,) int32, a permutation: order[i] is the place in x and z of the i-th token that the net sees.
TF_CUDA_EXPORT int tf_cuda_affine_inverse(const void* ab, const float* z, float* x, float* sums,
                                          const int32_t* position, const int32_t* order, const float* guidance,
                                          int64_t B, int64_t T, int64_t D, int scale, int guided, int ab_dtype,
                                          void* stream);
