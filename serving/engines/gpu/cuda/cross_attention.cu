// Cross-attention of a decoder step, split-KV: a block attends to one chunk of a question's keys, combine_split_kv combines the chunks.
//
// The kernel has two forms, chosen at compile time. With MHA (KV_HEADS == HEADS) every key is used by one head. With MQA and GQA heads
// share keys, and tensor cores compute sixteen heads at a time. MHA's cache may be in e4m3 (CROSS_FP8): half the bytes, which bound its speed.
// Keys and values are there divided by a scale of their layer and head. The query is multiplied by the keys' scale, the result by the
// values', so that the loop over tokens does not know of scales. That cache is [slots][2][HEADS][capacity][D_KV]: a head's tokens lie side by
// side, as 64 bytes of every token here and there would be read at three quarters of the speed.
namespace {

#if CROSS_FP8
static_assert(KV_HEADS == HEADS, "only MHA has a cache in e4m3");
using Cached = unsigned char;
#else
using Cached = __half;
#endif
constexpr int CROSS_VECTOR = 16 / sizeof(Cached), CROSS_LANES = D_KV / CROSS_VECTOR, CROSS_TOKENS = 32 / CROSS_LANES;
using CrossVector = Floats<CROSS_VECTOR>;
constexpr int CROSS_STRIDE = CROSS_FP8 ? D_KV : STRIDE;  // from a token's key of a head to the next token's

// From the start of a slot to the first key of a head, and from a key to its value.
__device__ size_t keys_of_head(int kv_head, int capacity) { return static_cast<size_t>(kv_head) * D_KV * (CROSS_FP8 ? capacity : 1); }
__device__ size_t value_behind_key(int capacity) { return static_cast<size_t>(KV_HEADS) * D_KV * (CROSS_FP8 ? capacity : 1); }

__device__ uint4 load_cached(const Cached* address) { return *reinterpret_cast<const uint4*>(address); }

// As many numbers in half precision as a lane reads of the cache, times a scale.
__device__ CrossVector load_scaled(const __half* address, float scale) {
    CrossVector v;
#pragma unroll
    for (int i = 0; i < CROSS_VECTOR; i += VECTOR) {
        const Vector eight = widen(load(address + i));
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) v.at[i + j] = eight.at[j] * scale;
    }
    return v;
}

#if CROSS_FP8
// Sums of a few products are in half precision: converting every e4m3 number to fp32 would take longer than reading it. The error is a
// hundredth of e4m3's own. Sums over tokens are in fp32.
struct Query {
    __half2 at[CROSS_VECTOR / 2];
};

// Numbers 2 * i and 2 * i + 1 of sixteen.
__device__ __half2 two_of(const uint4& bits, int i) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
    const unsigned short two = static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)));
    unsigned halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
    return *reinterpret_cast<const __half2*>(&halves);
}

__device__ Query load_query(const __half* address, float scale) {
    const CrossVector scaled = load_scaled(address, scale);
    Query query;
#pragma unroll
    for (int i = 0; i < CROSS_VECTOR / 2; ++i) query.at[i] = __floats2half2_rn(scaled.at[2 * i], scaled.at[2 * i + 1]);
    return query;
}

__device__ float score_of(const Query& query, const uint4& key) {
    __half2 sums[2] = {};
#pragma unroll
    for (int i = 0; i < CROSS_VECTOR / 2; ++i) sums[i % 2] = __hfma2(query.at[i], two_of(key, i), sums[i % 2]);
    const float2 even = __half22float2(sums[0]), odd = __half22float2(sums[1]);
    return sum_of_token<CROSS_VECTOR>(even.x + even.y + (odd.x + odd.y));
}

__device__ void add_values(OnlineSoftmax<CROSS_VECTOR>& state, const float (&scores)[UNROLL], const uint4 (&values)[UNROLL]) {
    __half2 weights[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        weights[u] = __float2half2_rn(__expf(scores[u] - state.largest));
        state.total += __low2float(weights[u]);  // the weight that is used
    }
#pragma unroll
    for (int i = 0; i < CROSS_VECTOR / 2; ++i) {
        __half2 sum = {};
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) sum = __hfma2(weights[u], two_of(values[u], i), sum);
        state.value.at[2 * i] += __low2float(sum);
        state.value.at[2 * i + 1] += __high2float(sum);
    }
}
#else
using Query = CrossVector;

