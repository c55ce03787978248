// The kernels between the GEMMs of a stack: embedding, residual stream and norm, activation of the feed-forward layer.
//
// kernels.py compiles it for one stack. It defines D_MODEL, D_FF, GATED and EPSILON. A row is a token of the encoder or a sequence of the
// decoder. The residual stream and the norms are in fp32; GEMMs read and write fp16.

namespace {

// One block per row and one thread per vector: the latency is low for one row, and the throughput is high for thirty thousand.
constexpr int VECTORS = D_MODEL / VECTOR, WARPS_PER_ROW = (VECTORS + 31) / 32;
static_assert(D_MODEL % VECTOR == 0, "D_MODEL must be a multiple of 8");

__device__ void store_residual(const Vector& x, float* to) {
    float4* out = reinterpret_cast<float4*>(to);
    out[0] = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
    out[1] = make_float4(x.at[4], x.at[5], x.at[6], x.at[7]);
}

// Stores x / sqrt(mean(x^2) + EPSILON) * weight. All threads of the block call it; those beyond the row pass zeros and store nothing.
__device__ void store_normed(const Vector& x, bool inside, const float* weight, __half* to) {
    __shared__ float sums[WARPS_PER_ROW];
    float4 low = {}, high = {};
    if (inside) {  // load early, so that the weights arrive before the sum is complete
        low = reinterpret_cast<const float4*>(weight)[0];
        high = reinterpret_cast<const float4*>(weight)[1];
    }
    const float weights[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) squares += x.at[i] * x.at[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(ALL, squares, step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS_PER_ROW; ++warp) squares += sums[warp];
    if (!inside) return;
    const float factor = rsqrtf(squares * (1.f / D_MODEL) + EPSILON);
    Vector normed;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) normed.at[i] = x.at[i] * factor * weights[i];
    store(to, narrow(normed));
}

}  // namespace

// Looks up token ids; writes the residual stream and its first norm, as input of a GEMM with `k_splits` splits.
// Grid (rows), block WARPS_PER_ROW * 32.
extern "C" __global__ void embed(
    const int* __restrict__ tokens, const __half* __restrict__ embedding, const float* __restrict__ weight, int k_splits,
    float* __restrict__ residual, __half* __restrict__ normed)
{
    const size_t row = blockIdx.x;
    const int column = threadIdx.x * VECTOR;
    const bool inside = threadIdx.x < VECTORS;
    Vector x = {};
    if (inside) {
        x = widen(load(embedding + static_cast<size_t>(tokens[row]) * D_MODEL + column));
        store_residual(x, residual + row * D_MODEL + column);
    }
    store_normed(x, inside, weight + column, normed + split_offset(row, gridDim.x, column, D_MODEL, k_splits));
}

// Adds the output of a GEMM with `splits_in` splits to the residual stream, and writes its norm as input of a GEMM with `k_splits` splits.
// With `destinations` (then k_splits is 1) the norm of a row goes to that row of `normed`, and the residual stream is not written: this is
// the last norm of the stack.
// Grid (rows), block WARPS_PER_ROW * 32.
extern "C" __global__ void add_and_norm(
    const __half* __restrict__ y, int splits_in, const float* __restrict__ weight, const int* __restrict__ destinations, int k_splits,
    float* __restrict__ residual, __half* __restrict__ normed)
{
    const size_t row = blockIdx.x;
    const int column = threadIdx.x * VECTOR;
    const bool inside = threadIdx.x < VECTORS;
    const size_t at = row * D_MODEL + column;
    grid_dependency_wait(y, normed, residual);
    Vector x = {};
    if (inside) {
        const float4* before = reinterpret_cast<const float4*>(residual + at);
        const float4 low = before[0], high = before[1];
        const float added[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        x = sum_splits(y + at, splits_in, static_cast<size_t>(gridDim.x) * D_MODEL);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x.at[i] += added[i];
        if (destinations == nullptr) store_residual(x, residual + at);
    }
    const size_t target = destinations == nullptr ? row : destinations[row];
    store_normed(x, inside, weight + column, normed + split_offset(target, gridDim.x, column, D_MODEL, k_splits));
}

// The activation of the feed-forward layer, as input of a GEMM with `k_splits` splits: gelu(first half) * second half, or relu.
// One thread per vector.
extern "C" __global__ void activate(const __half* __restrict__ inner, int rows, int k_splits, __half* __restrict__ out)
{
    constexpr int ROW_VECTORS = D_FF / VECTOR;
    static_assert(D_FF % VECTOR == 0, "D_FF must be a multiple of 8");
    const size_t index = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = index / ROW_VECTORS;
    const int column = index % ROW_VECTORS * VECTOR;
    grid_dependency_wait(inner, out);
    if (row >= rows) return;
#if GATED
    Vector x = widen(load(inner + row * 2 * D_FF + column));
    const Vector linear = widen(load(inner + row * 2 * D_FF + D_FF + column));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        // gelu's tanh approximation: (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
        const float gate = x.at[i], u = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
        x.at[i] = __fdividef(gate, 1.f + __expf(-2.f * u)) * linear.at[i];
    }
#else
    Vector x = widen(load(inner + row * D_FF + column));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x.at[i] = fmaxf(x.at[i], 0.f);
#endif
    store(out + split_offset(row, rows, column, D_FF, k_splits), narrow(x));
}
