// The end of a decoder step: logits of the last hidden state, and of each row the likeliest token.
//
// Compiled for one reader by gpu_kernels.py, which defines D_MODEL, VOCAB, HEAD_WARPS and HEAD_ROWS (a block's) and PICK_THREADS. As a
// product of its own the head would write all logits, for most of which nobody asks, and in fp32, since they may not be rounded to half.

namespace {

// The best of some tokens: its logit, the sum of exponentials of all of them relative to that, and its id.
struct Choice {
    float largest, total;
    int token;

    __device__ static Choice none() { return {LEAST, 0.f, VOCAB}; }

    // Of equals the lowest id stays.
    __device__ void join(const Choice& other) {
        const float joint = fmaxf(largest, other.largest);
        total = total * __expf(largest - joint) + other.total * __expf(other.largest - joint);
        if (other.largest > largest || (other.largest == largest && other.token < token)) token = other.token;
        largest = joint;
    }

    __device__ void join_lane(int step) {
        join({__shfl_xor_sync(ALL, largest, step), __shfl_xor_sync(ALL, total, step), __shfl_xor_sync(ALL, token, step)});
    }
};

}  // namespace

// A block has 16 token ids a warp and up to HEAD_ROWS rows, and leaves the choice of each row among its tokens. Weights are read once,
// straight into the tensor cores' registers: of every 32 columns a thread has eight neighbouring ones. That numbers the columns of a tile
// otherwise than they lie, but for weights and rows alike.
// Grid (HEAD_BLOCKS, batch / HEAD_ROWS rounded up), block HEAD_WARPS * 32.
extern "C" __global__ void __launch_bounds__(HEAD_WARPS * 32, 2) score_tokens(
    const __half* __restrict__ hidden,  // [batch][D_MODEL]
    const __half* __restrict__ head,    // [VOCAB][D_MODEL]
    const float* __restrict__ eos_penalty, int eos, int batch,
    Choice* __restrict__ found)  // [HEAD_BLOCKS][batch]
{
    constexpr int TILES = HEAD_ROWS / 8, AHEAD = 4;  // AHEAD: loads of weights in flight, twice
    __shared__ Choice of_warp[HEAD_WARPS][HEAD_ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int first = blockIdx.y * HEAD_ROWS, rows = min(batch - first, HEAD_ROWS);
    const int token = (static_cast<int>(blockIdx.x) * HEAD_WARPS + warp) * 16 + group, tokens[2] = {token, token + 8};
    const __half* low = head + static_cast<size_t>(min(tokens[0], VOCAB - 1)) * D_MODEL;
    const __half* high = head + static_cast<size_t>(min(tokens[1], VOCAB - 1)) * D_MODEL;
    float logits[TILES][4] = {};
    for (int start = pair * VECTOR; start < D_MODEL + pair * VECTOR; start += AHEAD * 4 * VECTOR) {
        uint4 a[AHEAD] = {}, b[AHEAD] = {};
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int column = start + u * 4 * VECTOR;
            if (column >= D_MODEL) continue;
            a[u] = __ldcs(reinterpret_cast<const uint4*>(low + column));
            b[u] = __ldcs(reinterpret_cast<const uint4*>(high + column));
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int column = start + u * 4 * VECTOR;
            const unsigned left[4] = {a[u].x, b[u].x, a[u].y, b[u].y}, right[4] = {a[u].z, b[u].z, a[u].w, b[u].w};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                if (tile * 8 >= rows) break;
                const __half* row = hidden + static_cast<size_t>(first + min(tile * 8 + group, rows - 1)) * D_MODEL;
                const uint4 bits = column < D_MODEL ? load(row + column) : uint4{};
                multiply(logits[tile], left, bits.x, bits.y);
                multiply(logits[tile], right, bits.z, bits.w);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = tile * 8 + pair * 2 + i;
            Choice choice = Choice::none();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (tokens[half] >= VOCAB || row >= rows) continue;
                const float logit = logits[tile][2 * half + i] + (tokens[half] == eos ? eos_penalty[first + row] : 0.f);
                choice.join({logit, 1.f, tokens[half]});
            }
#pragma unroll
            for (int step = 4; step < 32; step *= 2) choice.join_lane(step);
            if (group == 0) of_warp[warp][row] = choice;
        }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += HEAD_WARPS * 32) {
        Choice choice = of_warp[0][row];
        for (int w = 1; w < HEAD_WARPS; ++w) choice.join(of_warp[w][row]);
        found[blockIdx.x * batch + first + row] = choice;
    }
}

// The likeliest token of each row and its log-probability, from what the head's blocks found. Grid (batch), block PICK_THREADS.
extern "C" __global__ void __launch_bounds__(PICK_THREADS) pick_token(
    const Choice* __restrict__ found, int blocks, int* __restrict__ token, float* __restrict__ log_prob)
{
    __shared__ Choice of_warp[PICK_THREADS / 32];
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Choice choice = Choice::none();
    for (int block = threadIdx.x; block < blocks; block += PICK_THREADS) choice.join(found[block * gridDim.x + row]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) choice.join_lane(step);
    if (lane == 0) of_warp[warp] = choice;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < PICK_THREADS / 32; ++w) choice.join(of_warp[w]);
    token[row] = choice.token;
    log_prob[row] = -logf(choice.total);
}
