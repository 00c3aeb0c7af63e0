// The affine step of a flow block, its gradient, and the update of a sampling step (tarflow_fast/ops/affine.py).
//
// A block of threads owns a run of elements of one row, and its length does not depend on the batch. Each thread's
// share of the run is fixed. So the same sums are added in the same order in every run and for every batch.
#include "types.cuh"

namespace tf {
namespace {

constexpr int THREADS = 256, ROUNDS = 4, PACK = 4;  // a block owns 4096 elements in packs of 4, fewer when D is odd

struct Problem {
    int64_t B, T, D;
    bool scale, flip;

    __host__ __device__ int64_t ab_width() const { return scale ? 2 * D : D; }
    // The first element of token j, in net order, in a (B, T, D) tensor.
    __device__ int64_t place(int64_t row, int64_t j) const { return (row * T + (flip ? T - 1 - j : j)) * D; }
};

int64_t blocks_a_row(int64_t T, int64_t D, int pack) {
    const int64_t elements = int64_t(THREADS) * ROUNDS * pack;
    return (T * D + elements - 1) / elements;
}

__device__ float exponential(float a) { return expf(a); }
__device__ double exponential(double a) { return exp(a); }

// The sum over a block of threads, always in the same order. Thread 0 gets it.
__device__ double block_sum(double value) {
    __shared__ double shared[THREADS / 32];
    for (int step = 16; step; step /= 2) value += __shfl_down_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < int(blockDim.x) / 32; ++warp) value += shared[warp];
    return value;
}

// Calls f(row, token in net order, first of N elements) for the elements of this block of threads.
template <int N, class F>
__device__ void for_elements(const Problem& p, int64_t row_blocks, F f) {
    const int64_t row = blockIdx.x / row_blocks, first = blockIdx.x % row_blocks * THREADS * ROUNDS;
    for (int round = 0; round < ROUNDS; ++round) {
        const int64_t element = (first + round * THREADS + threadIdx.x) * N;
        if (element < p.T * p.D) f(row, element / p.D, element % p.D);
    }
}

template <class X, class A, int N>
__global__ void __launch_bounds__(THREADS) forward(const X* x, const A* ab, X* z, double* partial, Problem p,
                                                   int64_t row_blocks) {
    using C = typename Compute<X>::type;
    double total = 0;
    for_elements<N>(p, row_blocks, [&](int64_t row, int64_t j, int64_t d) {
        const int64_t at = p.place(row, j) + d, from = (row * p.T + j - 1) * p.ab_width() + d;
        Pack<X, N> y = *reinterpret_cast<const Pack<X, N>*>(x + at);
        if (j > 0) {
            const Pack<A, N> b = *reinterpret_cast<const Pack<A, N>*>(ab + from + (p.scale ? p.D : 0));
            Pack<A, N> a;
            if (p.scale) a = *reinterpret_cast<const Pack<A, N>*>(ab + from);
            for (int k = 0; k < N; ++k) {
                const C log_scale = p.scale ? C(a.at[k]) : C(0);
                y.at[k] = X((C(y.at[k]) - C(b.at[k])) * (p.scale ? exponential(-log_scale) : C(1)));
                total += double(log_scale);
            }
        }
        *reinterpret_cast<Pack<X, N>*>(z + at) = y;
    });
    total = block_sum(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <class L>
__global__ void __launch_bounds__(THREADS) log_det_of(const double* partial, L* log_det, int64_t row_blocks) {
    double total = 0;
    for (int64_t k = threadIdx.x; k < row_blocks; k += THREADS) total += partial[blockIdx.x * row_blocks + k];
    total = block_sum(total);
    if (threadIdx.x == 0) log_det[blockIdx.x] = L(0.0 - total);  // 0 - 0 is +0
}

template <class X, class A, class L, int N>
__global__ void __launch_bounds__(THREADS) backward(const X* dz, const L* dlog_det, const X* x, const A* ab, X* dx,
                                                    A* dab, Problem p, int64_t row_blocks) {
    using C = typename Compute<X>::type;
    for_elements<N>(p, row_blocks, [&](int64_t row, int64_t j, int64_t d) {
        const int64_t at = p.place(row, j) + d;
        Pack<X, N> g = *reinterpret_cast<const Pack<X, N>*>(dz + at);
        // Nothing conditions token 0. Its threads write the zeros of dab at the last token, which conditions nothing.
        const int64_t from = (row * p.T + (j > 0 ? j - 1 : p.T - 1)) * p.ab_width() + d;
        Pack<A, N> da = {}, db = {};
        if (j > 0) {
            const Pack<X, N> y = *reinterpret_cast<const Pack<X, N>*>(x + at);
            Pack<A, N> a, b;
            if (p.scale) a = *reinterpret_cast<const Pack<A, N>*>(ab + from);
            if (p.scale) b = *reinterpret_cast<const Pack<A, N>*>(ab + from + p.D);
            for (int k = 0; k < N; ++k) {
                C value = C(g.at[k]);
                if (p.scale) {
                    value *= exponential(-C(a.at[k]));
                    da.at[k] = A(-(value * (C(y.at[k]) - C(b.at[k]))) - C(dlog_det[row]));
                }
                db.at[k] = A(-value);
                g.at[k] = X(value);
            }
        }
        if (p.scale) *reinterpret_cast<Pack<A, N>*>(dab + from) = da;
        *reinterpret_cast<Pack<A, N>*>(dab + from + (p.scale ? p.D : 0)) = db;
        *reinterpret_cast<Pack<X, N>*>(dx + at) = g;
    });
}

// One block of threads solves one row, because D is only 12 to 192.
template <class A>
__global__ void __launch_bounds__(THREADS) inverse(const A* ab, const float* z, float* x, float* sums,
                                                   const int32_t* position, const int32_t* order, const float* guidance,
                                                   Problem p, bool guided) {
    const int64_t row = blockIdx.x, at = position[row];
    if (at < 0 || at >= p.T - 1) return;
    const float ga = guided ? guidance[at] : 0, gb = guided ? guidance[p.T + at] : 0;
    const int64_t token = (row * p.T + order[at + 1]) * p.D;
    const A* own = ab + row * p.ab_width();
    const A* other = own + (guided ? p.B * p.ab_width() : 0);
    double total = 0;
    for (int64_t d = threadIdx.x; d < p.D; d += THREADS) {
        const int64_t shift = d + (p.scale ? p.D : 0);
        float a = p.scale ? float(own[d]) : 0, b = float(own[shift]);
        // A weight of zero leaves out the other pass, even where it holds NaN.
        if (ga != 0 && p.scale) a += ga * (a - float(other[d]));
        if (gb != 0) b += gb * (b - float(other[shift]));
        x[token + d] = p.scale ? z[token + d] * expf(a) + b : z[token + d] + b;
        total += a;
    }
    total = block_sum(total);
    if (threadIdx.x == 0) sums[row * p.T + at] = float(total);
}

// Whether packs of PACK elements lie aligned in every tensor.
template <class... Pointers>
bool packs(int64_t D, Pointers... pointers) {
    uintptr_t bits = 0;
    for (const void* pointer : {static_cast<const void*>(pointers)...}) bits |= uintptr_t(pointer);
    return D % PACK == 0 && bits % 16 == 0;
}

}  // namespace
}  // namespace tf

using namespace tf;

int tf_cuda_abi_version(void) { return TF_CUDA_ABI_VERSION; }

const char* tf_cuda_error(int status) { return cudaGetErrorString(cudaError_t(status - TF_CUDA_FAILED)); }

int64_t tf_cuda_affine_scratch(int64_t B, int64_t T, int64_t D) { return B * blocks_a_row(T, D, 1) * sizeof(double); }

int tf_cuda_affine_forward(const void* x, const void* ab, void* z, void* log_det, void* scratch, int64_t B, int64_t T,
                           int64_t D, int scale, int flip, int x_dtype, int ab_dtype, void* stream) {
    const Problem p = {B, T, D, scale != 0, flip != 0};
    const auto queue = static_cast<cudaStream_t>(stream);
    auto* partial = static_cast<double*>(scratch);
    return for_types(x_dtype, ab_dtype, [&](auto* X, auto* A, auto* L) {
        using XT = std::remove_pointer_t<decltype(X)>;
        using AT = std::remove_pointer_t<decltype(A)>;
        const bool packed = packs(D, x, ab, z);
        constexpr int N = sizeof(XT) == 8 ? PACK / 2 : PACK;  // 16 bytes at most
        const int64_t row_blocks = blocks_a_row(T, D, packed ? N : 1);
        if (B == 0) return int(TF_CUDA_OK);
        auto* kernel = packed ? forward<XT, AT, N> : forward<XT, AT, 1>;
        kernel<<<B * row_blocks, THREADS, 0, queue>>>((const XT*)x, (const AT*)ab, (XT*)z, partial, p, row_blocks);
        log_det_of<<<B, THREADS, 0, queue>>>(partial, (decltype(L))log_det, row_blocks);
        return launched();
    });
}

int tf_cuda_affine_backward(const void* dz, const void* dlog_det, const void* x, const void* ab, void* dx, void* dab,
                            int64_t B, int64_t T, int64_t D, int scale, int flip, int x_dtype, int ab_dtype,
                            void* stream) {
    const Problem p = {B, T, D, scale != 0, flip != 0};
    const auto queue = static_cast<cudaStream_t>(stream);
    return for_types(x_dtype, ab_dtype, [&](auto* X, auto* A, auto* L) {
        using XT = std::remove_pointer_t<decltype(X)>;
        using AT = std::remove_pointer_t<decltype(A)>;
        using LT = std::remove_pointer_t<decltype(L)>;
        const bool packed = packs(D, dz, x, ab, dx, dab);
        constexpr int N = sizeof(XT) == 8 ? PACK / 2 : PACK;  // 16 bytes at most
        const int64_t row_blocks = blocks_a_row(T, D, packed ? N : 1);
        if (B == 0) return int(TF_CUDA_OK);
        auto* kernel = packed ? backward<XT, AT, LT, N> : backward<XT, AT, LT, 1>;
        kernel<<<B * row_blocks, THREADS, 0, queue>>>((const XT*)dz, (const LT*)dlog_det, (const XT*)x, (const AT*)ab,
                                                      (XT*)dx, (AT*)dab, p, row_blocks);
        return launched();
    });
}

int tf_cuda_affine_inverse(const void* ab, const float* z, float* x, float* sums, const int32_t* position,
                           const int32_t* order, const float* guidance, int64_t B, int64_t T, int64_t D, int scale,
                           int guided, int ab_dtype, void* stream) {
    const Problem p = {B, T, D, scale != 0, false};
    const auto queue = static_cast<cudaStream_t>(stream);
    return for_types(TF_F32, ab_dtype, [&](auto*, auto* A, auto*) {
        using AT = std::remove_pointer_t<decltype(A)>;
        if (B == 0) return int(TF_CUDA_OK);
        inverse<<<B, THREADS, 0, queue>>>((const AT*)ab, z, x, sums, position, order, guidance, p, guided != 0);
        return launched();
    });
}
