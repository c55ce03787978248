// What is done to rows between gemms, in either stack: embedding, residual and norm, the feed-forward gate.
//
// Compiled for one stack by kernels.py, which defines D_MODEL, D_FF, GATED and EPSILON. A row is a token. The residual stream is fp32,
// what the gemms read and write is fp16; norms are fp32.

namespace {

// A block has one row, a thread one vector of it: whether a row is one of thirty thousand or of one, it takes no longer than it must.
constexpr int VECTORS = D_MODEL / VECTOR, WARPS_A_ROW = (VECTORS + 31) / 32;
static_assert(D_MODEL % VECTOR == 0, "rows must be made of whole vectors");

__device__ void store_residual(const Vector& x, float* to) {
    float4* out = reinterpret_cast<float4*>(to);
    out[0] = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
    out[1] = make_float4(x.at[4], x.at[5], x.at[6], x.at[7]);
}

// x / sqrt(mean(x^2) + EPSILON) * weight; threads behind the row bring zeros and take nothing.
__device__ void store_normed(const Vector& x, bool inside, const float* weight, __half* to) {
    __shared__ float sums[WARPS_A_ROW];
    float4 low = {}, high = {};
    if (inside) {  // now, so that they are there when the sum is
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
    for (int warp = 0; warp < WARPS_A_ROW; ++warp) squares += sums[warp];
    if (!inside) return;
    const float factor = rsqrtf(squares * (1.f / D_MODEL) + EPSILON);
    Vector made;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) made.at[i] = x.at[i] * factor * weights[i];
    store(to, narrow(made));
}

}  // namespace

// Token ids to the residual stream, and its first norm, for a gemm of `k_splits` k_splits. Grid (rows), block WARPS_A_ROW * 32.
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

// Adds what a gemm made in `splits_in` to the residual stream, and norms it for a gemm of `k_splits`. With `destinations`, and then
// in one part, the norm goes to that row of `normed`, and the residual stream, which nobody reads after that, is left as it is.
// Grid (rows), block WARPS_A_ROW * 32.
extern "C" __global__ void add_and_norm(
    const __half* __restrict__ made, int splits_in, const float* __restrict__ weight, const int* __restrict__ destinations, int k_splits,
    float* __restrict__ residual, __half* __restrict__ normed)
{
    const size_t row = blockIdx.x;
    const int column = threadIdx.x * VECTOR;
    const bool inside = threadIdx.x < VECTORS;
    const size_t at = row * D_MODEL + column;
    grid_dependency_wait(made, normed, residual);
    Vector x = {};
    if (inside) {
        const float4* before = reinterpret_cast<const float4*>(residual + at);
        const float4 low = before[0], high = before[1];
        const float added[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        x = sum_splits(made + at, splits_in, static_cast<size_t>(gridDim.x) * D_MODEL);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x.at[i] += added[i];
        if (destinations == nullptr) store_residual(x, residual + at);
    }
    const size_t target = destinations == nullptr ? row : destinations[row];
    store_normed(x, inside, weight + column, normed + split_offset(target, gridDim.x, column, D_MODEL, k_splits));
}

// The inner activation of the feed-forward layer, for a gemm of `k_splits` k_splits: gelu(first half) * second half, or relu. A thread a
// vector.
extern "C" __global__ void activate(const __half* __restrict__ inner, int rows, int k_splits, __half* __restrict__ out)
{
    constexpr int A_ROW = D_FF / VECTOR;
    static_assert(D_FF % VECTOR == 0, "rows must be made of whole vectors");
    const size_t index = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = index / A_ROW;
    const int column = index % A_ROW * VECTOR;
    grid_dependency_wait(inner, out);
    if (row >= rows) return;
#if GATED
    Vector x = widen(load(inner + row * 2 * D_FF + column));
    const Vector linear = widen(load(inner + row * 2 * D_FF + D_FF + column));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        // gelu in its tanh form: (1 + tanh u) / 2 is 1 / (1 + exp(-2u))
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
