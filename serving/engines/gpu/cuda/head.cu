// The end of a decoder step: logits of the last hidden state, and of each row the likeliest token.
//
// Compiled for one reader by kernels.py, which defines D_MODEL, VOCAB, HEAD_WARPS and HEAD_ROWS (a block's) and COMBINE_THREADS. As a
// gemm of its own the head would write all logits, for most of which nobody asks, and in fp32, since they may not be rounded to half.

namespace {

// The best of some tokens: its logit, the sum of exponentials of all of them relative to that, and its id.
struct ArgmaxLogSumExp {
    float largest, total;
    int token;

    __device__ static ArgmaxLogSumExp none() { return {LEAST, 0.f, VOCAB}; }

    // Of equals the lowest id stays.
    __device__ void combine(const ArgmaxLogSumExp& other) {
        const float joint = fmaxf(largest, other.largest);
        total = total * __expf(largest - joint) + other.total * __expf(other.largest - joint);
        if (other.largest > largest || (other.largest == largest && other.token < token)) token = other.token;
        largest = joint;
    }

    __device__ void combine_lane(int step) {
        combine({__shfl_xor_sync(ALL, largest, step), __shfl_xor_sync(ALL, total, step), __shfl_xor_sync(ALL, token, step)});
    }
};

}  // namespace

// A block has 16 token ids a warp and up to HEAD_ROWS rows, and leaves the choice of each row among its tokens. Weights are read once,
// straight into the tensor cores' registers: of every 32 columns a thread has eight neighbouring ones. That numbers the columns of a tile
// otherwise than they lie, but for weights and rows alike.
// Grid (HEAD_BLOCKS, batch / HEAD_ROWS rounded up), block HEAD_WARPS * 32.
extern "C" __global__ void __launch_bounds__(HEAD_WARPS * 32, 2) head_argmax(
    const __half* __restrict__ hidden,  // [batch][D_MODEL]
    const __half* __restrict__ head,    // [VOCAB][D_MODEL]
    const float* __restrict__ eos_penalty, int eos, int batch,
    ArgmaxLogSumExp* __restrict__ found)  // [HEAD_BLOCKS][batch]
{
    constexpr int TILES = HEAD_ROWS / 8, AHEAD = 4, ROUND = AHEAD * 4 * VECTOR;  // a round's columns
    __shared__ ArgmaxLogSumExp of_warp[HEAD_WARPS][HEAD_ROWS];
    __shared__ __align__(16) __half staged[2][HEAD_ROWS][ROUND + 4 * VECTOR];  // this round's rows and the next one's, 16 banks apart
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int first = blockIdx.y * HEAD_ROWS, rows = min(batch - first, HEAD_ROWS);
    const int token = (static_cast<int>(blockIdx.x) * HEAD_WARPS + warp) * 16 + group, tokens[2] = {token, token + 8};
    const __half* low = head + static_cast<size_t>(min(tokens[0], VOCAB - 1)) * D_MODEL;
    const __half* high = head + static_cast<size_t>(min(tokens[1], VOCAB - 1)) * D_MODEL;
    // Past the last column weights are zeros, so what lies in the stage there must only be a number: the last vector once more.
    const auto stage = [&](int start, int into) {
        for (int i = threadIdx.x; i < rows * (ROUND / VECTOR); i += HEAD_WARPS * 32) {
            const int row = i / (ROUND / VECTOR), column = i % (ROUND / VECTOR) * VECTOR;
            copy_async(&staged[into][row][column], hidden + static_cast<size_t>(first + row) * D_MODEL + min(start + column, D_MODEL - VECTOR));
        }
        commit_copies();
    };
    uint4 a[AHEAD], b[AHEAD];
    const auto fetch = [&](int start, uint4(&of_low)[AHEAD], uint4(&of_high)[AHEAD]) {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int column = start + (u * 4 + pair) * VECTOR;
            const bool inside = column < D_MODEL;
            of_low[u] = inside ? __ldcs(reinterpret_cast<const uint4*>(low + column)) : uint4{};
            of_high[u] = inside ? __ldcs(reinterpret_cast<const uint4*>(high + column)) : uint4{};
        }
    };
    fetch(0, a, b);
    grid_dependency_wait(hidden, found);
    stage(0, 0);
    float logits[TILES][4] = {};
    for (int start = 0, now = 0; start < D_MODEL; start += ROUND, now ^= 1) {
        uint4 next_a[AHEAD], next_b[AHEAD];
        fetch(start + ROUND, next_a, next_b);
        wait_for_copies<0>();
        __syncthreads();  // this round's rows are there, and nobody reads the last round's any more
        if (start + ROUND < D_MODEL) stage(start + ROUND, now ^ 1);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const unsigned left[4] = {a[u].x, b[u].x, a[u].y, b[u].y}, right[4] = {a[u].z, b[u].z, a[u].w, b[u].w};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                if (tile * 8 >= rows) break;
                const uint4 bits = load(&staged[now][min(tile * 8 + group, rows - 1)][(u * 4 + pair) * VECTOR]);
                multiply(logits[tile], left, bits.x, bits.y);
                multiply(logits[tile], right, bits.z, bits.w);
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            a[u] = next_a[u];
            b[u] = next_b[u];
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = tile * 8 + pair * 2 + i;
            ArgmaxLogSumExp choice = ArgmaxLogSumExp::none();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (tokens[half] >= VOCAB || row >= rows) continue;
                const float logit = logits[tile][2 * half + i] + (tokens[half] == eos ? eos_penalty[first + row] : 0.f);
                choice.combine({logit, 1.f, tokens[half]});
            }
#pragma unroll
            for (int step = 4; step < 32; step *= 2) choice.combine_lane(step);
            if (group == 0) of_warp[warp][row] = choice;
        }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += HEAD_WARPS * 32) {
        ArgmaxLogSumExp choice = of_warp[0][row];
        for (int w = 1; w < HEAD_WARPS; ++w) choice.combine(of_warp[w][row]);
        found[blockIdx.x * batch + first + row] = choice;
    }
}

// The likeliest token of each row and its log-probability, from what the head's blocks found. Grid (batch), block COMBINE_THREADS.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine_argmax(
    const ArgmaxLogSumExp* __restrict__ found, int blocks, int* __restrict__ token, float* __restrict__ log_prob)
{
    __shared__ ArgmaxLogSumExp of_warp[COMBINE_THREADS / 32];
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    ArgmaxLogSumExp choice = ArgmaxLogSumExp::none();
    grid_dependency_wait(found, token, log_prob);
    for (int block = threadIdx.x; block < blocks; block += COMBINE_THREADS) choice.combine(found[block * gridDim.x + row]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) choice.combine_lane(step);
    if (lane == 0) of_warp[warp] = choice;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < COMBINE_THREADS / 32; ++w) choice.combine(of_warp[w]);
    token[row] = min(choice.token, VOCAB - 1);  // where all logits are NaN nothing was chosen, and the next step looks the token up
    log_prob[row] = -logf(choice.total);
}
