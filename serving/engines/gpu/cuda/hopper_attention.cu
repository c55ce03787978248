// Self-attention within passages of up to LONGEST tokens on Hopper, with T5's relative bias from its table.
//
// Compiled for one reader by hopper_attention.py, which defines HEADS, REACH, SHARED_BYTES, BF16 and FP8_OUT. One block a multiprocessor
// works on one head, passage after passage: the copy engine brings the queries, keys and values of the passages ahead, while three
// warpgroups attend for 64 queries at a time, so that the time is that of the memory. Scores start from the bias, in natural units; softmax
// is fp32, and the weights go from registers into the second product. The next keys are scored while the weights of these are computed.

namespace {

constexpr int D_KV = 64, K_STEPS = D_KV / 16, TILE = 64, LONGEST = 256, TILES = LONGEST / TILE;  // a tile: 64 queries, or 64 keys
constexpr int ROW_BYTES = D_KV * 2, TILE_BYTES = TILE * ROW_BYTES, PART_BYTES = TILES * TILE_BYTES;
constexpr int STAGES = 2, STAGE_BYTES = 3 * PART_BYTES;  // queries, keys and values of a head of a passage
constexpr int COPYING_WARPS = 2 * STAGES;                // of each stage one copies keys, and one queries and values
constexpr int WARPGROUPS = 3, WARPS = WARPGROUPS * 4;    // that compute
// Of a thread: together with what those that copy keep it is all that the block was launched with. One register more, and it waits forever.
constexpr int REGISTERS = 160, COPYING_REGISTERS = 32;
static_assert((WARPS * REGISTERS + COPYING_WARPS * COPYING_REGISTERS) * 32 <= 65536, "registers of a multiprocessor");
// Weights are taken relative to the largest score so far, as long as it is exceeded by no more than this: half precision has room for 2^8.
constexpr float SLACK = 8.f;
// The bias by key - query + LONGEST, and once more one place further: a pair of neighbours lies at an even place of one of the two. The
// second starts 16 banks from the first, so that eight rows of pairs meet in no bank.
constexpr int BIAS_PLACES = 2 * LONGEST, SHIFTED = BIAS_PLACES + 16;
constexpr int AT_BIAS = STAGES * STAGE_BYTES, AT_BARRIERS = AT_BIAS + (SHIFTED + BIAS_PLACES + 8) * 4;
static_assert(AT_BARRIERS + 5 * STAGES * 8 == SHARED_BYTES, "what the launch asks for");

struct Passage {
    int first, length;  // its first token, and how many it has
};

// One that does not exist has no tokens.
__device__ Passage passage_at(const int* passages, int i, int count) {
    return i < count ? Passage{passages[3 * i], passages[3 * i + 1]} : Passage{0, 0};
}

// Of what one warp copies for a stage, which is keys, or queries and values: awaited until it is there, and until it was used.
__device__ unsigned full(unsigned shared, int values, int stage) { return shared + AT_BARRIERS + (values * STAGES + stage) * 8; }
__device__ unsigned empty(unsigned shared, int values, int stage) { return full(shared, values, stage) + 2 * STAGES * 8; }
// Awaited by the warp itself, for values behind which it has to write.
__device__ unsigned landed(unsigned shared, int stage) { return shared + AT_BARRIERS + (4 * STAGES + stage) * 8; }

typedef unsigned Query[K_STEPS][4];  // 64 queries, as `multiply_by_shared` wants them

struct Consumer {
    unsigned shared;    // address of the block's shared memory
    const float* bias;  // of this thread's row % 8 and pair: by tile of keys minus tile of queries
    float scale;        // of what is written
    int warp, lane;     // of the warpgroup