__device__ Query load_query(const __half* address, float scale) { return load_scaled(address, scale); }

__device__ float score_of(const Query& query, const uint4& key) { return sum_of_token<CROSS_VECTOR>(dot(query, widen(key))); }

__device__ void add_values(OnlineSoftmax<CROSS_VECTOR>& state, const float (&scores)[UNROLL], const uint4 (&values)[UNROLL]) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) state.add(scores[u], widen(values[u]));
}
#endif

// Of the keys (kind 0) or values (kind 1) of a head.
__device__ float scale_of(const float* scales, int kind, int kv_head) { return CROSS_FP8 ? scales[kind * KV_HEADS + kv_head] : 1.f; }

}  // namespace

// Grid (splits, KV_HEADS * HEAD_TILES, batch), block WARPS * 32; with shared keys, dynamic shared memory for two stages of keys and values.
extern "C" __global__ void __launch_bounds__(WARPS * 32) cross_attention(
    const __half* __restrict__ queries,  // [batch][HEADS * D_KV]
    const Cached* __restrict__ cache,
    const float* __restrict__ scales,  // [2][KV_HEADS] of keys and values, read only if CROSS_FP8
    const int* __restrict__ slots, const int* __restrict__ lengths,
    const int* __restrict__ positions,
    const float* __restrict__ bias,             // [max_relative_distance + 1][HEADS], or null if the reader has none
    const int* __restrict__ encoder_positions,  // [slots][capacity], read only if there is a bias
    int max_relative_distance, int capacity, int chunk,
    float* __restrict__ partial)  // [batch][HEADS][splits][D_KV + 2]: weighted sum of values, largest score, sum of weights
{
    const int split = blockIdx.x, splits = gridDim.x, row = blockIdx.z;
    const int length = lengths[row], start = split * chunk, end = min(start + chunk, length);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const size_t slot = slots[row];
    const int* token_positions = encoder_positions + slot * capacity;
    const int position = positions[row];
#if KV_HEADS == HEADS
    // MHA: CROSS_LANES lanes hold a token's key of this head; each key is read once.
    __shared__ float shared[WARPS][D_KV + 2];
    const int head = blockIdx.y, part = lane % CROSS_LANES, first = start + warp * CROSS_TOKENS;
    const Cached* keys = cache + slot * capacity * STRIDE + keys_of_head(head, capacity) + part * CROSS_VECTOR;
    const size_t to_value = value_behind_key(capacity);
    uint4 key_bits[UNROLL], value_bits[UNROLL];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = min(base + u * WARPS * CROSS_TOKENS + lane / CROSS_LANES, end - 1);
            const Cached* row_of_token = keys + static_cast<size_t>(token) * CROSS_STRIDE;
            key_bits[u] = load_cached(row_of_token);
            value_bits[u] = load_cached(row_of_token + to_value);
        }
    };
    // No kernel of a step writes this cache: it is read while others still run. In half precision that takes registers, and blocks, away.
    if (CROSS_FP8 && start < length) fetch(first);
    grid_dependency_wait(queries, partial);
    if (start >= length) return;
    const Query query = load_query(queries + (row * HEADS + head) * D_KV + part * CROSS_VECTOR, scale_of(scales, 0, head));
    OnlineSoftmax<CROSS_VECTOR> state;
    for (int base = first; base < end; base += WARPS * CROSS_TOKENS * UNROLL) {
        if (!CROSS_FP8 || base != first) fetch(base);
        float scores[UNROLL], largest = state.largest;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = base + u * WARPS * CROSS_TOKENS + lane / CROSS_LANES;
            scores[u] = score_of(query, key_bits[u]);
            if (token >= end) scores[u] = MASKED;
            else if (bias != nullptr) {
                const int distance = min(max(position - token_positions[token], 0), max_relative_distance);
                scores[u] += bias[distance * HEADS + head];
            }
            largest = fmaxf(largest, scores[u]);
        }
        state.rescale(largest);
        add_values(state, scores, value_bits);
    }
    const Combined combined = combine_block(state, shared);
    float* out = partial + (static_cast<size_t>(row * HEADS + head) * splits + split) * (D_KV + 2);
    if (threadIdx.x < D_KV) out[threadIdx.x] = combined.value;
    if (threadIdx.x == 0) {
        out[D_KV] = combined.largest;
        out[D_KV + 1] = combined.total;
    }
