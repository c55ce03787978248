// Self-attention of the encoder within each passage, on tensor cores, with T5's relative bias and an online softmax.
//
// kernels.py compiles it for one reader. It defines D_KV, HEADS, MAX_RELATIVE_DISTANCE, WARPS and TILE (queries) per block, and KEYS per
// stage. The tokens of all passages are packed, without padding. Scores and softmax are in fp32. T5 does not scale scores by 1/sqrt(D_KV).

namespace {

constexpr int M_TILES = TILE / (WARPS * 16);   // tiles of 16 queries per warp
constexpr int QUERIES = WARPS * M_TILES * 16;  // per block
constexpr int PITCH = D_KV + VECTOR;           // halves of a row in shared memory, padded: neighbouring rows start four banks apart
static_assert(QUERIES == TILE, "TILE must be a multiple of 16 * WARPS");
static_assert(D_KV % 16 == 0, "D_KV must be a multiple of 16");

}  // namespace

// Grid (tiles, HEADS), block WARPS * 32, dynamic shared memory for `near_bias`: length rounded up to KEYS, plus QUERIES floats.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 4) attention(
    const __half* __restrict__ query_key_value,  // [tokens][3][HEADS][D_KV]
    const int* __restrict__ tiles,               // [tiles][3]: the passage's first token, its length, the tile's first query in it
    const float* __restrict__ bias,              // [2 * MAX_RELATIVE_DISTANCE + 1][HEADS], see below
    __half* __restrict__ attended)               // [tokens][HEADS][D_KV]
{
    // Row MAX_RELATIVE_DISTANCE + d of `bias` is for a key d tokens after the query.
    constexpr int TOKEN = 3 * HEADS * D_KV, K_STEPS = D_KV / 16, N_TILES = KEYS / 8, D_TILES = D_KV / 8;
    constexpr int BEFORE = 2 * M_TILES - 1;  // tiles of eight queries from a warp's first query to its last
    __shared__ __align__(16) __half keys[2][KEYS][PITCH], values[2][KEYS][PITCH];
    // The bias of this head times log2(e), by key - query + QUERIES - 1, with the query counted from the tile's first.
    extern __shared__ float near_bias[];
    const int first = tiles[3 * blockIdx.x], length = tiles[3 * blockIdx.x + 1], start = tiles[3 * blockIdx.x + 2], head = blockIdx.y;
    if (length == 0) return;  // an unused tile of a captured call
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const __half* passage = query_key_value + static_cast<size_t>(first) * TOKEN + head * D_KV;

    const auto fetch = [&](int stage, int from) {
        for (int i = threadIdx.x; i < KEYS * D_TILES; i += WARPS * 32) {
            const int key = i / D_TILES, column = i % D_TILES * VECTOR;
            // beyond the end the last key again: its weight will be 0, but 0 * NaN is NaN
            const __half* source = passage + static_cast<size_t>(min(from + key, length - 1)) * TOKEN + column;
            copy_async(&keys[stage][key][column], source + HEADS * D_KV);
            copy_async(&values[stage][key][column], source + 2 * HEADS * D_KV);
        }
        commit_copies();
    };
    fetch(0, 0);

    const int padded = (length + KEYS - 1) / KEYS * KEYS;
    for (int i = threadIdx.x; i < padded + QUERIES; i += WARPS * 32) {
        const int distance = min(max(i - (QUERIES - 1) - start, -MAX_RELATIVE_DISTANCE), MAX_RELATIVE_DISTANCE);
        near_bias[i] = bias[(distance + MAX_RELATIVE_DISTANCE) * HEADS + head] * LOG2E;
    }

    const int row0 = warp * M_TILES * 16;  // the warp's first query, counted from the tile's
    const bool idle = start + row0 >= length;
    unsigned query[M_TILES][K_STEPS][4];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        const __half* low = passage + static_cast<size_t>(min(start + row0 + m * 16 + group, length - 1)) * TOKEN;
        const __half* high = passage + static_cast<size_t>(min(start + row0 + m * 16 + group + 8, length - 1)) * TOKEN;
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) {
            const int column = k * 16 + pair * 2;
            query[m][k][0] = *reinterpret_cast<const unsigned*>(low + column);
            query[m][k][1] = *reinterpret_cast<const unsigned*>(high + column);
            query[m][k][2] = *reinterpret_cast<const unsigned*>(low + column + 8);
            query[m][k][3] = *reinterpret_cast<const unsigned*>(high + column + 8);
        }
    }

    float weighted[M_TILES][D_TILES][4] = {}, largest[M_TILES][2], total[M_TILES][2] = {};
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) largest[m][0] = largest[m][1] = -1e30f;

    for (int from = 0, stage = 0; from < length; from += KEYS, stage ^= 1) {
        __syncthreads();  // no warp reads the other stage any more
        if (from + KEYS < length) {
            fetch(stage ^ 1, from + KEYS);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        if (idle) continue;

        float score[M_TILES][N_TILES][4] = {};
#pragma unroll
        for (int n = 0; n < N_TILES; n += 2) {
#pragma unroll
            for (int k = 0; k < K_STEPS; ++k) {
                const Fragments f = load_matrices(&keys[stage][n * 8 + lane / 16 * 8 + lane % 8][k * 16 + lane / 8 % 2 * 8]);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply(score[m][n], query[m][k], f.at[0], f.at[1]);
                    multiply(score[m][n + 1], query[m][k], f.at[2], f.at[3]);
                }
            }
        }

        // The bias depends on key - query only: eight queries further equals eight keys earlier, so tiles of scores share these registers.
        float2 added[N_TILES + BEFORE];
        const float* here = near_bias + from + pair * 2 - row0 - group + QUERIES - 1;
#pragma unroll
        for (int j = 0; j < N_TILES + BEFORE; ++j) added[j] = make_float2(here[8 * (j - BEFORE)], here[8 * (j - BEFORE) + 1]);
        const bool last = from + KEYS > length;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            float new_largest[2] = {largest[m][0], largest[m][1]};
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 two = added[n - 2 * m - i / 2 + BEFORE];
                    float& x = score[m][n][i];
                    x = fmaf(x, LOG2E, i % 2 ? two.y : two.x);
                    if (last && from + n * 8 + pair * 2 + i % 2 >= length) x = MASKED;
                    new_largest[i / 2] = fmaxf(new_largest[i / 2], x);
                }
            }
            float sums[2] = {0.f, 0.f};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                new_largest[half] = max_of_row(new_largest[half]);
                const float factor = exp2_of(largest[m][half] - new_largest[half]);
                largest[m][half] = new_largest[half];
                total[m][half] *= factor;
