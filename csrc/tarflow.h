// The whole C ABI of tarflow_fast. It knows no torch: a function takes pointers, sizes and a number of threads, and
// returns a status.
//
// Rules for every function
//   - Python validates the arguments (tarflow_fast/ops/checks.py, tarflow_fast/engines/). Only what C alone can know
//     comes back as a status.
//   - Nothing throws, exits, prints, or keeps a pointer after it returns, unless its comment says so.
//   - `threads` >= 1 is an upper limit. Results do not depend on it, bit for bit.
//   - Outputs never alias inputs, unless the comment says so.
//   - The floating-point control word (MXCSR or FPCR) is left as it was found.
#pragma once
#include <stdint.h>

#define TF_EXPORT extern "C" __attribute__((visibility("default")))

// This number is raised by one whenever a signature or its meaning changes. tarflow_fast/native.py refuses a library of
// another number.
#define TF_ABI_VERSION 7

enum tf_status {
    TF_OK = 0,
    TF_BAD_DTYPE = 1,        // this combination of storage types has no kernel
    TF_NO_MEMORY = 2,        // an allocation failed; outputs are undefined
    TF_ISA_UNKNOWN = 3,      // no instruction set of that name was built
    TF_ISA_UNSUPPORTED = 4,  // it was built, but this processor or operating system cannot run it
    TF_BAD_SIZE = 5,         // a size or a place is out of range, or sizes do not match; nothing was written
    TF_NOT_FINITE = 6,       // a weight is NaN or infinite
    TF_BAD_LABEL = 7,        // a label is not below the number of classes; nothing was written
};

enum tf_dtype { TF_F32 = 0, TF_BF16 = 1, TF_F16 = 2, TF_F64 = 3 };

// ---- library -------------------------------------------------------------------------------------------------------

// The ABI number this library was built with.
TF_EXPORT int tf_abi_version(void);

// The names of the instruction sets in this library, separated by commas, the slowest first. The string is static.
TF_EXPORT const char* tf_built_isas(void);

// Chooses the kernels by a name from tf_built_isas. NULL stands for the best that this machine runs. Call it once,
// before any kernel: an object made under one choice must be used under the same choice. Returns TF_OK, TF_ISA_UNKNOWN
// or TF_ISA_UNSUPPORTED.
TF_EXPORT int tf_select_isa(const char* name);

// The name of the instruction set in use. The string is static.
TF_EXPORT const char* tf_isa(void);

// 1 if the library was built with OpenMP. Otherwise it is 0, and every call runs on one thread.
TF_EXPORT int tf_has_openmp(void);

// ---- affine (formula: tarflow_fast/ops/affine.py) -------------------------------------------------------------------

// Computes z = (x - b) exp(-a) with the shift by one token, and log_det[row] = -sum a.
//   x, z: (B, T, D) of x_dtype.  log_det: (B,) float32, or float64 when x is.
//   ab: of ab_dtype; (B, T, 2D), first a and then b, when `scale` is set, and otherwise (B, T, D), which is b.
//   flip: whether the net saw the tokens in reverse.  All tensors are contiguous, T, D >= 1 and B >= 0.
//   (x, ab) dtypes: (f64, f64), (f32, f32), (f32, bf16), (f32, f16), (bf16, bf16) or (f16, f16), else TF_BAD_DTYPE.
//   It computes in fp32 (fp64 for f64) and sums log_det in fp64. TF_NO_MEMORY is possible.
TF_EXPORT int tf_affine_forward(const void* x, const void* ab, void* z, void* log_det, int64_t B, int64_t T, int64_t D,
                                int scale, int flip, int x_dtype, int ab_dtype, int threads);

// The gradients of the above. It reads dz, which is like z, and dlog_det, which is like log_det. It writes every
// element of dx, which is like x, and of dab, which is like ab. The ab of the last token conditions nothing, so its
// gradients are zeros.
TF_EXPORT int tf_affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab, void* dx,
                                 void* dab, int64_t B, int64_t T, int64_t D, int scale, int flip, int x_dtype,
                                 int ab_dtype, int threads);

// ---- the engine that inverts a flow block (its Python side: tarflow_fast/engines/cpu.py) ----------------------------
//
// A plan holds the weights of one block as the kernels read them. A workspace holds everything that a run writes except
// its results. Both tell their bytes before they are made. A plan may serve several threads at once, and a workspace
// serves one run at a time. A workspace serves every plan of its sizes and precision, one run after another.

// What the parameters of a token do to the next one. Parameters come in parts of D numbers each.
enum tf_transform {
    TF_TRANSFORM_SHIFT = 0,   // x = z + b, which preserves volumes; the one part is b
    TF_TRANSFORM_AFFINE = 1,  // x = z exp(a) + b; the parts are a and then b
};

