// The LM head of a decoder step: the token with the largest logit of each row, and its log-probability.
//
// kernels.py compiles it for one reader. It defines D_MODEL, VOCAB, HEAD_WARPS and HEAD_ROWS (per block) and COMBINE_THREADS. A GEMM would
// write all logits to memory, in fp32, as fp16 would change the best of near ties. These kernels keep only an argmax and a log-sum-exp.

namespace {

// Argmax and log-sum-exp over some tokens: the largest logit, the sum of exp(logit - largest), and the token with the largest logit.
struct ArgmaxLogSumExp {
    float largest, total;
    int token;

    __device__ static ArgmaxLogSumExp none() { return {LOWEST, 0.f, VOCAB}; }

    // Of equal logits the lowest token id wins.
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

// A block computes the logits of HEAD_WARPS * 16 token ids for up to HEAD_ROWS rows, and writes each row's argmax among these tokens.
// Weights are read once, straight into registers: of every 32 columns a thread loads eight neighbouring ones. That renumbers the columns of
// a tile, for weights and rows alike, and a sum does not depend on the order of its terms.
// Grid (HEAD_BLOCKS, batch / HEAD_ROWS rounded up), block HEAD_WARPS * 32.
extern "C" __global__ void __launch_bounds__(HEAD_WARPS * 32, 2) head_argmax(
    const __half* __restrict__ hidden,  // [batch][D_MODEL]
    const __half* __restrict__ head,    // [VOCAB][D_MODEL]
    const float* __restrict__ eos_penalty, int eos, int batch,
    ArgmaxLogSumExp* __restrict__ found)  // [HEAD_BLOCKS][batch]
{
    constexpr int TILES = HEAD_ROWS / 8, AHEAD = 4, ROUND = AHEAD * 4 * VECTOR;  // columns per round
    __shared__ ArgmaxLogSumExp warp_best[HEAD_WARPS][HEAD_ROWS];
    __shared__ __align__(16) __half staged[2][HEAD_ROWS][ROUND + 4 * VECTOR];  // rows of this and the next round
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int first = blockIdx.y * HEAD_ROWS, rows = min(batch - first, HEAD_ROWS);
    const int token = (static_cast<int>(blockIdx.x) * HEAD_WARPS + warp) * 16 + group, tokens[2] = {token, token + 8};
    const __half* low = head + static_cast<size_t>(min(tokens[0], VOCAB - 1)) * D_MODEL;
    const __half* high = head + static_cast<size_t>(min(tokens[1], VOCAB - 1)) * D_MODEL;
    // Beyond the last column the weights are zeros. The rows repeat their last vector there: 0 * NaN would be NaN.
    const auto stage = [&](int start, int into) {
        for (int i = threadIdx.x; i < rows * (ROUND / VECTOR); i += HEAD_WARPS * 32) {
            const int row = i / (ROUND / VECTOR), column = i % (ROUND / VECTOR) * VECTOR;
            const __half* source = hidden + static_cast<size_t>(first + row) * D_MODEL + min(start + column, D_MODEL - VECTOR);
            copy_async(&staged[into][row][column], source);
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
        __syncthreads();  // this round's rows are staged, and no warp reads the previous round's any more
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
            ArgmaxLogSumExp best = ArgmaxLogSumExp::none();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (tokens[half] >= VOCAB || row >= rows) continue;
                const float logit = logits[tile][2 * half + i] + (tokens[half] == eos ? eos_penalty[first + row] : 0.f);
                best.combine({logit, 1.f, tokens[half]});
            }
#pragma unroll
            for (int step = 4; step < 32; step *= 2) best.combine_lane(step);
            if (group == 0) warp_best[warp][row] = best;
        }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += HEAD_WARPS * 32) {
        ArgmaxLogSumExp best = warp_best[0][row];
        for (int w = 1; w < HEAD_WARPS; ++w) best.combine(warp_best[w][row]);
        found[blockIdx.x * batch + first + row] = best;
    }
}

// Combines the results of head_argmax's blocks: the token with the largest logit of each row, and its log-probability.
// Grid (batch), block COMBINE_THREADS.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine_argmax(
    const ArgmaxLogSumExp* __restrict__ found, int blocks, int* __restrict__ token, float* __restrict__ log_prob)
{
    __shared__ ArgmaxLogSumExp warp_best[COMBINE_THREADS / 32];
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    ArgmaxLogSumExp best = ArgmaxLogSumExp::none();
    grid_dependency_wait(found, token, log_prob);
    for (int block = threadIdx.x; block < blocks; block += COMBINE_THREADS) best.combine(found[block * gridDim.x + row]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) best.combine_lane(step);
    if (lane == 0) warp_best[warp] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < COMBINE_THREADS / 32; ++w) best.combine(warp_best[w]);
    token[row] = min(best.token, VOCAB - 1);  // if all logits are NaN there is no argmax, but the next step looks up the token
    log_prob[row] = -logf(best.total);
}
