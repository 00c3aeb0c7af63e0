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
#define TF_ABI_VERSION 4

enum tf_status {
    TF_OK = 0,
    TF_BAD_DTYPE = 1,        // this combination of storage types has no kernel
    TF_NO_MEMORY = 2,        // a scratch allocation failed; outputs are undefined
    TF_ISA_UNKNOWN = 3,      // no instruction set of that name was built
    TF_ISA_UNSUPPORTED = 4,  // built, but this processor or operating system cannot run it
    TF_BAD_SIZE = 5,         // sizes or places out of range or not matching; nothing was written
    TF_NOT_FINITE = 6,       // a weight is NaN or infinite
    TF_BAD_LABEL = 7,        // a label is not below the number of classes; nothing was written
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

// ---- block_inverse: the engine that inverts a flow block (formula: tarflow_fast/ops/block_inverse.py) ------------------
//
// A plan holds one block's weights as the kernels read them; a workspace all that a run writes except its results. Both
// say their bytes before they are made. A plan may serve several threads at once, a workspace one run at a time; a
// workspace serves every plan of its sizes and precision, one run after another.

// What the parameters of a token do to the next one. They come in parts of D numbers each.
enum tf_transform {
    TF_TRANSFORM_SHIFT = 0,   // x = z + b, volume preserving; b
    TF_TRANSFORM_AFFINE = 1,  // x = z exp(a) + b; a, then b
};

enum tf_precision { TF_PRECISION_FP32 = 0, TF_PRECISION_BF16 = 1, TF_PRECISION_INT8 = 2 };

// How a run is spread over threads: each its rows, or each its columns. Bits do not depend on it.
enum tf_split { TF_SPLIT_AUTO = 0, TF_SPLIT_COLUMNS = 1, TF_SPLIT_ROWS = 2 };

// The parts of a pass, as a clock counts them: products with their normalisation and epilogue, attention, the update of
// the next token, and waiting for the other threads.
enum tf_part {
    TF_PART_IN,
    TF_PART_QKV,
    TF_PART_ATTENTION,
    TF_PART_PROJ,
    TF_PART_FC1,
    TF_PART_FC2,
    TF_PART_OUT,
    TF_PART_UPDATE,
    TF_PART_WAIT,
    TF_PARTS
};

typedef struct tf_plan tf_plan;
typedef struct tf_workspace tf_workspace;

// The sizes of a block. channels is a multiple of head_size; transform: of enum tf_transform; precision: of tf_precision.
typedef struct tf_block {
    int64_t tokens, token_size, channels, layers, head_size, hidden, classes;  // classes: 0 for an unconditional block
    int32_t transform, precision;
} tf_block;

// Bytes a plan takes; -1 when the sizes are out of range or do not fit.
TF_EXPORT int64_t tf_plan_bytes(const tf_block* block);

// TF_OK, TF_BAD_SIZE or TF_NO_MEMORY.
TF_EXPORT int tf_plan_create(const tf_block* block, tf_plan** plan);

// Fills the plan, also one filled before. tensors: contiguous, all of `dtype` (TF_F32, TF_BF16, TF_F16), as torch holds
// them (a Linear's weight is (outputs, inputs)), NULL for one that is absent (a bias of 0, a norm's gain of 1):
//   proj_in weight, bias, pos_embed, proj_out weight, bias; for each layer attention.norm weight, bias, qkv weight, bias,
//   proj weight, bias, mlp.norm weight, bias, fc1 weight, bias, fc2 weight, bias; then class_embed (classes, 1, C).
// TF_NOT_FINITE: tensor number *bad holds NaN or infinity, and the plan must not be used. No run may use it meanwhile.
TF_EXPORT int tf_plan_pack(tf_plan* plan, const void* const* tensors, int dtype, int threads, int64_t* bad);

// The plan is kept for a later tf_plan_pack: until then the system may take its memory back, page by page. 1 if it may,
// 0 where that is not worth it or not possible.
TF_EXPORT int tf_plan_rest(tf_plan* plan);
TF_EXPORT void tf_plan_destroy(tf_plan* plan);

// Bytes of a workspace for passes of `rows` rows (twice the batch under guidance) of `window` tokens each on up to
// `threads` threads; -1 when the sizes are out of range or do not fit.
TF_EXPORT int64_t tf_workspace_bytes(const tf_block* block, int64_t rows, int64_t window, int threads);
TF_EXPORT int tf_workspace_create(const tf_block* block, int64_t rows, int64_t window, int threads,
                                  tf_workspace** workspace);
TF_EXPORT int tf_workspace_rest(tf_workspace* workspace);  // likewise, until the next run
TF_EXPORT void tf_workspace_destroy(tf_workspace* workspace);

// The inversion of a batch. Engine rows: row b of the batch, or under guidance rows 2b (conditional) and 2b + 1 (unguided).
typedef struct tf_inversion {
    const float* z;            // (B, T, D)
    float* x;                  // (B, T, D), does not alias z
    double* log_det;           // (B,): log |dx / dz|
    const int64_t* labels;     // (B,) below classes, negative for none; NULL: none. No label: the mean class embedding
    const float* query_scale;  // (R,) factor on the attention logits; NULL for 1
    const float* guidance;     // (B,) weights; NULL without guidance
    const int32_t* order;      // (T,): the place in z, x and pos_embed of token i of net order; NULL: i itself
    double* clock;             // (threads, TF_PARTS): seconds spent in each part, added to; NULL: nobody asks
    int64_t batch;
    int32_t guided_parts;  // bit p: guidance acts on part p of the parameters
    int32_t annealed, split;
} tf_inversion;

// Inverts the block. `order` must be a permutation. This function checks that its values lie in [0, T) and returns
// TF_BAD_SIZE where they do not; a place that a wrong order leaves out is not written in x.
//
// Work is counted in stages, (T - 1) (L + 2) in all, L + 2 a token; a call goes on from *stage, which is 0 at first, and
// returns with *stage advanced once `seconds` have passed or at the end: give or take a stage or, in a first call that
// splits rows, a token. Between calls only the same inversion may use the workspace, and x, z and the rest must stay as
// they are.
TF_EXPORT int tf_invert(const tf_plan* plan, tf_workspace* workspace, const tf_inversion* inversion, int64_t* stage,
                        double seconds, int threads);

// One pass of the net over tokens position .. position + window (net order) of every row, their inputs given.
typedef struct tf_pass_arguments {
    const float* tokens;       // (rows, window, D); guided: (rows / 2, window, D), each row for two engine rows
    const int64_t* labels;     // as above, of each row of `tokens`
    const float* query_scale;  // as above
    const int32_t* order;      // as above; the places in pos_embed alone
    float* ab;                 // (rows, window, parts of the transform's parameters times D)
    int64_t rows, window, position;
    int32_t guided, split;
} tf_pass_arguments;

// Reads keys and values of the tokens before `position` from the workspace, writes those of these tokens: a later pass may
// overwrite them. Results do not depend on how the tokens are cut into passes.
TF_EXPORT int tf_pass(const tf_plan* plan, tf_workspace* workspace, const tf_pass_arguments* arguments, int threads);

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

// y[k] = GELU(x[k]); x, y: (n,) float32, may be the same. One thread.
TF_EXPORT void tf_test_gelu(const float* x, float* y, int64_t n);

// y = x w^T + bias in a precision: x (rows, inputs), w (columns, inputs), bias (columns,), y (rows, columns) float32. TF_NO_MEMORY possible.
TF_EXPORT int tf_test_matmul(const float* x, const float* w, const float* bias, float* y, int64_t rows, int64_t columns,
                             int64_t inputs, int precision);