    // Scores a tile of keys: starts from the bias, and does not wait.
    __device__ __forceinline__ void score(Sums& scores, const Query& query, unsigned queries, int keys, int tile) const {
        const float* near = bias + (keys - tile) * TILE;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            // eight queries further is the bias of eight keys before
            const float2 low = *reinterpret_cast<const float2*>(near + n * 8);
            const float2 high = *reinterpret_cast<const float2*>(near + n * 8 - 8);
            scores[n * 4] = low.x;
            scores[n * 4 + 1] = low.y;
            scores[n * 4 + 2] = high.x;
            scores[n * 4 + 3] = high.y;
        }
        const unsigned long long matrix = swizzled_matrix(queries + PART_BYTES) + keys * TILE_BYTES / 16;
        begin_wgmma();
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) multiply_by_shared<0>(scores, query[k], matrix + k * 32 / 16, true);
        commit_wgmma();
    }

    // One tile of queries on its way: what is known after the keys so far.
    struct Progress {
        Query query;
        Sums mixed;
        float most[2];      // of the two rows: the score that weights are relative to, times log2(e)
        float total[2][2];  // and the sum of the weights, of even and of odd columns: shorter chains
    };

    // Attends to tile J of N of the keys, scored in `now` by then or soon, and to all behind it.
    template <int N, int J>
    __device__ __forceinline__ void attend_from(
        Progress& so_far, Sums& now, Sums& other, unsigned queries, int tile, int length, unsigned leaves) const {
        if constexpr (J + 1 < N) {
            score(other, so_far.query, queries, J + 1, tile);
            wait_for_wgmma<1>(now);
        } else {
            wait_for_wgmma<0>(now);
            if (leaves != 0) leave(leaves);
            if (length % TILE != 0) {
                const int keys_left = length - J * TILE - lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    if (i / 4 * 8 + i % 2 >= keys_left) now[i] = MASKED;
                }
            }
        }
        float larger[2][2] = {{LOWEST, LOWEST}, {LOWEST, LOWEST}}, most[2];
#pragma unroll
        for (int i = 0; i < 32; ++i) larger[i / 2 % 2][i % 2] = fmaxf(larger[i / 2 % 2][i % 2], now[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) most[half] = max_of_row(fmaxf(larger[half][0], larger[half][1])) * LOG2E;
        if constexpr (J == 0) {
            so_far.most[0] = most[0];
            so_far.most[1] = most[1];
        } else if (__any_sync(ALL, most[0] > so_far.most[0] + SLACK || most[1] > so_far.most[1] + SLACK)) {
            keep(so_far.mixed);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float next = fmaxf(so_far.most[half], most[half]), factor = exp2_of(so_far.most[half] - next);
                so_far.most[half] = next;
                so_far.total[half][0] *= factor;
                so_far.total[half][1] *= factor;
#pragma unroll
                for (int d = 0; d < 8; ++d) {
                    so_far.mixed[d * 4 + half * 2] *= factor;
                    so_far.mixed[d * 4 + half * 2 + 1] *= factor;
                }
            }
        }
        unsigned weights[TILE / 16][4];
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            now[i] = exp2_of(fmaf(now[i], LOG2E, -so_far.most[i / 2 % 2]));
            so_far.total[i / 2 % 2][i % 2] += now[i];
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = pack_pair(now[i * 2], now[i * 2 + 1]);
        const unsigned long long values = swizzled_matrix(queries + 2 * PART_BYTES) + J * TILE_BYTES / 16;
        begin_wgmma();
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k) {
            multiply_by_shared<1>(so_far.mixed, weights[k], values + k * 16 * ROW_BYTES / 16, J > 0 || k > 0);
        }
        commit_wgmma();
        if constexpr (J + 1 < N) attend_from<N, J + 1>(so_far, other, now, queries, tile, length, leaves);
    }

    // Attends for one tile of queries, in a passage of N tiles.
    template <int N> __device__ __forceinline__ void attend(int stage, int tile, int length, bool last_tile, char* attended) const {
        const unsigned queries = shared + stage * STAGE_BYTES, mine = queries + tile * TILE_BYTES + warp * 16 * ROW_BYTES;
        Progress so_far;
        so_far.total[0][0] = so_far.total[0][1] = so_far.total[1][0] = so_far.total[1][1] = 0.f;
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) {
            load_matrices(so_far.query[k], mine + lane % 16 * ROW_BYTES + ((k * 2 + lane / 16) ^ lane % 8) * 16);
        }
        Sums scores, others;
        score(scores, so_far.query, queries, 0, tile);
        attend_from<N, 0>(so_far, scores, others, queries, tile, length, last_tile ? empty(shared, 0, stage) : 0u);
        wait_for_wgmma<0>(so_far.mixed);
        const float low_share = __fdividef(scale, sum_of_row(so_far.total[0][0] + so_far.total[0][1]));
        const float high_share = __fdividef(scale, sum_of_row(so_far.total[1][0] + so_far.total[1][1]));
        write(so_far.mixed, mine, min(length - tile * TILE - warp * 16, 16), attended, low_share, high_share);
        order_before_engines();
        if (last_tile) leave(empty(shared, 1, stage));
    }

    // This warp has read what the barrier guards.
    __device__ void leave(unsigned barrier) const {
        __syncwarp();
        if (lane == 0) arrive(barrier);
    }

    // Writes this warp's rows, through shared memory, where its queries were, so that threads have 16 bytes of a row each.
    __device__ void write(const Sums& mixed, unsigned through, int rows, char* attended, float low_share, float high_share) const {
        constexpr int BYTES = FP8_OUT ? D_KV : ROW_BYTES, PIECES = BYTES / 16, AT_A_TIME = 32 / PIECES;
        const int group = lane / 4, pair = lane % 4;
        if (FP8_OUT) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = group + half * 8;
                const float share = half ? high_share : low_share;
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const unsigned at = through + row * BYTES + ((n / 2) ^ (row / 2 % 4)) * 16 + n % 2 * 8 + pair * 2;
                    const unsigned short bits = pack_fp8(mixed[n * 4 + half * 2] * share, mixed[n * 4 + half * 2 + 1] * share);
                    asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(bits) : "memory");
                }
            }
        } else {
            const int row = lane % 16;
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                unsigned pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float share = i % 2 ? high_share : low_share;
                    pairs[i] = pack_pair(mixed[n * 4 + i * 2] * share, mixed[n * 4 + i * 2 + 1] * share);
                }
                store_matrices(through + row * BYTES + ((n + lane / 16) ^ row % 8) * 16, pairs);
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i += AT_A_TIME) {
            const int row = i + lane / PIECES, piece = lane % PIECES;
            const uint4 bits = load_shared(through + row * BYTES + (piece ^ (FP8_OUT ? row / 2 % 4 : row % 8)) * 16);
            if (row < rows) *reinterpret_cast<uint4*>(attended + static_cast<size_t>(row) * HEADS * BYTES + piece * 16) = bits;
        }
    }
};

}  // namespace

