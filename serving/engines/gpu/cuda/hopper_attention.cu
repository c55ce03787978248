// Self-attention within passages of up to LONGEST tokens on Hopper, with T5's relative bias from its table.
//
// Compiled for one reader by hopper_attention.py, which defines HEADS, REACH, SHARED_BYTES, BF16 and FP8_OUT. One block a multiprocessor
// works on one head, passage after passage: the copy engine brings the queries, keys and values of the passages ahead, while four
// warpgroups attend for 64 queries each, so that the time is that of the memory. Scores start from the bias, in natural units; softmax is
// fp32, and the weights go from registers into the second product, which also sums them.

namespace {

constexpr int D_KV = 64, K_STEPS = D_KV / 16, TILE = 64, LONGEST = 256, TILES = LONGEST / TILE;  // a tile: 64 queries, or 64 keys
constexpr int ROW_BYTES = D_KV * 2, TILE_BYTES = TILE * ROW_BYTES, PART_BYTES = TILES * TILE_BYTES;
constexpr int STAGES = 2, STAGE_BYTES = 3 * PART_BYTES;  // queries, keys and values of a head of a passage
constexpr int WARPGROUPS = 4, WARPS = WARPGROUPS * 4, COPYING_WARPS = 4;
// Of a thread: together with what those that copy keep it must not be more than the block was launched with, or it waits forever. A block
// of 20 warps is launched with 96 a thread.
constexpr int REGISTERS = 112, COPYING_REGISTERS = 24;
static_assert(WARPS * REGISTERS + COPYING_WARPS * COPYING_REGISTERS <= (WARPS + COPYING_WARPS) * 96, "registers of the block");
// Weights are taken relative to the largest score so far, as long as it is exceeded by no more than this: half precision has room for 2^8.
constexpr float SLACK = 8.f;
constexpr int ONES_BYTES = 16 * ROW_BYTES;  // further columns of the values that are all 1: what is mixed from them is the weights' sum
// The bias by key - query + LONGEST, and once more one place further: a pair of neighbours lies at an even place of one of the two. The
// second starts 16 banks from the first, so that eight rows of pairs meet in no bank.
constexpr int BIAS_PLACES = 2 * LONGEST, SHIFTED = BIAS_PLACES + 16;
constexpr int AT_ONES = STAGES * STAGE_BYTES, AT_BIAS = AT_ONES + ONES_BYTES, AT_BARRIERS = AT_BIAS + (SHIFTED + BIAS_PLACES + 8) * 4;
static_assert(AT_BARRIERS + 3 * STAGES * 8 == SHARED_BYTES, "what the launch asks for");

struct Passage {
    int first, length;  // its first token, and how many it has
};

// One that does not exist has no tokens.
__device__ Passage passage_at(const int* passages, int i, int count) {
    return i < count ? Passage{passages[3 * i], passages[3 * i + 1]} : Passage{0, 0};
}

// Of a stage: what is awaited until all of it was copied, and until all of it was used.
__device__ unsigned full(unsigned shared, int stage) { return shared + AT_BARRIERS + stage * 8; }
__device__ unsigned empty(unsigned shared, int stage) { return full(shared, STAGES + stage); }
// Awaited by the warp that copies itself, for values behind which it has to write.
__device__ unsigned landed(unsigned shared, int stage) { return full(shared, 2 * STAGES + stage); }

struct Consumer {
    unsigned shared, bias;  // addresses: of the block's shared memory, and of the bias of this thread's row and pair, tile by tile
    float scale;            // of what is written
    int warp, lane;         // of the warpgroup

