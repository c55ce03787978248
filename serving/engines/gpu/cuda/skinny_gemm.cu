// The GEMM of a decoder step's few rows: y = x @ weight, with sums in fp32.
//
// kernels.py compiles it for up to TILES * 16 rows. It defines WARPS and COLUMNS (output features) per block, K_TILE (input features that a
// warp takes at a time) and SUM_STRIDE (floats of a row of a warp's sums in shared memory).
//
// Such a GEMM mostly waits: for its launch, for the first weights, for its rows. A block here starts to copy all of its weights to shared
// memory before the previous kernel has ended (programmatic dependent launch). After grid_dependency_wait only the rows are missing.

namespace {

constexpr int THREADS = WARPS * 32, CHUNKS = COLUMNS / VECTOR;
// K tiles of x that a warp fetches at once: as many as leave registers for two blocks per multiprocessor.
constexpr int AHEAD = TILES > 2 ? 2 : 3;

// Offset in shared memory of a chunk of eight columns of a row of weights, swizzled: rows that are read together are in different banks.
__device__ int weight_offset(int row, int chunk) { return row * COLUMNS + (chunk ^ (row / 8 % CHUNKS)) * VECTOR; }

}  // namespace

// Grid (out_features / COLUMNS, k_splits), block THREADS, dynamic shared memory for in_features * COLUMNS halves or for the warps' sums,
// whichever is more.
extern "C" __global__ void __launch_bounds__(THREADS, 2) skinny_gemm(
    const __half* __restrict__ x,       // [k_splits][rows][in_features]
    const __half* __restrict__ weight,  // [k_splits][in_features][out_features]
    int rows, int in_features, int out_features,
    __half* __restrict__ y)  // [k_splits][rows][out_features]
{
    extern __shared__ __align__(16) __half weights[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int first = blockIdx.x * COLUMNS, steps = in_features / K_TILE;
    const size_t split = blockIdx.y;
    for (int i = threadIdx.x; i < in_features * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        copy_async(weights + weight_offset(row, chunk), weight + (split * in_features + row) * out_features + first + chunk * VECTOR);
    }
    commit_copies();
    grid_dependency_wait(x, y);
    // Of every 32 columns of x the thread with pair p loads the eight columns 8p to 8p + 7, as one vector. The mma instruction expects the
    // columns 2p, 2p + 1, 2p + 8 and 2p + 9 of a tile of 16 from it. A sum does not depend on the order of its terms, so the columns are
    // renumbered: 8p and 8p + 1 serve as 2p and 2p + 1 of the first tile, the next two as its 2p + 8 and 2p + 9, the last four likewise of
    // the second tile. `own_row` gives the rows of weights in the same order.
    uint4 low[AHEAD][TILES], high[AHEAD][TILES];
    const auto fetch = [&](int start) {
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int step = start + a * WARPS;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int row = tile * 16 + group;
                const __half* from = x + (split * rows + row) * in_features + step * K_TILE + pair * VECTOR;
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
                const Fragments right = load_transposed(weights + weight_offset(step * K_TILE + own_row, chunk));
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    const uint4 l = low[a][tile], h = high[a][tile];
                    const unsigned first_tile[4] = {l.x, h.x, l.y, h.y}, second_tile[4] = {l.z, h.z, l.w, h.w};
                    multiply(sums[tile][chunk], first_tile, right.at[0], right.at[1]);
                    multiply(sums[tile][chunk], second_tile, right.at[2], right.at[3]);
                }
            }
        }
    }
    __syncthreads();  // no warp reads weights any more: the sums replace them
    float* warp_sums = reinterpret_cast<float*>(weights);  // [WARPS][TILES * 16][SUM_STRIDE]
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            float* to = warp_sums + ((warp * TILES + tile) * 16 + group) * SUM_STRIDE + chunk * VECTOR + pair * 2;
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
            const float4* one_warp = reinterpret_cast<const float4*>(warp_sums + (w * TILES * 16 + row) * SUM_STRIDE + chunk * VECTOR);
            const float4 one = one_warp[0], two = one_warp[1];
            const float eight_sums[VECTOR] = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) total.at[c] += eight_sums[c];
        }
        store(y + (split * rows + row) * out_features + first + chunk * VECTOR, narrow(total));
    }
}
