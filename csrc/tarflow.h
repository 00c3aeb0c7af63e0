// The whole C ABI of tarflow_fast. Torch-free: pointers, sizes, thread counts in; a status out.
//
// Rules for every function
//   - Arguments are validated in Python (tarflow_fast/ops/checks.py); only what C alone can know comes back as a status.
//   - Nothing throws, exits, prints, or keeps a pointer after it returns, unless its comment says so.
//   - `threads` >= 1 is an upper limit. Results do not depend on it, bit for bit.
//   - Outputs never alias inputs unless the comment says so.
//   - The floating-point control word (MXCSR / FPCR) is left as found.
#pragma once
#include <stdint.h>

#define TF_EXPORT extern "C" __attribute__((visibility("default")))

// Raised by one whenever a signature or its meaning changes; tarflow_fast/native.py refuses a library of another number.
#define TF_ABI_VERSION 1

enum tf_status {
    TF_OK = 0,
    TF_BAD_DTYPE = 1,        // this combination of storage types has no kernel
    TF_NO_MEMORY = 2,        // a scratch allocation failed; outputs are undefined
    TF_ISA_UNKNOWN = 3,      // no instruction set of that name was built
    TF_ISA_UNSUPPORTED = 4,  // built, but this processor or operating system cannot run it
};

enum tf_dtype { TF_F32 = 0, TF_BF16 = 1, TF_F16 = 2, TF_F64 = 3 };

// ---- library -------------------------------------------------------------------------------------------------------

// The ABI number this library was built with.
TF_EXPORT int tf_abi_version(void);

// Names of the instruction sets in this library, comma separated, slowest first. Static storage.
TF_EXPORT const char* tf_built_isas(void);

// Chooses the kernels: a name from tf_built_isas, or NULL for the best this machine runs. Call once, before any kernel;
// objects made under one choice must be used under the same. Returns TF_OK, TF_ISA_UNKNOWN or TF_ISA_UNSUPPORTED.
TF_EXPORT int tf_select_isa(const char* name);

// Name of the instruction set in use. Static storage.
TF_EXPORT const char* tf_isa(void);

// 1 if the library was built with OpenMP, else 0 (then every call runs on one thread).
TF_EXPORT int tf_has_openmp(void);

// ---- affine (formula: tarflow_fast/ops/affine.py) ---------------------------------------------------------------------

// z = (x - b) exp(-a) with the shift by one token, log_det[row] = -sum a.
//   x, z: (B, T, D) of x_dtype; ab: (B, T, 2D) when scale, halves (a, b), else (B, T, D) = b, of ab_dtype; log_det: (B,)
//   float32, or float64 when x is. All contiguous. T, D >= 1, B >= 0. flip: the net saw the tokens in reverse.
//   (x, ab) dtypes: (f64, f64), (f32, f32), (f32, bf16), (f32, f16), (bf16, bf16), (f16, f16); else TF_BAD_DTYPE.
//   Computed in fp32 (fp64 for f64), log_det summed in fp64. TF_NO_MEMORY possible.
TF_EXPORT int tf_affine_forward(const void* x, const void* ab, void* z, void* log_det, int64_t B, int64_t T, int64_t D,
                                int scale, int flip, int x_dtype, int ab_dtype, int threads);

// Gradients of the above: dz like z and dlog_det like log_det in; dx like x and dab like ab out, every element written
// (zeros for the ab of the last token).
TF_EXPORT int tf_affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab, void* dx,
                                 void* dab, int64_t B, int64_t T, int64_t D, int scale, int flip, int x_dtype,
                                 int ab_dtype, int threads);

// ---- what the machine can do at best, for benchmarks --------------------------------------------------------------------

// Reads p, (n,) float32, split over `threads`, and returns the bytes read.
TF_EXPORT double tf_peak_read(const float* p, int64_t n, int threads);

// Multiplies and adds in registers on `threads` threads, `steps` rounds each, and returns the floating-point operations
// done: TF_F32 by fused multiply-add, TF_BF16 by the bfloat16 dot product. 0 if the instruction set has none.
TF_EXPORT double tf_peak_flops(int dtype, int64_t steps, int threads);

// ---- test access to the SIMD layer -----------------------------------------------------------------------------------

// y[k] = exp(x[k]); x, y: (n,) float32, may be the same. One thread.
TF_EXPORT void tf_test_exp(const float* x, float* y, int64_t n);

// y = x stored as `dtype` (TF_BF16 or TF_F16) and read back; x, y: (n,) float32, may be the same. One thread.
TF_EXPORT int tf_test_round(const float* x, float* y, int64_t n, int dtype);
