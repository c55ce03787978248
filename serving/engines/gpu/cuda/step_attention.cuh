// Attention of a decoder step over the caches, what self_attention.cu and cross_attention.cu share.
//
// Compiled with both for one reader by kernels.py, which defines D_KV, HEADS, KV_HEADS, WARPS (a block), WARP_TOKENS (that a warp has
// at a time where heads share keys) and ATTRIBUTION_TOKENS (a block).
//
// A cache is half[slots][capacity][2 * KV_HEADS * D_KV]: of each token the keys of all heads, then the values. A step reads each valid token
// once, so memory bounds these kernels: they must ask for enough of it at a time. Sums and softmax are fp32.

namespace {

constexpr int GROUP = HEADS / KV_HEADS;      // query heads that read one key/value head
constexpr int LANES = D_KV / VECTOR;         // neighbouring lanes that hold one token's key between them
constexpr int TOKENS = 32 / LANES;           // tokens that a warp reads at once
constexpr int UNROLL = 4;                    // loads in flight a thread, of keys and of values each
constexpr int STRIDE = 2 * KV_HEADS * D_KV;  // halves a token
static_assert(D_KV % VECTOR == 0 && 32 % LANES == 0, "a key must fill a power of two of lanes");
static_assert(HEADS % KV_HEADS == 0, "query heads must share key heads evenly");

// The sum over the LANES lanes that hold one token, in all of them.
__device__ float sum_of_token(float x) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// A softmax in progress: the largest score, the sum of weights relative to it, and the weighted sum of values of this lane's dimensions.
struct OnlineSoftmax {
    float largest = LEAST, total = 0.f;
    Vector value = {};

    __device__ void rescale(float new_largest) {
        const float factor = __expf(largest - new_largest);
        total *= factor;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) value.at[i] *= factor;
        largest = new_largest;
    }

    __device__ void add(float score, const Vector& v) {
        const float weight = __expf(score - largest);
        total += weight;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) value.at[i] += weight * v.at[i];
    }

    // Joins the mixes of all tokens of a warp; every lane then has the warp's.
    __device__ void combine_warp() {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            rescale(fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step)));
            total += __shfl_xor_sync(0xffffffff, total, step);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) value.at[i] += __shfl_xor_sync(0xffffffff, value.at[i], step);
        }
    }
};

__device__ float dot(const Vector& a, const Vector& b) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sum += a.at[i] * b.at[i];
    return sum;
}

// The mixes of a block's warps, combined through shared memory. Thread d < D_KV gets the value of dimension d.
struct Combined { float largest, total, value; };

__device__ Combined combine_block(OnlineSoftmax& state, float (*shared)[D_KV + 2]) {
    state.combine_warp();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane < LANES) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) shared[warp][lane * VECTOR + i] = state.value.at[i];
        if (lane == 0) {
            shared[warp][D_KV] = state.largest;
            shared[warp][D_KV + 1] = state.total;
        }
    }
    __syncthreads();
    Combined combined = {LEAST, 0.f, 0.f};
    for (int w = 0; w < WARPS; ++w) combined.largest = fmaxf(combined.largest, shared[w][D_KV]);
    for (int w = 0; w < WARPS; ++w) {
        const float factor = __expf(shared[w][D_KV] - combined.largest);
        combined.total += shared[w][D_KV + 1] * factor;
        if (threadIdx.x < D_KV) combined.value += shared[w][threadIdx.x] * factor;
    }
    return combined;
}

}  // namespace