    // Attends for one tile of queries.
    __device__ void attend(int stage, int tile, int length, char* attended) const {
        const unsigned queries = shared + stage * STAGE_BYTES, mine = queries + tile * TILE_BYTES + warp * 16 * ROW_BYTES;
        unsigned long long keys = swizzled_matrix(queries + PART_BYTES);
        const unsigned at_values = queries + 2 * PART_BYTES;
        unsigned query[K_STEPS][4];
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) load_matrices(query[k], mine + lane % 16 * ROW_BYTES + ((k * 2 + lane / 16) ^ lane % 8) * 16);
        SumsAndTotal mixed;
        float most[2];  // of the two rows: the score that weights are relative to, times log2(e)
        const int tiles = (length + TILE - 1) / TILE;
        unsigned near = bias - tile * TILE * 4;
        unsigned long long values = swizzled_matrix(at_values, shared + AT_ONES - at_values);
        for (int j = 0; j < tiles; ++j) {
            Sums scores;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                load_pair(scores[n * 4], scores[n * 4 + 1], near + n * 32);
                // eight queries further: the bias of eight keys before
                load_pair(scores[n * 4 + 2], scores[n * 4 + 3], near + n * 32 - 32);
            }
            begin_wgmma();
#pragma unroll
            for (int k = 0; k < K_STEPS; ++k) multiply_by_shared(scores, query[k], keys + k * 32 / 16);
            commit_wgmma();
            wait_for_wgmma<0>(scores);
            if (length - j * TILE < TILE) {
                const int keys_left = length - j * TILE - lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    if (i / 4 * 8 + i % 2 >= keys_left) scores[i] = MASKED;
                }
            }
            float larger[2][2] = {{LOWEST, LOWEST}, {LOWEST, LOWEST}};  // of even and of odd columns apart: shorter chains
#pragma unroll
            for (int i = 0; i < 32; ++i) larger[i / 2 % 2][i % 2] = fmaxf(larger[i / 2 % 2][i % 2], scores[i]);
            float now[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) now[half] = max_of_row(fmaxf(larger[half][0], larger[half][1])) * LOG2E;
            if (j == 0) {
                most[0] = now[0];
                most[1] = now[1];
            } else if (__any_sync(ALL, now[0] > most[0] + SLACK || now[1] > most[1] + SLACK)) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float next = fmaxf(most[half], now[half]), factor = exp2_of(most[half] - next);
                    most[half] = next;
#pragma unroll
                    for (int i = 0; i < 18; ++i) mixed[i / 2 * 4 + half * 2 + i % 2] *= factor;
                }
            }
            unsigned weights[TILE / 16][4];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const float low = exp2_of(fmaf(scores[i * 2], LOG2E, -most[i % 2]));
                const float high = exp2_of(fmaf(scores[i * 2 + 1], LOG2E, -most[i % 2]));
                weights[i / 4][i % 4] = pack_pair(low, high);
            }
            begin_wgmma();
