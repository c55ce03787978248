// Self-attention within passages, on tensor cores, with T5's relative bias from its table.
//
// Compiled for one reader by kernels.py, which defines D_KV, HEADS, MAX_RELATIVE_DISTANCE, WARPS and TILE (queries a block) and KEYS (a stage). Tokens of
// all passages lie one after the other, without padding. Scores and softmax are fp32.

namespace {

constexpr int M_TILES = TILE / (WARPS * 16);  // of 16 queries a warp
constexpr int QUERIES = WARPS * M_TILES * 16;  // a block
constexpr int PITCH = D_KV + VECTOR;           // halves of a row in shared memory: neighbouring rows start four banks apart
static_assert(QUERIES == TILE, "a block's queries must be whole tiles of its warps");
static_assert(D_KV % 16 == 0, "a head must be made of whole tensor core tiles");

}  // namespace

// Self-attention within passages: scores in tensor cores, T5's bias from its table, softmax as the keys go by.
// Grid (tiles, HEADS), block WARPS * 32, dynamic shared memory for `near`: (padded length + QUERIES) floats.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 4) attention(
    const __half* __restrict__ query_key_value,  // [tokens][3][HEADS][D_KV]
    const int* __restrict__ tiles,               // [tiles][3]: first token of the passage, its length, first query of the tile in it
    const float* __restrict__ bias,              // [2 * MAX_RELATIVE_DISTANCE + 1][HEADS], by how far the key lies after the query, plus MAX_RELATIVE_DISTANCE
    __half* __restrict__ attended)               // [tokens][HEADS][D_KV]
{
    constexpr int TOKEN = 3 * HEADS * D_KV, K_STEPS = D_KV / 16, N_TILES = KEYS / 8, D_TILES = D_KV / 8;
    constexpr int BEFORE = 2 * M_TILES - 1;  // tiles of eight by which the last query of a warp lies behind its first
    __shared__ __align__(16) __half keys[2][KEYS][PITCH], values[2][KEYS][PITCH];
    extern __shared__ float near[];  // the bias of this tile times log2(e), by key - query + QUERIES - 1 (both counted from the tile's start)
    const int first = tiles[3 * blockIdx.x], length = tiles[3 * blockIdx.x + 1], start = tiles[3 * blockIdx.x + 2], head = blockIdx.y;
    if (length == 0) return;  // a captured call has more tiles than most need
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const __half* passage = query_key_value + static_cast<size_t>(first) * TOKEN + head * D_KV;

    const auto fetch = [&](int stage, int from) {
        for (int i = threadIdx.x; i < KEYS * D_TILES; i += WARPS * 32) {
            const int key = i / D_TILES, column = i % D_TILES * VECTOR;
            // beyond the end the last key again: its weight will be 0, but what is multiplied by 0 must be a number
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
        near[i] = bias[(distance + MAX_RELATIVE_DISTANCE) * HEADS + head] * LOG2E;
    }

    const int row0 = warp * M_TILES * 16;  // of the tile
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

    float mixed[M_TILES][D_TILES][4] = {}, largest[M_TILES][2], total[M_TILES][2] = {};
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) largest[m][0] = largest[m][1] = -1e30f;

    for (int from = 0, stage = 0; from < length; from += KEYS, stage ^= 1) {
        __syncthreads();  // all have left the other stage
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

        // eight queries further is the bias of eight keys before: what one tile of scores adds, others add again
        float2 added[N_TILES + BEFORE];
        const float* here = near + from + pair * 2 - row0 - group + QUERIES - 1;
#pragma unroll
        for (int j = 0; j < N_TILES + BEFORE; ++j) added[j] = make_float2(here[8 * (j - BEFORE)], here[8 * (j - BEFORE) + 1]);
        const bool last = from + KEYS > length;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            float most[2] = {largest[m][0], largest[m][1]};
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 pair_of = added[n - 2 * m - i / 2 + BEFORE];
                    float& x = score[m][n][i];
                    x = fmaf(x, LOG2E, i % 2 ? pair_of.y : pair_of.x);
                    if (last && from + n * 8 + pair * 2 + i % 2 >= length) x = MASKED;
                    most[i / 2] = fmaxf(most[i / 2], x);
                }
            }
            float sums[2] = {0.f, 0.f};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                most[half] = max_of_row(most[half]);
                const float factor = exp2_of(largest[m][half] - most[half]);
                largest[m][half] = most[half];
                total[m][half] *= factor;
#pragma unroll
                for (int d = 0; d < D_TILES; ++d) {
                    mixed[m][d][2 * half] *= factor;
                    mixed[m][d][2 * half + 1] *= factor;
                }
            }
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    score[m][n][i] = exp2_of(score[m][n][i] - most[i / 2]);
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
                    multiply(mixed[m][d], weight[m], f.at[0], f.at[1]);
                    multiply(mixed[m][d + 1], weight[m], f.at[2], f.at[3]);
                }
            }
        }
    }
    if (idle) return;

#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float share = 1.f / sum_of_row(total[m][half]);
            const int query_in_passage = start + row0 + m * 16 + half * 8 + group;
            if (query_in_passage >= length) continue;
            __half* out = attended + (static_cast<size_t>(first + query_in_passage) * HEADS + head) * D_KV;
#pragma unroll
            for (int d = 0; d < D_TILES; ++d) {
                *reinterpret_cast<unsigned*>(out + d * 8 + pair * 2) = pack(mixed[m][d][2 * half] * share, mixed[m][d][2 * half + 1] * share);
            }
        }
    }
}
