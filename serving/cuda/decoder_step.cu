// What runs between the products of a decoder step and is not done to rows alone: attention over the caches, the choice of the token.
//
// Compiled for one reader by gpu_kernels.py, which defines D_KV, HEADS, KV_HEADS, CHUNK and VOCAB.
//
// A cache is half[slots][capacity][2 * KV_HEADS * D_KV]: of each token the keys of all heads, then the values. One step reads every valid
// token once, so these kernels are bound by memory; all they must do is ask for enough of it at a time. Sums and softmax are fp32.

namespace {

constexpr int GROUP = HEADS / KV_HEADS;      // query heads that read one key/value head
constexpr int LANES = D_KV / VECTOR;         // neighbouring lanes that hold one token's key between them
constexpr int TOKENS = 32 / LANES;           // tokens that a warp reads at once
constexpr int WARPS = 4;
constexpr int UNROLL = 4;                    // loads in flight a thread, of keys and of values each
constexpr int QUERIES = GROUP < 4 ? GROUP : 4;  // query heads a block, so that they fit into registers
constexpr int STRIDE = 2 * KV_HEADS * D_KV;  // halves a token
constexpr float LEAST = -1e30f;   // below every score
constexpr float MASKED = -3e38f;  // weighs 0 even where nothing else was seen

static_assert(D_KV % VECTOR == 0 && 32 % LANES == 0, "a key must fill a power of two of lanes");
static_assert(HEADS % KV_HEADS == 0, "query heads must share key heads evenly");

// The sum over the LANES lanes that hold one token, in all of them.
__device__ float sum_of_token(float x) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

// A softmax in progress: the largest score, the sum of weights relative to it, and the weighted sum of values of this lane's dimensions.
struct Mix {
    float largest = LEAST, total = 0.f;
    Vector value = {};

    __device__ void rescale(float new_largest) {
        const float factor = __expf(largest - new_largest);
        total *= factor;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) value.at[i] *= factor;
        largest = new_largest;
    }

    __device__ void add(float score, const Vector& v) {
        const float weight = __expf(score - largest);
        total += weight;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) value.at[i] += weight * v.at[i];
    }

    // Joins the mixes of all tokens of a warp; every lane then has the warp's.
    __device__ void join_warp() {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            rescale(fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step)));
            total += __shfl_xor_sync(0xffffffff, total, step);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) value.at[i] += __shfl_xor_sync(0xffffffff, value.at[i], step);
        }
    }
};

__device__ float dot(const Vector& a, const Vector& b) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sum += a.at[i] * b.at[i];
    return sum;
}

// The mixes of a block's warps, joined through shared memory. Thread d < D_KV gets the value of dimension d.
struct Joined {
    float largest, total, value;
};

__device__ Joined join_block(Mix& mix, float (*shared)[D_KV + 2]) {
    mix.join_warp();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane < LANES) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) shared[warp][lane * VECTOR + i] = mix.value.at[i];
        if (lane == 0) {
            shared[warp][D_KV] = mix.largest;
            shared[warp][D_KV + 1] = mix.total;
        }
    }
    __syncthreads();
    Joined joined = {LEAST, 0.f, 0.f};
    for (int w = 0; w < WARPS; ++w) joined.largest = fmaxf(joined.largest, shared[w][D_KV]);
    for (int w = 0; w < WARPS; ++w) {
        const float factor = __expf(shared[w][D_KV] - joined.largest);
        joined.total += shared[w][D_KV + 1] * factor;
        if (threadIdx.x < D_KV) joined.value += shared[w][threadIdx.x] * factor;
    }
    return joined;
}

}  // namespace

