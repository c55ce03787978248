// Attention of a decoder step over the caches: the code that self_attention.cu and cross_attention.cu share.
//
// kernels.py compiles the three files together for one reader. It defines D_KV, HEADS, KV_HEADS, WARPS (per block), WARP_TOKENS (tokens
// that a warp of cross-attention with shared keys processes at a time), ATTRIBUTION_TOKENS (per block) and CROSS_FP8 (whether the cache of
// cross-attention is in e4m3).
//
// A cache is half[slots][capacity][2 * KV_HEADS * D_KV]: for each token the keys of all heads, then the values of all heads. A step reads
// each valid token once, so memory bandwidth bounds these kernels: they must keep enough loads in flight. Sums and softmax are in fp32.
// A lane loads 16 bytes at a time, which are N numbers of a token: 8 in half precision, 16 in e4m3.

namespace {

constexpr int GROUP = HEADS / KV_HEADS;      // query heads per key/value head
constexpr int LANES = D_KV / VECTOR;         // neighbouring lanes that together hold one token's key
constexpr int TOKENS = 32 / LANES;           // tokens that a warp reads at a time
constexpr int UNROLL = 4;                    // loads in flight per thread, of keys and of values
constexpr int STRIDE = 2 * KV_HEADS * D_KV;  // halves per token in a cache
static_assert(D_KV % VECTOR == 0 && 32 % LANES == 0, "D_KV / 8 must be a power of two that is at most 32");
static_assert(HEADS % KV_HEADS == 0, "HEADS must be a multiple of KV_HEADS");

// Sum over the lanes that hold one token, each N numbers of it; every one of them gets it.
template <int N> __device__ float sum_of_token(float x) {
#pragma unroll
    for (int step = 1; step < D_KV / N; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// State of an online softmax: the largest score so far, the sum of the weights exp(score - largest), and the weighted sum of the values in
// this lane's N dimensions.
template <int N> struct OnlineSoftmax {
    float largest = LOWEST, total = 0.f;
    Floats<N> value = {};

    __device__ void rescale(float new_largest) {
        const float factor = __expf(largest - new_largest);
        total *= factor;
#pragma unroll
        for (int i = 0; i < N; ++i) value.at[i] *= factor;
        largest = new_largest;
    }

    __device__ void add(float score, const Floats<N>& v) {
        const float weight = __expf(score - largest);
        total += weight;
#pragma unroll
        for (int i = 0; i < N; ++i) value.at[i] += weight * v.at[i];
    }

    // Combines the states of all lanes of a warp; every lane gets the result.
    __device__ void combine_warp() {
#pragma unroll
        for (int step = D_KV / N; step < 32; step *= 2) {
            rescale(fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step)));
            total += __shfl_xor_sync(0xffffffff, total, step);
#pragma unroll
            for (int i = 0; i < N; ++i) value.at[i] += __shfl_xor_sync(0xffffffff, value.at[i], step);
        }
    }
};

template <int N> __device__ float dot(const Floats<N>& a, const Floats<N>& b) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += a.at[i] * b.at[i];
    return sum;
}

// Combines the states of a block's warps through shared memory. Thread d < D_KV gets the value of dimension d, not yet divided by `total`.
struct Combined { float largest, total, value; };

template <int N> __device__ Combined combine_block(OnlineSoftmax<N>& state, float (*shared)[D_KV + 2]) {
    state.combine_warp();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane < D_KV / N) {
#pragma unroll
        for (int i = 0; i < N; ++i) shared[warp][lane * N + i] = state.value.at[i];
        if (lane == 0) {
            shared[warp][D_KV] = state.largest;
            shared[warp][D_KV + 1] = state.total;
        }
    }
    __syncthreads();
    Combined combined = {LOWEST, 0.f, 0.f};
    for (int w = 0; w < WARPS; ++w) combined.largest = fmaxf(combined.largest, shared[w][D_KV]);
    for (int w = 0; w < WARPS; ++w) {
        const float factor = __expf(shared[w][D_KV] - combined.largest);
        combined.total += shared[w][D_KV + 1] * factor;
        if (threadIdx.x < D_KV) combined.value += shared[w][threadIdx.x] * factor;
    }
    return combined;
}

}  // namespace