enum tf_precision { TF_PRECISION_FP32 = 0, TF_PRECISION_BF16 = 1, TF_PRECISION_INT8 = 2 };

// How a run is spread over threads: each thread takes some rows, or each takes some columns. The bits do not depend on
// it.
enum tf_split { TF_SPLIT_AUTO = 0, TF_SPLIT_COLUMNS = 1, TF_SPLIT_ROWS = 2 };

// The parts of a pass, as a clock counts them: the products with their normalisation and epilogue, the attention, the
// update of the next token, and the time spent waiting for other threads.
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

// The sizes of a block. channels is a multiple of head_size. transform is one of enum tf_transform, and precision is
// one of enum tf_precision.
typedef struct tf_block {
    int64_t tokens, token_size, channels, layers, head_size, hidden, classes;  // an unconditional block has 0 classes
    int32_t transform, precision;
} tf_block;

// The bytes that a plan takes, or -1 when the sizes are out of range or the bytes do not fit 64 bits.
TF_EXPORT int64_t tf_plan_bytes(const tf_block* block);

// Returns TF_OK, TF_BAD_SIZE or TF_NO_MEMORY.
TF_EXPORT int tf_plan_create(const tf_block* block, tf_plan** plan);

// Fills the plan, and may fill it again later. The tensors are contiguous, all of them are of `dtype` (TF_F32, TF_BF16
// or TF_F16), and they lie as torch holds them (the weight of a Linear is (outputs, inputs)). NULL stands for a tensor
// that is absent: then a bias is 0 and the gain of a norm is 1. The tensors are, in this order:
//   proj_in weight, bias, pos_embed, proj_out weight, bias;
//   for each layer attention.norm weight, bias, qkv weight, bias, proj weight, bias,
//                  mlp.norm weight, bias, fc1 weight, bias, fc2 weight, bias;
//   class_embed (classes, 1, C).
// TF_NOT_FINITE means that tensor number *bad holds NaN or infinity, and then the plan must not be used. No run may use
// the plan while it is filled.
TF_EXPORT int tf_plan_pack(tf_plan* plan, const void* const* tensors, int dtype, int threads, int64_t* bad);

// Says that the plan is kept only for a later tf_plan_pack. Until then the system may take its memory back, page by
// page. Returns 1 if it may, and 0 where that is not worth it or not possible.
TF_EXPORT int tf_plan_rest(tf_plan* plan);
TF_EXPORT void tf_plan_destroy(tf_plan* plan);

// The bytes of a workspace for passes of `rows` rows (twice the batch under guidance) of `window` tokens each, on up to
// `threads` threads. It is -1 when the sizes are out of range or the bytes do not fit 64 bits.
TF_EXPORT int64_t tf_workspace_bytes(const tf_block* block, int64_t rows, int64_t window, int threads);
TF_EXPORT int tf_workspace_create(const tf_block* block, int64_t rows, int64_t window, int threads,
                                  tf_workspace** workspace);
TF_EXPORT int tf_workspace_rest(tf_workspace* workspace);  // as tf_plan_rest, until the next run
TF_EXPORT void tf_workspace_destroy(tf_workspace* workspace);

// The inversion of a batch. Without guidance, row b of the batch is engine row b. With guidance it is two engine rows:
// 2b is conditional, and 2b + 1 is unguided. R is the number of engine rows.
typedef struct tf_inversion {
    const float* z;   // (B, T, D)
    float* x;         // (B, T, D); it does not alias z
    double* log_det;  // (B,): log |dx / dz|
    // (B,), below `classes`. A negative label, or NULL for all of them, stands for no label: then the mean class
    // embedding is taken.
    const int64_t* labels;
    const float* query_scale;  // (R,): factors on the attention logits; NULL stands for 1
    const float* guidance;     // (B,): weights; NULL without guidance
    const int32_t* order;      // (T,): the place in z, x and pos_embed of the i-th token that the net sees; NULL: i
    double* clock;             // (threads, TF_PARTS): the seconds spent in each part are added; NULL: none are counted
    int64_t batch;
    int32_t guided_parts;  // bit p: guidance acts on part p of the parameters
    int32_t annealed, split;
} tf_inversion;

// Inverts the block. `order` must be a permutation. This function checks that its values lie in [0, T) and returns
// TF_BAD_SIZE where they do not. A place that a wrong order leaves out is not written in x.
//
// Work is counted in stages: L + 2 for a token, and (T - 1) (L + 2) in all. *stage is 0 at first. A call goes on from
// *stage and advances it. It returns at the end, or after `seconds`, give or take one stage; a first call that splits
// rows may take one whole token. Between the calls of one inversion no other run may use the workspace, and x, z and
// the rest must stay as they are.
TF_EXPORT int tf_invert(const tf_plan* plan, tf_workspace* workspace, const tf_inversion* inversion, int64_t* stage,
                        double seconds, int threads);