// Self-attention of one new token a row: its key and value are written to the cache, then it attends to all up to itself.
// Grid (HEADS, batch), block WARPS * 32. Rows with a negative position are idle.
extern "C" __global__ void __launch_bounds__(WARPS * 32) self_attention(
    const __half* __restrict__ query_key_value,  // [batch][(HEADS + 2 * KV_HEADS) * D_KV]
    __half* __restrict__ cache, const int* __restrict__ slots, const int* __restrict__ positions,
    const float* __restrict__ bias,  // [reach + 1][HEADS], by how far a key lies behind
    int reach, int capacity,
    __half* __restrict__ attended)  // [batch][HEADS * D_KV]
{
    __shared__ float shared[WARPS][D_KV + 2];
    const int head = blockIdx.x, row = blockIdx.y, kv_head = head / GROUP;
    const int position = positions[row];
    __half* out = attended + (row * HEADS + head) * D_KV;
    if (position < 0) {
        if (threadIdx.x < D_KV) out[threadIdx.x] = __half(0.f);
        return;
    }
    const __half* made = query_key_value + row * (HEADS + 2 * KV_HEADS) * D_KV;
    const __half* new_key = made + (HEADS + kv_head) * D_KV;
    const __half* new_value = new_key + KV_HEADS * D_KV;
    __half* past = cache + static_cast<size_t>(slots[row]) * capacity * STRIDE + kv_head * D_KV;
    if (head % GROUP == 0 && threadIdx.x < D_KV) {
        __half* present = past + static_cast<size_t>(position) * STRIDE;
        present[threadIdx.x] = new_key[threadIdx.x];
        present[KV_HEADS * D_KV + threadIdx.x] = new_value[threadIdx.x];
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
    const Vector query = widen(load(made + head * D_KV + part * VECTOR));
    Mix mix;
    for (int base = warp * TOKENS; base <= position; base += WARPS * TOKENS) {
        const int token = base + lane / LANES;
        Vector key = {}, value = {};
        if (token < position) {
            const __half* row_of_token = past + static_cast<size_t>(token) * STRIDE + part * VECTOR;
            key = widen(load(row_of_token));
            value = widen(load(row_of_token + KV_HEADS * D_KV));
        } else if (token == position) {  // other blocks may be writing it: take what it is written from
            key = widen(load(new_key + part * VECTOR));
            value = widen(load(new_value + part * VECTOR));
        }
        float score = sum_of_token(dot(query, key));
        score = token <= position ? score + bias[min(position - token, reach) * HEADS + head] : MASKED;
        mix.rescale(fmaxf(mix.largest, score));
        mix.add(score, value);
    }
    const Joined joined = join_block(mix, shared);
    if (threadIdx.x < D_KV) out[threadIdx.x] = __float2half_rn(joined.value / joined.total);
}

// Cross-attention of one token a row over one chunk of its question's keys; cross_join puts the chunks together.
// Grid (splits, KV_HEADS * ceil(GROUP / QUERIES), batch), block WARPS * 32.
extern "C" __global__ void __launch_bounds__(WARPS * 32) cross_attention(
    const __half* __restrict__ queries,  // [batch][HEADS * D_KV]
    const __half* __restrict__ cache, const int* __restrict__ slots, const int* __restrict__ lengths,
    const int* __restrict__ positions,
    const float* __restrict__ bias,            // [reach + 1][HEADS], or null where the reader has none
    const int* __restrict__ encoder_positions,  // [slots][capacity], read with the bias only
    int reach, int capacity, int splits,
    float* __restrict__ partial)  // [batch][HEADS][splits][D_KV + 2]
{
    __shared__ float shared[WARPS][D_KV + 2];
    const int split = blockIdx.x, row = blockIdx.z;
    const int length = lengths[row], start = split * CHUNK, end = min(start + CHUNK, length);
    if (start >= length) return;
    constexpr int BLOCKS_A_GROUP = (GROUP + QUERIES - 1) / QUERIES;
    const int kv_head = blockIdx.y / BLOCKS_A_GROUP, first = blockIdx.y % BLOCKS_A_GROUP * QUERIES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
    const size_t slot = slots[row];
    const __half* keys = cache + slot * capacity * STRIDE + kv_head * D_KV + part * VECTOR;

    Vector query[QUERIES];
    Mix mix[QUERIES];
    int heads[QUERIES];
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
        heads[q] = kv_head * GROUP + min(first + q, GROUP - 1);  // past the group's end the last head is computed again
        query[q] = widen(load(queries + (row * HEADS + heads[q]) * D_KV + part * VECTOR));
    }
    for (int base = start + warp * TOKENS; base < end; base += WARPS * TOKENS * UNROLL) {
        uint4 key_bits[UNROLL], value_bits[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = min(base + u * WARPS * TOKENS + lane / LANES, end - 1);
            const __half* row_of_token = keys + static_cast<size_t>(token) * STRIDE;
            key_bits[u] = load(row_of_token);
            value_bits[u] = load(row_of_token + KV_HEADS * D_KV);
        }
        float scores[QUERIES][UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = base + u * WARPS * TOKENS + lane / LANES;
            const Vector key = widen(key_bits[u]);
            int behind = 0;
            if (bias != nullptr && token < end) behind = min(max(positions[row] - encoder_positions[slot * capacity + token], 0), reach);
#pragma unroll
            for (int q = 0; q < QUERIES; ++q) {
                const float score = sum_of_token(dot(query[q], key));
                scores[q][u] = token >= end ? MASKED : bias == nullptr ? score : score + bias[behind * HEADS + heads[q]];
            }
        }
#pragma unroll
        for (int q = 0; q < QUERIES; ++q) {
            float largest = mix[q].largest;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) largest = fmaxf(largest, scores[q][u]);
            mix[q].rescale(largest);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const Vector value = widen(value_bits[u]);
#pragma unroll
            for (int q = 0; q < QUERIES; ++q) mix[q].add(scores[q][u], value);
        }
    }
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
        const Joined joined = join_block(mix[q], shared);
        if (first + q >= GROUP) continue;
        float* out = partial + (static_cast<size_t>(row * HEADS + heads[q]) * splits + split) * (D_KV + 2);
        if (threadIdx.x < D_KV) out[threadIdx.x] = joined.value;
        if (threadIdx.x == 0) {
            out[D_KV] = joined.largest;
            out[D_KV + 1] = joined.total;
        }
    }
}