#else
    // MQA and GQA: the heads that share keys are the rows of a tile. A warp reads its tokens once for sixteen heads.
    constexpr int HEAD_TILES = (GROUP + 15) / 16, K_STEPS = D_KV / 16, N_TILES = WARP_TOKENS / 8, D_TILES = D_KV / 8;
    constexpr int PITCH = D_KV + VECTOR;  // padded: neighbouring rows start four banks apart
    constexpr int STAGE = 2 * WARP_TOKENS * PITCH, ROUND = WARPS * WARP_TOKENS;
    extern __shared__ __align__(16) __half tokens[];  // [WARPS][2 stages][keys, values][WARP_TOKENS][PITCH], then the results
    __half* const stages = tokens + warp * 2 * STAGE;
    const int kv_head = blockIdx.y / HEAD_TILES, tile = blockIdx.y % HEAD_TILES * 16, group = lane / 4, pair = lane % 4;
    const __half* source = cache + slot * capacity * STRIDE + kv_head * D_KV;
    // Copies tokens into a stage. While a warp computes with one stage, its next tokens are copied into the other.
    const auto fetch = [&](int from, int stage) {
        __half* keys = stages + stage * STAGE;
        if (from < end) {
            for (int i = lane; i < WARP_TOKENS * D_TILES; i += 32) {
                const int token = i / D_TILES, column = i % D_TILES * VECTOR;
                const __half* row_of_token = source + static_cast<size_t>(min(from + token, end - 1)) * STRIDE + column;
                copy_async(keys + token * PITCH + column, row_of_token);
                copy_async(keys + (WARP_TOKENS + token) * PITCH + column, row_of_token + KV_HEADS * D_KV);
            }
        }
        commit_copies();
    };
    fetch(start + warp * WARP_TOKENS, 0);
    grid_dependency_wait(queries, partial);
    if (start >= length) return;
    int heads[2];  // beyond the group's last head that head is computed again, and not written
    unsigned query[K_STEPS][4];
    for (int half = 0; half < 2; ++half) heads[half] = kv_head * GROUP + min(tile + group + 8 * half, GROUP - 1);
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const __half* of_head = queries + (row * HEADS + heads[i % 2]) * D_KV;
            query[k][i] = *reinterpret_cast<const unsigned*>(of_head + k * 16 + pair * 2 + i / 2 * 8);
        }
    }
    float weighted[D_TILES][4] = {}, largest[2] = {LOWEST, LOWEST}, total[2] = {};
    for (int from = start + warp * WARP_TOKENS, stage = 0; from < end; from += ROUND, stage ^= 1) {
        __syncwarp();
        fetch(from + ROUND, stage ^ 1);
        wait_for_copies<1>();
        __syncwarp();
        const __half* keys = stages + stage * STAGE;
        const __half* values = keys + WARP_TOKENS * PITCH;
        float score[N_TILES][4] = {}, new_largest[2] = {largest[0], largest[1]};
#pragma unroll
        for (int n = 0; n < N_TILES; n += 2) {
#pragma unroll
            for (int k = 0; k < K_STEPS; ++k) {
                const Fragments f = load_matrices(keys + (n * 8 + lane / 16 * 8 + lane % 8) * PITCH + k * 16 + lane / 8 % 2 * 8);
                multiply(score[n], query[k], f.at[0], f.at[1]);
                multiply(score[n + 1], query[k], f.at[2], f.at[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = from + n * 8 + pair * 2 + i % 2;
                if (token >= end) score[n][i] = MASKED;
                else if (bias != nullptr) {
                    const int distance = min(max(position - token_positions[token], 0), max_relative_distance);
                    score[n][i] += bias[distance * HEADS + heads[i / 2]];
                }
                new_largest[i / 2] = fmaxf(new_largest[i / 2], score[n][i]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            new_largest[half] = max_of_row(new_largest[half]);
            const float factor = __expf(largest[half] - new_largest[half]);
            largest[half] = new_largest[half];
            total[half] *= factor;
#pragma unroll
            for (int d = 0; d < D_TILES; ++d) {
                weighted[d][2 * half] *= factor;
                weighted[d][2 * half + 1] *= factor;
            }
        }
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = __expf(score[n][i] - largest[i / 2]);
                total[i / 2] += score[n][i];
            }
        }
#pragma unroll
        for (int j = 0; j < WARP_TOKENS / 16; ++j) {
            const unsigned weight[4] = {pack(score[2 * j][0], score[2 * j][1]), pack(score[2 * j][2], score[2 * j][3]),
                                        pack(score[2 * j + 1][0], score[2 * j + 1][1]), pack(score[2 * j + 1][2], score[2 * j + 1][3])};
#pragma unroll
            for (int d = 0; d < D_TILES; d += 2) {
                const Fragments f = load_transposed(values + (j * 16 + lane % 16) * PITCH + d * 8 + lane / 16 * 8);
                multiply(weighted[d], weight, f.at[0], f.at[1]);
                multiply(weighted[d + 1], weight, f.at[2], f.at[3]);
            }
        }
    }
    // The warps' results replace the tokens in shared memory. A warp without tokens has the weight 0.
    __syncthreads();
    float(*results)[16][D_KV + 2] = reinterpret_cast<float(*)[16][D_KV + 2]>(tokens);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float* result = results[warp][group + 8 * half];
#pragma unroll
        for (int d = 0; d < D_TILES; ++d) {
            result[d * 8 + pair * 2] = weighted[d][2 * half];
            result[d * 8 + pair * 2 + 1] = weighted[d][2 * half + 1];
        }
        const float sum = sum_of_row(total[half]);
        if (pair == 0) {
            result[D_KV] = largest[half];
            result[D_KV + 1] = sum;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * (D_KV + 1); i += WARPS * 32) {
        const int head = i / (D_KV + 1), d = i % (D_KV + 1);
        if (tile + head >= GROUP) continue;
        float max_score = LOWEST, sum = 0.f;
        for (int w = 0; w < WARPS; ++w) max_score = fmaxf(max_score, results[w][head][D_KV]);
        for (int w = 0; w < WARPS; ++w) sum += results[w][head][d < D_KV ? d : D_KV + 1] * __expf(results[w][head][D_KV] - max_score);
        float* out = partial + (static_cast<size_t>(row * HEADS + kv_head * GROUP + tile + head) * splits + split) * (D_KV + 2);
        out[d < D_KV ? d : D_KV + 1] = sum;
        if (d == D_KV) out[D_KV] = max_score;
    }
#endif
}

// Combines the chunks of cross_attention. `k_splits` is the number of splits of the GEMM that reads `attended`.
// Grid (HEADS, batch), block max(32, D_KV), dynamic shared memory of one float per split.
extern "C" __global__ void combine_split_kv(
    const float* __restrict__ partial, const float* __restrict__ scales, const int* __restrict__ lengths, int splits, int chunk, int k_splits,
    __half* __restrict__ attended,  // [k_splits][batch][HEADS * D_KV / k_splits]
    float* __restrict__ softmax)    // [batch][HEADS][2]: largest score and sum of weights, for `attribution`
{
    extern __shared__ float factors[];
    const int head = blockIdx.x, row = blockIdx.y, d = threadIdx.x;
    const int used = (lengths[row] + chunk - 1) / chunk;
    grid_dependency_wait(partial, attended, softmax);
    const float* chunks = partial + static_cast<size_t>(row * HEADS + head) * splits * (D_KV + 2);
    for (int split = d; split < used; split += blockDim.x) factors[split] = chunks[split * (D_KV + 2) + D_KV];
    __syncthreads();
    float largest = LOWEST, total = 0.f, value = 0.f;
    for (int split = 0; split < used; ++split) largest = fmaxf(largest, factors[split]);
#pragma unroll 8
    for (int split = 0; split < used; ++split) {
        const float* chunk = chunks + split * (D_KV + 2);
        const float factor = __expf(factors[split] - largest);
        total += chunk[D_KV + 1] * factor;
        if (d < D_KV) value += chunk[d] * factor;
    }
    if (d < D_KV) {
        const size_t place = split_offset(row, gridDim.y, head * D_KV + d, HEADS * D_KV, k_splits);
        attended[place] = __float2half_rn(used == 0 ? 0.f : value / total * scale_of(scales, 1, head / GROUP));
    }
    if (d == 0) {
        softmax[(row * HEADS + head) * 2] = largest;
        softmax[(row * HEADS + head) * 2 + 1] = total;
    }
}

// The attention weight of each encoded token in the step at position 0, summed over heads and averaged over layers.
//
// It is launched once per layer with cross-attention and adds the layer's weights, times `layer_weight`. Rows at another position and idle
// rows are skipped.
// Grid (capacity / ATTRIBUTION_TOKENS rounded up, batch), block WARPS * 32.
extern "C" __global__ void __launch_bounds__(WARPS * 32) attribution(
    const __half* __restrict__ queries, const Cached* __restrict__ cache, const float* __restrict__ scales, const int* __restrict__ slots,
    const int* __restrict__ lengths, const int* __restrict__ positions, const float* __restrict__ bias, const int* __restrict__ encoder_positions,
    int max_relative_distance, int capacity, const float* __restrict__ softmax, int is_first_layer, float layer_weight,
    float* __restrict__ weights)  // [batch][capacity]
{
    __shared__ __align__(16) __half query[HEADS * D_KV];
    const int row = blockIdx.y, start = blockIdx.x * ATTRIBUTION_TOKENS, end = min(start + ATTRIBUTION_TOKENS, lengths[row]);
    grid_dependency_wait(queries, softmax, weights);
    if (positions[row] != 0 || start >= end) return;
    for (int i = threadIdx.x; i < HEADS * D_KV; i += blockDim.x) query[i] = queries[row * HEADS * D_KV + i];
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % CROSS_LANES;
    const size_t slot = slots[row];
    for (int base = start + warp * CROSS_TOKENS; base < end; base += WARPS * CROSS_TOKENS) {
        const int token = base + lane / CROSS_LANES;
        const int read = min(token, end - 1);
        const Cached* keys = cache + slot * capacity * STRIDE + static_cast<size_t>(read) * CROSS_STRIDE + part * CROSS_VECTOR;
        const int distance = bias == nullptr ? 0 : min(max(-encoder_positions[slot * capacity + read], 0), max_relative_distance);
        float weight = 0.f;
        for (int kv_head = 0; kv_head < KV_HEADS; ++kv_head) {
            const uint4 key = load_cached(keys + keys_of_head(kv_head, capacity));
            const float scale = scale_of(scales, 0, kv_head);
            for (int head = kv_head * GROUP; head < (kv_head + 1) * GROUP; ++head) {
                float score = score_of(load_query(query + head * D_KV + part * CROSS_VECTOR, scale), key);
                if (bias != nullptr) score += bias[distance * HEADS + head];
                const float* sums = softmax + (row * HEADS + head) * 2;
                weight += __expf(score - sums[0]) / sums[1];
            }
        }
        if (token < end && part == 0) {
            float* out = weights + static_cast<size_t>(row) * capacity + token;
            *out = is_first_layer ? weight * layer_weight : *out + weight * layer_weight;
        }
    }
}

#if CROSS_FP8
// Rounds the keys and values of one question to e4m3, in all layers with cross-attention.
// Grid (any, layers), any block.
extern "C" __global__ void quantize_cross_kv(
    const __half* __restrict__ source,    // [layers][capacity][STRIDE]
    const float* __restrict__ scales,     // [layers][2][KV_HEADS]
    int tokens, int capacity, size_t layer_stride,
    unsigned char* __restrict__ cache)  // [2][KV_HEADS][capacity][D_KV] of the slot in the first layer; `layer_stride` bytes to the next layer
{
    source += static_cast<size_t>(blockIdx.y) * capacity * STRIDE;
    cache += blockIdx.y * layer_stride;
    const float* of_layer = scales + blockIdx.y * 2 * KV_HEADS;
    const int vectors_of_head = tokens * CROSS_LANES, vectors = 2 * KV_HEADS * vectors_of_head;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        const int head = i / vectors_of_head, token = i % vectors_of_head / CROSS_LANES, at = i % CROSS_LANES * CROSS_VECTOR;
        const CrossVector v = load_scaled(source + static_cast<size_t>(token) * STRIDE + head * D_KV + at, 1.f / of_layer[head]);
        unsigned words[4] = {};
#pragma unroll
        for (int j = 0; j < CROSS_VECTOR / 2; ++j) {
            unsigned short two;
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(v.at[2 * j + 1]), "f"(v.at[2 * j]));
            words[j / 2] |= static_cast<unsigned>(two) << (16 * (j % 2));
        }
        const size_t place = (static_cast<size_t>(head) * capacity + token) * D_KV + at;
        *reinterpret_cast<uint4*>(cache + place) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
#endif
