// What is done to rows between products, in either stack: embedding, residual and norm, the feed-forward gate.
//
// Compiled for one stack by gpu_kernels.py, which defines D_MODEL, D_FF, GATED and EPSILON. A row is a token. The residual stream is fp32,
// what the products read and write is fp16; norms are fp32.

namespace {

constexpr int VECTORS = D_MODEL / VECTOR;          // of a row
constexpr int PER_LANE = (VECTORS + 31) / 32;
static_assert(D_MODEL % VECTOR == 0, "rows must be made of whole vectors");

// A warp has one row in its registers.
struct Row {
    Vector at[PER_LANE];
};

__device__ void store_residual(const Row& row, float* residual) {
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
        const int vector = threadIdx.x % 32 + 32 * v;
        if (vector >= VECTORS) break;
        float4* out = reinterpret_cast<float4*>(residual + vector * VECTOR);
        const float* x = row.at[v].at;
        out[0] = make_float4(x[0], x[1], x[2], x[3]);
        out[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
}

// x / sqrt(mean(x^2) + EPSILON) * weight
__device__ void store_normed(const Row& row, const float* weight, __half* normed) {
    float squares = 0.f;
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) squares += row.at[v].at[i] * row.at[v].at[i];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(ALL, squares, step);
    const float factor = rsqrtf(squares * (1.f / D_MODEL) + EPSILON);
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
        const int vector = threadIdx.x % 32 + 32 * v;
        if (vector >= VECTORS) break;
        Vector made;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) made.at[i] = row.at[v].at[i] * factor * weight[vector * VECTOR + i];
        store(normed + vector * VECTOR, narrow(made));
    }
}

}  // namespace

// Token ids to the residual stream, and its first norm. A warp a row.
extern "C" __global__ void embed(
    const int* __restrict__ tokens, const __half* __restrict__ embedding, const float* __restrict__ weight, int rows,
    float* __restrict__ residual, __half* __restrict__ normed)
{
    const size_t row = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    Row x = {};
    const __half* source = embedding + static_cast<size_t>(tokens[row]) * D_MODEL;
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
        const int vector = threadIdx.x % 32 + 32 * v;
        if (vector < VECTORS) x.at[v] = widen(load(source + vector * VECTOR));
    }
    store_residual(x, residual + row * D_MODEL);
    store_normed(x, weight, normed + row * D_MODEL);
}

// Adds what a product made to the residual stream, and norms it. With `destinations` the norm goes to that row of `normed`, and the
// residual stream, which nobody reads after that, is left as it is. A warp a row.
extern "C" __global__ void add_and_norm(
    const __half* __restrict__ made, const float* __restrict__ weight, const int* __restrict__ destinations, int rows,
    float* __restrict__ residual, __half* __restrict__ normed)
{
    const size_t row = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    Row x = {};
#pragma unroll
    for (int v = 0; v < PER_LANE; ++v) {
        const int vector = threadIdx.x % 32 + 32 * v;
        if (vector >= VECTORS) break;
        const size_t at = row * D_MODEL + vector * VECTOR;
        x.at[v] = widen(load(made + at));
        const float4* before = reinterpret_cast<const float4*>(residual + at);
        const float4 low = before[0], high = before[1];
        const float added[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x.at[v].at[i] += added[i];
    }
    if (destinations == nullptr) store_residual(x, residual + row * D_MODEL);
    const size_t target = destinations == nullptr ? row : destinations[row];
    store_normed(x, weight, normed + target * D_MODEL);
}

// The inner activation of the feed-forward layer: gelu(first half) * second half, or relu. A thread a vector.
extern "C" __global__ void activate(const __half* __restrict__ inner, int rows, __half* __restrict__ out)
{
    constexpr int A_ROW = D_FF / VECTOR;
    static_assert(D_FF % VECTOR == 0, "rows must be made of whole vectors");
    const size_t index = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = index / A_ROW, column = index % A_ROW * VECTOR;
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
    store(out + row * D_FF + column, narrow(x));
}
