// The two ends of an encoder whose GEMMs take the norms by themselves (library/layers.py): token ids to the residual stream, and the stream
// to hidden states. Compiled for one reader by library/stream_kernels.py, which defines D_MODEL, EPSILON, NARROW (the stream is also in 8 bits) and
// ORDERED (there in the order of library_kernels.narrow_order).

namespace {

constexpr int VECTORS = D_MODEL / VECTOR, WARPS_A_ROW = (VECTORS + 31) / 32;
static_assert(D_MODEL % VECTOR == 0, "rows must be made of whole vectors");

#if NARROW
// Two numbers to e4m3, what is out of its range to its largest; the first in the low half.
__device__ unsigned narrow_pair(float low, float high) {
    unsigned short made;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(made) : "f"(high), "f"(low));
    return made;
}
#endif

}  // namespace

// Token ids to the residual stream and the sums of its squares, all in the first tile. Grid (rows), block WARPS_A_ROW * 32.
extern "C" __global__ void embed_stream(
    const int* __restrict__ tokens, const __half* __restrict__ embedding, const float* __restrict__ next_norm, int tiles,
    __half* __restrict__ stream, unsigned char* __restrict__ narrow, float* __restrict__ squares)
{
    __shared__ float sums[WARPS_A_ROW];
    const size_t row = blockIdx.x;
    const int column = threadIdx.x * VECTOR;
    float sum = 0.f;
    if (threadIdx.x < VECTORS) {
        const uint4 loaded = load(embedding + static_cast<size_t>(tokens[row]) * D_MODEL + column);
        store(stream + row * D_MODEL + column, loaded);
        const Vector x = widen(loaded);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum += x.at[i] * x.at[i];
#if NARROW
        // in order, a block of 16 has this vector's pairs in turn with those of the other one
        const int first = ORDERED ? column / 16 * 16 + column / VECTOR % 2 * 2 : column, apart = ORDERED ? 4 : 2;
#pragma unroll
        for (int i = 0; i < VECTOR; i += 2) {
            const unsigned pair = narrow_pair(x.at[i] * next_norm[column + i], x.at[i + 1] * next_norm[column + i + 1]);
            *reinterpret_cast<unsigned short*>(narrow + row * D_MODEL + first + i / 2 * apart) = pair;
        }
#endif
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < tiles) {
        float total = 0.f;
        if (threadIdx.x == 0) {
            for (int warp = 0; warp < WARPS_A_ROW; ++warp) total += sums[warp];
        }
        squares[static_cast<size_t>(threadIdx.x) * gridDim.x + row] = total;
    }
}

// The last norm: rows of the stream to those rows of `hidden` that `destinations` names. `squares` has the sums of `rows` rows a tile, of
// which the first gridDim.x are asked for. Grid (rows wanted), block WARPS_A_ROW * 32.
extern "C" __global__ void norm_stream(
    const __half* __restrict__ stream, const float* __restrict__ squares, int tiles, int rows, const float* __restrict__ weight,
    const int* __restrict__ destinations, __half* __restrict__ hidden)
{
    const size_t row = blockIdx.x;
    const int column = threadIdx.x * VECTOR;
    if (threadIdx.x >= VECTORS) return;
    float total = 0.f;
    for (int tile = 0; tile < tiles; ++tile) total += squares[static_cast<size_t>(tile) * rows + row];
    const float factor = rsqrtf(total * (1.f / D_MODEL) + EPSILON);
    Vector x = widen(load(stream + row * D_MODEL + column));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x.at[i] *= factor * weight[column + i];
    store(hidden + static_cast<size_t>(destinations[row]) * D_MODEL + column, narrow(x));
}