// One pass of the net over tokens position .. position + window (net order) of every row. The inputs of all these
// tokens are given. Rows may have positions of their own, and may be some of the rows of an earlier pass alone.
typedef struct tf_pass_arguments {
    const float* tokens;       // (rows, window, D); when guided (rows / 2, window, D), each row for two engine rows
    const int64_t* labels;     // as above, one for each row of `tokens`
    const float* query_scale;  // as above
    const int32_t* order;      // as above, but only for the places in pos_embed
    // (rows, window, D times the parts of the transform's parameters). With z and guidance, the first of the two engine
    // rows of a row of `tokens` holds the guided parameters.
    float* ab;
    const int64_t* positions;  // one for each row of `tokens`; NULL: `position` for all
    const int64_t* slots;      // where in the cache each row of `tokens` is kept, ascending; NULL: 0, 1, 2, ...
    // The tokens that follow those given, as tf_invert finds them:  x = transform(z, parameters).
    const float* z;         // as `tokens`: of each token, the noise of the one after it; NULL: there are no x and log_det
    float* x;               // as z
    double* log_det;        // (rows, window), or when guided (rows / 2, window): log |dx / dz|
    const float* guidance;  // one weight for each row of `tokens`; used only when guided
    int64_t rows, window, position;
    int32_t guided, split, guided_parts, annealed;  // the last two as above, for x
} tf_pass_arguments;

// The pass reads the keys and values of the tokens before its own from the workspace, and writes those of its own
// tokens. A later pass may overwrite them. Results do not depend on how the tokens are cut into passes.
TF_EXPORT int tf_pass(const tf_plan* plan, tf_workspace* workspace, const tf_pass_arguments* arguments, int threads);

// Where a row is on its way through an inversion by windows.
typedef struct tf_window_row {
    int64_t final_place;  // of its last final token, in net order
    int64_t alone;        // before this place it goes one token after another
    int64_t idle;         // passes, one after another, that gained no more than one token would have
    int64_t fallbacks;    // windows that went one token after another
    int64_t lost;         // whether it overflowed
} tf_window_row;

// The state of an inversion by windows (tarflow_fast/solvers/windows.py). The caller sets the members up to
// `drafted`, and all numbers after it are 0 at first.
typedef struct tf_windows {
    tf_window_row* rows;  // (B,)
    int64_t* accepted;    // (T - 1, B), all 0 at first: the tokens of each row that each pass made final
    float* residual;      // (B,): the largest over tokens and D of |x' - x| of a token x that was accepted
    int64_t window;       // W
    int64_t call_tokens;  // a pass over more tokens of all engine rows than this is cut into several native passes
    float tolerance;      // the largest residual of an accepted token; 0: no bit of it moved
    int32_t drafted;     // whether x holds first values of all tokens, which are else guessed one after another
    int64_t passes, single;  // passes done, and how many of them took one token of each row
    int64_t work, solved;    // tokens of all rows in all passes, and tokens made final
    int64_t width, next;     // of the pass under way: its tokens of a row, 0 for none, and the row that comes next
} tf_windows;

// Inverts the block by windows. A call goes on from `state` and returns when `solved` is B (T - 1), or after `seconds`,
// give or take a pass of `call_tokens`. The workspace has room for all engine rows and min(W, T - 1) tokens. The clock
// is not read. As with tf_invert, nothing else may change between the calls of one inversion. TF_NO_MEMORY is possible.
TF_EXPORT int tf_invert_windows(const tf_plan* plan, tf_workspace* workspace, const tf_inversion* inversion,
                                tf_windows* state, double seconds, int threads);

// ---- one sweep through a masked autoregressive net (its Python side: tarflow_fast/made/engine.py) -------------------
//
// The net and its steps are described in tarflow_fast/made/net.py and schedule.py. Vector 0 is x, and vector l is the
// output of layer l, counted from 1; the last one holds the parameters of the univariate transforms. The units of a
// vector stand in the order of their steps.

enum tf_made_activation {
    TF_MADE_IDENTITY,
    TF_MADE_RELU,
    TF_MADE_LEAKY_RELU,
    TF_MADE_ELU,
    TF_MADE_TANH,
    TF_MADE_SIGMOID,
    TF_MADE_SILU,
    TF_MADE_GELU,
};