// Puts the chunks of cross_attention together. Grid (HEADS, batch), block max(32, D_KV).
extern "C" __global__ void cross_join(
    const float* __restrict__ partial, const int* __restrict__ lengths, int splits,
    __half* __restrict__ attended,  // [batch][HEADS * D_KV]
    float* __restrict__ softmax)   // [batch][HEADS][2]: largest score and sum of weights, for `evidence`
{
    const int head = blockIdx.x, row = blockIdx.y, d = threadIdx.x;
    const int used = (lengths[row] + CHUNK - 1) / CHUNK;
    const float* chunks = partial + static_cast<size_t>(row * HEADS + head) * splits * (D_KV + 2);
    float largest = LEAST, total = 0.f, value = 0.f;
    for (int split = 0; split < used; ++split) largest = fmaxf(largest, chunks[split * (D_KV + 2) + D_KV]);
    for (int split = 0; split < used; ++split) {
        const float* chunk = chunks + split * (D_KV + 2);
        const float factor = __expf(chunk[D_KV] - largest);
        total += chunk[D_KV + 1] * factor;
        if (d < D_KV) value += chunk[d] * factor;
    }
    if (d < D_KV) attended[(row * HEADS + head) * D_KV + d] = __float2half_rn(used == 0 ? 0.f : value / total);
    if (d == 0) {
        softmax[(row * HEADS + head) * 2] = largest;
        softmax[(row * HEADS + head) * 2 + 1] = total;
    }
}