// Grid: a multiple of HEADS, block (COPYING_WARPS + WARPS) * 32, dynamic shared memory SHARED_BYTES + 1,024.
extern "C" __global__ void __launch_bounds__((COPYING_WARPS + WARPS) * 32, 1) hopper_attention(
    const void* query_key_value,       // map of half[tokens][3][HEADS][D_KV], in boxes of a tile's rows and a head's columns
    const int* __restrict__ passages,  // [count][3]: first token, length; one of length 0 ends them; the third number is not read
    int count,
    const float* __restrict__ bias,  // [2 * REACH + 1][HEADS], by how far the key lies after the query, plus REACH
    float scale,                     // FP8_OUT: what is written is so many times the result
    char* __restrict__ attended)     // half or e4m3 [tokens][HEADS][D_KV]
{
    extern __shared__ char raw[];
    const unsigned unaligned = shared_address(raw), shared = (unaligned + 1023) / 1024 * 1024;
    float* table = reinterpret_cast<float*>(raw + (shared - unaligned) + AT_BIAS);
    const int head = blockIdx.x % HEADS, start = blockIdx.x / HEADS, step = gridDim.x / HEADS;
    if (threadIdx.x < 2 * STAGES) {
        const int values = threadIdx.x / STAGES, stage = threadIdx.x % STAGES;
        init_barrier(full(shared, values, stage), 1);
        init_barrier(empty(shared, values, stage), WARPS);
        if (values) init_barrier(landed(shared, stage), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int warp = __shfl_sync(ALL, threadIdx.x / 32, 0);  // so that the compiler knows that a warp stays together
    if (warp < COPYING_WARPS) {
        give_registers<COPYING_REGISTERS>();
        grid_dependency_wait();  // of what is read only the queries, keys and values are written by another kernel; they are not read through registers
        const int stage = warp % STAGES, lane = threadIdx.x % 32;
        const bool copies_values = warp / STAGES;
        acquire_map(query_key_value);
        int cut = 0;  // passages so far whose last tile is not full
        Passage next = passage_at(passages, start, count);
        for (int round = 0; next.length > 0; ++round) {
            const auto [first, length] = next;
            next = passage_at(passages, start + (round + 1) * step, count);  // on its way while this one is worked on
            if (round % STAGES != stage) continue;
            const unsigned done = full(shared, copies_values, stage), to = shared + stage * STAGE_BYTES;
            const int tiles = (length + TILE - 1) / TILE;
            const bool cuts = copies_values && length % TILE != 0;
            wait_for_phase(empty(shared, copies_values, stage), round / STAGES % 2 ^ 1);
            if (lane == 0) {
                const unsigned barrier = cuts ? landed(shared, stage) : done;
                arrive_expecting(barrier, tiles * TILE_BYTES * (copies_values ? 2 : 1));
                for (int i = 0; i < tiles; ++i) {
                    for (int part = copies_values ? 0 : 1; part < 3; part += 2) {
                        const int column = (part * HEADS + head) * D_KV;
                        copy_box(to + part * PART_BYTES + i * TILE_BYTES, query_key_value, column, first + i * TILE, barrier);
                    }
                }
            }
            __syncwarp();
            if (!cuts) continue;
            // behind the passage lies another, or memory that nobody wrote: what has the weight 0 must be a number
            wait_for_phase(landed(shared, stage), cut++ % 2);
            const unsigned values = to + 2 * PART_BYTES;
            for (int row = length + lane / 8; row < tiles * TILE; row += 4) store_zeros(values + row * ROW_BYTES + lane % 8 * 16);
            order_before_engines();
            __syncwarp();
            if (lane == 0) arrive(done);
        }
    } else {
        take_registers<REGISTERS>();
        for (int i = threadIdx.x - COPYING_WARPS * 32; i < BIAS_PLACES; i += WARPS * 32) {
            const int distance = min(max(i - LONGEST, -REACH), REACH);
            const float value = bias[(distance + REACH) * HEADS + head];
            table[i] = value;
            table[SHIFTED + i + 1] = value;
        }
        asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");  // the warps that copy are busy by now
        grid_dependency_wait();
        const int group = warp / 4 - 1, lane = threadIdx.x % 32;
        Consumer consumer{shared, nullptr, scale, warp % 4, lane};
        const int row = consumer.warp * 16 + lane / 4;
        consumer.bias = table + (row % 2 ? SHIFTED + 1 : 0) + LONGEST + lane % 4 * 2 - row;
        constexpr int OUT_ROW = FP8_OUT ? D_KV : ROW_BYTES;
        int before = 0;  // tiles that were dealt out to the warpgroups in turn
        Passage next = passage_at(passages, start, count);
        for (int round = 0; next.length > 0; ++round) {
            const auto [first, length] = next;
            next = passage_at(passages, start + (round + 1) * step, count);
            const int stage = round % STAGES, parity = round / STAGES % 2, tiles = (length + TILE - 1) / TILE;
            const int mine = (group + WARPGROUPS - before % WARPGROUPS) % WARPGROUPS;
            before += tiles;
            wait_for_phase(full(shared, 0, stage), parity);
            wait_for_phase(full(shared, 1, stage), parity);
            if (mine >= tiles) {
                consumer.leave(empty(shared, 0, stage));
                consumer.leave(empty(shared, 1, stage));
                continue;
            }
            for (int tile = mine; tile < tiles; tile += WARPGROUPS) {
                char* to = attended + (static_cast<size_t>(first + tile * TILE + consumer.warp * 16) * HEADS + head) * OUT_ROW;
                const bool last_tile = tile + WARPGROUPS >= tiles;
                if (tiles == 4) consumer.attend<4>(stage, tile, length, last_tile, to);
                else if (tiles == 3) consumer.attend<3>(stage, tile, length, last_tile, to);
                else if (tiles == 2) consumer.attend<2>(stage, tile, length, last_tile, to);
                else consumer.attend<1>(stage, tile, length, last_tile, to);
            }
        }
    }
}