// The forms of the libraries; the constants that each takes stand in tarflow_fast/made/engine.py.
enum tf_made_univariate {
    TF_MADE_AFFINE_ZUKO,
    TF_MADE_AFFINE_SOFTPLUS,
    TF_MADE_AFFINE_SIGMOID,
    TF_MADE_AFFINE_EXP,
    TF_MADE_SPLINE_ZUKO,
    TF_MADE_SPLINE,
    TF_MADE_SPLINE_TORCHFLOWS,
};

// f(W c + bias) of the context c of a row.
typedef struct tf_made_context {
    const void* weight;  // (units, stride), of which the first columns are read; NULL: there is no such vector
    const void* bias;    // (units,), or NULL
    int64_t stride;
    double slope;
    int32_t activation;
} tf_made_context;

typedef struct tf_made_layer {
    const void* weight;         // (units, weight_stride), of which the first columns are those of the source
    const uint8_t* mask;        // (units, mask_stride): 0 or 1
    const void* bias;           // (units,), or NULL
    const int32_t* places;      // (units,): which unit stands at each place
    const int32_t* starts;      // (steps + 1,): how many units are final before each step
    const int32_t* residual_at; // (units,): the place in `residual` of what is added at each place, or NULL
    int64_t units, weight_stride, mask_stride;
    tf_made_context term, gate; // what the context adds to the bias, and what it multiplies the sum by
    double slope;               // of the activation below zero
    int32_t source;             // the vector it reads
    int32_t reads_raw;          // whether it reads that vector as it is, or after its activation
    int32_t residual;           // the vector that is added as it is, or -1
    int32_t activation;         // of its own output, for those who read it so
    int32_t keeps_raw;          // whether someone reads its own output as it is
} tf_made_layer;

typedef struct tf_made {
    const tf_made_layer* layers;
    const int32_t* places;  // (features,)
    const int32_t* starts;  // (steps + 1,): how many features have their parameters before each step
    const int32_t* blocks;  // (block_count + 1,): steps, from 0 to `steps`; what a block needs of earlier blocks is one
                            // product of matrices
    double constants[8];
    int64_t features, steps, block_count, parameters, context;  // parameters of one feature; numbers of a context
    int32_t layer_count, univariate, dtype;            // dtype: TF_F32 or TF_F64, of all tensors
} tf_made;

typedef struct tf_made_rows {
    const void* y;           // (rows, features)
    void* x;                 // (rows, features); it does not alias y
    void* log_det;           // (rows,): log |det dx / dy|
    const void* context;     // (rows, context_stride), or NULL
    int64_t context_stride;  // 0 when all rows share one context
    int64_t rows;
} tf_made_rows;

// How many numbers the packed weights take.
TF_EXPORT int64_t tf_made_numbers(const tf_made* made);

// Packs the weights in the order in which the sweep reads them. TF_NO_MEMORY is possible.
TF_EXPORT int tf_made_pack(const tf_made* made, void* packed, int threads);

// Inverts the rows. TF_NO_MEMORY is possible. A row's result depends on that row alone.
TF_EXPORT int tf_made_invert(const tf_made* made, const void* packed, const tf_made_rows* rows, int threads);

// ---- what the machine can do at best, for benchmarks ----------------------------------------------------------------

// Reads p, (n,) float32, split over `threads`, and returns the bytes that it read.
TF_EXPORT double tf_peak_read(const float* p, int64_t n, int threads);

// Multiplies and adds in registers on `threads` threads, `steps` rounds on each, and returns the floating-point
// operations that it did. TF_F32 uses the fused multiply-add, and TF_BF16 the bfloat16 dot product. The result is 0 if
// the instruction set has no such instruction.
TF_EXPORT double tf_peak_flops(int dtype, int64_t steps, int threads);

// ---- test access to the SIMD layer ----------------------------------------------------------------------------------

// y[k] = exp(x[k]). x and y are (n,) float32, and may be the same. It uses one thread.
TF_EXPORT void tf_test_exp(const float* x, float* y, int64_t n);

// y = x, stored as `dtype` (TF_BF16 or TF_F16) and read back. x and y are (n,) float32, and may be the same. It uses
// one thread.
TF_EXPORT int tf_test_round(const float* x, float* y, int64_t n, int dtype);

// y[k] = GELU(x[k]). x and y are (n,) float32, and may be the same. It uses one thread.
TF_EXPORT void tf_test_gelu(const float* x, float* y, int64_t n);

// y = x w^T + bias in a precision. All are float32: x (rows, inputs), w (columns, inputs), bias (columns,), y (rows,
// columns). TF_NO_MEMORY is possible.
TF_EXPORT int tf_test_matmul(const float* x, const float* w, const float* bias, float* y, int64_t rows, int64_t columns,
                             int64_t inputs, int precision);