#pragma unroll
            for (int k = 0; k < TILE / 16; ++k) {
                // the next rows of values, and as many bytes less from there to the ones
                const unsigned long long further = k * 16 * ROW_BYTES / 16;
                multiply_by_values(mixed, weights[k], values + further - (further << 16), j > 0 || k > 0);
            }
            commit_wgmma();
            wait_for_wgmma<0>(mixed);
            near += TILE * 4;
            keys += TILE_BYTES / 16;
            values += TILE_BYTES / 16 - (TILE_BYTES / 16ull << 16);
        }
        write(mixed, mine, min(length - tile * TILE - warp * 16, 16), attended);
        order_before_engines();
    }

    // Writes this warp's rows, through shared memory, where its queries were, so that threads have 16 bytes of a row each.
    __device__ void write(const SumsAndTotal& mixed, unsigned through, int rows, char* attended) const {
        constexpr int BYTES = FP8_OUT ? D_KV : ROW_BYTES, PIECES = BYTES / 16, AT_A_TIME = 32 / PIECES;
        const float share[2] = {__fdividef(scale, mixed[32]), __fdividef(scale, mixed[34])};
        if (FP8_OUT) {
            const int group = lane / 4, pair = lane % 4;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int row = group + i % 2 * 8, n = i / 2;
                const unsigned at = through + row * BYTES + ((n / 2) ^ (row / 2 % 4)) * 16 + n % 2 * 8 + pair * 2;
                store_shared(at, pack_fp8(mixed[i * 2] * share[i % 2], mixed[i * 2 + 1] * share[i % 2]));
            }
        } else {
            const int row = lane % 16;
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                unsigned pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    pairs[i] = pack_pair(mixed[n * 4 + i * 2] * share[i % 2], mixed[n * 4 + i * 2 + 1] * share[i % 2]);
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

// Grid: a multiple of HEADS, block (WARPS + COPYING_WARPS) * 32, dynamic shared memory SHARED_BYTES + 1,024.
extern "C" __global__ void __launch_bounds__((WARPS + COPYING_WARPS) * 32, 1) hopper_attention(
    const void* query_key_value,       // map of half[tokens][3][HEADS][D_KV], in boxes of a tile's rows and a head's columns
    const int* __restrict__ passages,  // [count][3]: first token, length; one of length 0 ends them; the third number is not read
    int count,
    const float* __restrict__ bias,  // [2 * REACH + 1][HEADS], by how far the key lies after the query, plus REACH
    float scale,                     // what is written is so many times the result
    char* __restrict__ attended)     // half or, if FP8_OUT, e4m3 [tokens][HEADS][D_KV]
{
    extern __shared__ char raw[];
    const unsigned unaligned = shared_address(raw), shared = (unaligned + 1023) / 1024 * 1024;
    char* aligned = raw + (shared - unaligned);
    const int head = blockIdx.x % HEADS, start = blockIdx.x / HEADS, step = gridDim.x / HEADS;
    if (threadIdx.x < STAGES) {
        init_barrier(full(shared, threadIdx.x), 1);
        init_barrier(landed(shared, threadIdx.x), 1);
        init_barrier(empty(shared, threadIdx.x), WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int warp = __shfl_sync(ALL, threadIdx.x / 32, 0);  // so that the compiler knows that a warp stays together
    Passage next = passage_at(passages, start, count);
    if (warp >= WARPS) {
        give_registers<COPYING_REGISTERS>();
        grid_dependency_wait();  // of what is read only the queries, keys and values are written by another kernel; they are not read through registers
        if (warp >= WARPS + STAGES) return;  // a warp a stage copies
        acquire_map(query_key_value);
        const int stage = warp - WARPS, lane = threadIdx.x % 32;
        int cut = 0;  // passages so far whose last tile is not full
        for (int round = 0; next.length > 0; ++round) {
            const auto [first, length] = next;
            next = passage_at(passages, start + (round + 1) * step, count);  // on its way while this one is worked on
            if (round % STAGES != stage) continue;
            const unsigned done = full(shared, stage), to = shared + stage * STAGE_BYTES;
            const int tiles = (length + TILE - 1) / TILE;
            const bool cuts = length % TILE != 0;
            wait_for_phase(empty(shared, stage), round / STAGES % 2 ^ 1);
            if (lane == 0) {
                const unsigned barrier = cuts ? landed(shared, stage) : done;
                arrive_expecting(barrier, tiles * TILE_BYTES * 3);
                for (int i = 0; i < tiles; ++i) {
                    for (int part = 0; part < 3; ++part) {
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
        float* table = reinterpret_cast<float*>(aligned + AT_BIAS);
        for (int i = threadIdx.x; i < BIAS_PLACES; i += WARPS * 32) {
            const int distance = min(max(i - LONGEST, -REACH), REACH);
            const float value = bias[(distance + REACH) * HEADS + head];
            table[i] = value;
            table[SHIFTED + i + 1] = value;
        }
        unsigned* ones = reinterpret_cast<unsigned*>(aligned + AT_ONES);
        for (int i = threadIdx.x; i < ONES_BYTES / 4; i += WARPS * 32) ones[i] = pack_pair(1.f, 1.f);
        asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");  // the warps that copy are busy by now
        grid_dependency_wait();
        Consumer consumer{shared, 0, scale, warp % 4, static_cast<int>(threadIdx.x % 32)};
        const int row = consumer.warp * 16 + consumer.lane / 4;
        consumer.bias = shared + AT_BIAS + ((row % 2 ? SHIFTED + 1 : 0) + LONGEST + consumer.lane % 4 * 2 - row) * 4;
        constexpr int OUT_ROW = FP8_OUT ? D_KV : ROW_BYTES;
        int turn = warp / 4;  // which of the next tiles is this warpgroup's: tiles are dealt out in turn
        for (int round = 0; next.length > 0; ++round) {
            const auto [first, length] = next;
            next = passage_at(passages, start + (round + 1) * step, count);
            const int stage = round % STAGES, tiles = (length + TILE - 1) / TILE;
            wait_for_phase(full(shared, stage), round / STAGES % 2);
            if (turn < tiles) {
                char* to = attended + (static_cast<size_t>(first + turn * TILE + consumer.warp * 16) * HEADS + head) * OUT_ROW;
                consumer.attend(stage, turn, length, to);
                turn += WARPGROUPS;
            }
            turn -= tiles;
            __syncwarp();
            if (consumer.lane == 0) arrive(empty(shared, stage));
        }
    }
}
