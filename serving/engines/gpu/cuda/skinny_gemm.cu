// A gemm of a step's few rows.
//
// Compiled by kernels.py for up to TILES * 16 rows, with WARPS warps and COLUMNS columns a block; a warp multiplies K_TILE columns of x
// at a time, and SUM_STRIDE is of a row of its sums in shared memory. A step's gemms are so narrow that what they take is mostly waiting:
// for the launch, for the first weights, for the rows. A block here has all of its weights on their way into shared memory before the kernel
// before it has ended, and then needs its rows only.

namespace {

constexpr int THREADS = WARPS * 32, CHUNKS = COLUMNS / VECTOR;
constexpr int AHEAD = TILES > 2 ? 2 : 3;  // times K_TILE columns of x are fetched at once: registers for two blocks a multiprocessor

// Where a row of weights has a chunk of its columns: rows that are read at once are in banks of their own.
__device__ int place(int row, int chunk) { return row * COLUMNS + (chunk ^ (row / 8 % CHUNKS)) * VECTOR; }

}  // namespace

// Grid (out_features / COLUMNS, k_splits), block THREADS; shared memory for in_features * COLUMNS weights, or for the warps' sums where they take more.
extern "C" __global__ void __launch_bounds__(THREADS, 2) skinny_gemm(
    const __half* __restrict__ x,       // [k_splits][rows][in_features]
    const __half* __restrict__ weight,  // [k_splits][in_features][out_features]
    int rows, int in_features, int out_features,
    __half* __restrict__ y)  // [k_splits][rows][out_features]
{
    extern __shared__ __align__(16) __half weights[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int first = blockIdx.x * COLUMNS, steps = in_features / K_TILE;
    const size_t part = blockIdx.y;
    for (int i = threadIdx.x; i < in_features * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        copy_async(weights + place(row, chunk), weight + (part * in_features + row) * out_features + first + chunk * VECTOR);
    }
    commit_copies();
    grid_dependency_wait(x, y);
    // Of every 32 columns of x a thread has eight neighbouring ones: pair p has 8p to 8p + 7, where a tile of 16 wants 2p, 2p + 1, 2p + 8 and
    // 2p + 9 of it. So 8p and 8p + 1 count as 2p and 2p + 1, the next two as 2p + 8 and 2p + 9, and the last four are the second tile's;
    // `own_row` names rows of weights in that order.
    uint4 low[AHEAD][TILES], high[AHEAD][TILES];
    const auto fetch = [&](int start) {
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int step = start + a * WARPS;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int row = tile * 16 + group;
                const __half* from = x + (part * rows + row) * in_features + step * K_TILE + pair * VECTOR;
                low[a][tile] = step < steps && row < rows ? load(from) : uint4{};
                high[a][tile] = step < steps && row + 8 < rows ? load(from + 8 * in_features) : uint4{};
            }
        }
    };
    fetch(warp);
    wait_for_copies<0>();
    __syncthreads();
    const int own_row = lane % 8 / 2 * VECTOR + lane / 8 * 2 + lane % 2;
    float sums[TILES][CHUNKS][4] = {};
    for (int start = warp; start < steps; start += WARPS * AHEAD) {
        if (start > warp) fetch(start);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int step = start + a * WARPS;
            if (step >= steps) break;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                const Fragments right = load_transposed(weights + place(step * K_TILE + own_row, chunk));
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    const uint4 l = low[a][tile], h = high[a][tile];
                    const unsigned of_first[4] = {l.x, h.x, l.y, h.y}, of_second[4] = {l.z, h.z, l.w, h.w};
                    multiply(sums[tile][chunk], of_first, right.at[0], right.at[1]);
                    multiply(sums[tile][chunk], of_second, right.at[2], right.at[3]);
                }
            }
        }
    }
    __syncthreads();  // nobody reads weights any more: the sums take their place
    float* of_warps = reinterpret_cast<float*>(weights);  // [WARPS][TILES * 16][SUM_STRIDE]
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            float* to = of_warps + ((warp * TILES + tile) * 16 + group) * SUM_STRIDE + chunk * VECTOR + pair * 2;
            const float(&sum)[4] = sums[tile][chunk];
            *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
            *reinterpret_cast<float2*>(to + 8 * SUM_STRIDE) = make_float2(sum[2], sum[3]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        Vector total = {};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float4* of_warp = reinterpret_cast<const float4*>(of_warps + (w * TILES * 16 + row) * SUM_STRIDE + chunk * VECTOR);
            const float4 one = of_warp[0], two = of_warp[1];
            const float of_warp_sums[VECTOR] = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) total.at[c] += of_warp_sums[c];
        }
        store(y + (part * rows + row) * out_features + first + chunk * VECTOR, narrow(total));
    }
}