#pragma unroll
                for (int d = 0; d < D_TILES; ++d) {
                    weighted[m][d][2 * half] *= factor;
                    weighted[m][d][2 * half + 1] *= factor;
                }
            }
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[m][n][i] = exp2_of(score[m][n][i] - new_largest[i / 2]);
                    sums[i / 2] += score[m][n][i];
                }
            }
            total[m][0] += sums[0];
            total[m][1] += sums[1];
        }

#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            unsigned weight[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                weight[m][0] = pack(score[m][2 * j][0], score[m][2 * j][1]);
                weight[m][1] = pack(score[m][2 * j][2], score[m][2 * j][3]);
                weight[m][2] = pack(score[m][2 * j + 1][0], score[m][2 * j + 1][1]);
                weight[m][3] = pack(score[m][2 * j + 1][2], score[m][2 * j + 1][3]);
            }
#pragma unroll
            for (int d = 0; d < D_TILES; d += 2) {
                const Fragments f = load_transposed(&values[stage][j * 16 + lane % 16][d * 8 + lane / 16 * 8]);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply(weighted[m][d], weight[m], f.at[0], f.at[1]);
                    multiply(weighted[m][d + 1], weight[m], f.at[2], f.at[3]);
                }
            }
        }
    }
    if (idle) return;

#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float scale = 1.f / sum_of_row(total[m][half]);
            const int query_in_passage = start + row0 + m * 16 + half * 8 + group;
            if (query_in_passage >= length) continue;
            __half* out = attended + (static_cast<size_t>(first + query_in_passage) * HEADS + head) * D_KV;
#pragma unroll
            for (int d = 0; d < D_TILES; ++d) {
                const unsigned bits = pack(weighted[m][d][2 * half] * scale, weighted[m][d][2 * half + 1] * scale);
                *reinterpret_cast<unsigned*>(out + d * 8 + pair * 2) = bits;
            }
        }
    }
}