// The weight that each encoded token got from a row's first decoded token, summed over heads and averaged over layers.
// Grid (splits, batch), block WARPS * 32. Rows that are past their first token, and idle ones, leave at once.
extern "C" __global__ void __launch_bounds__(WARPS * 32) evidence(
    const __half* __restrict__ queries, const __half* __restrict__ cache, const int* __restrict__ slots, const int* __restrict__ lengths,
    const int* __restrict__ positions, const float* __restrict__ bias, const int* __restrict__ encoder_positions, int reach, int capacity,
    const float* __restrict__ softmax, int is_first_layer, float share,
    float* __restrict__ weights)  // [batch][capacity]
{
    __shared__ __align__(16) __half query[HEADS * D_KV];
    const int row = blockIdx.y, start = blockIdx.x * CHUNK, end = min(start + CHUNK, lengths[row]);
    if (positions[row] != 0 || start >= end) return;
    for (int i = threadIdx.x; i < HEADS * D_KV; i += blockDim.x) query[i] = queries[row * HEADS * D_KV + i];
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
    const size_t slot = slots[row];
    for (int base = start + warp * TOKENS; base < end; base += WARPS * TOKENS) {
        const int token = base + lane / LANES;
        const int read = min(token, end - 1);
        const __half* keys = cache + (slot * capacity + read) * STRIDE + part * VECTOR;
        const int behind = bias == nullptr ? 0 : min(max(-encoder_positions[slot * capacity + read], 0), reach);
        float weight = 0.f;
        for (int kv_head = 0; kv_head < KV_HEADS; ++kv_head) {
            const Vector key = widen(load(keys + kv_head * D_KV));
            for (int head = kv_head * GROUP; head < (kv_head + 1) * GROUP; ++head) {
                float score = sum_of_token(dot(widen(load(query + head * D_KV + part * VECTOR)), key));
                if (bias != nullptr) score += bias[behind * HEADS + head];
                const float* sums = softmax + (row * HEADS + head) * 2;
                weight += __expf(score - sums[0]) / sums[1];
            }
        }
        if (token < end && part == 0) {
            float* out = weights + static_cast<size_t>(row) * capacity + token;
            *out = is_first_layer ? weight * share : *out + weight * share;
        }
    }
}

// The likeliest token of each row and its log-probability; of equals the one with the lowest id. Grid (batch), block 1024.
extern "C" __global__ void __launch_bounds__(1024) pick_token(
    const float* __restrict__ logits,  // [batch][VOCAB]
    const float* __restrict__ eos_penalty, int eos, int* __restrict__ token, float* __restrict__ log_prob)
{
    __shared__ float largest_of[32], total_of[32];
    __shared__ int token_of[32];
    const float* row = logits + static_cast<size_t>(blockIdx.x) * VOCAB;
    const float penalty = eos_penalty[blockIdx.x];
    float largest = LEAST, total = 0.f;
    int best = 0;
    for (int i = threadIdx.x; i < VOCAB; i += blockDim.x) {
        const float logit = row[i] + (i == eos ? penalty : 0.f);
        if (logit > largest) {
            total = total * __expf(largest - logit) + 1.f;
            largest = logit;
            best = i;
        } else {
            total += __expf(logit - largest);
        }
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int round = 0; round < 2; ++round) {
        for (int step = 16; step > 0; step /= 2) {
            const float other_largest = __shfl_xor_sync(0xffffffff, largest, step);
            const float other_total = __shfl_xor_sync(0xffffffff, total, step);
            const int other = __shfl_xor_sync(0xffffffff, best, step);
            const float joint = fmaxf(largest, other_largest);
            total = total * __expf(largest - joint) + other_total * __expf(other_largest - joint);
            if (other_largest > largest || (other_largest == largest && other < best)) best = other;
            largest = joint;
        }
        if (round == 1) break;
        if (lane == 0) {
            largest_of[warp] = largest;
            total_of[warp] = total;
            token_of[warp] = best;
        }
        __syncthreads();
        if (warp > 0) return;
        largest = largest_of[lane];
        total = total_of[lane];
        best = token_of[lane];
    }
    if (lane == 0) {
        token[blockIdx.x] = best;
        log_prob[blockIdx.x] = -logf(total);
    }
}
