// Self-attention of a decoder step: writes the key and value of each row's new token to the cache, and attends to all tokens up to it.
//
// `splits_in` is the number of splits of the qkv GEMM, `k_splits` that of the GEMM that reads `attended`. Rows with a negative position are
// idle. The caller guarantees position < capacity.
// Grid (HEADS, batch), block WARPS * 32.
extern "C" __global__ void __launch_bounds__(WARPS * 32) self_attention(
    const __half* __restrict__ query_key_value, int splits_in,  // [splits_in][batch][(HEADS + 2 * KV_HEADS) * D_KV]
    __half* __restrict__ cache, const int* __restrict__ slots, const int* __restrict__ positions,
    const float* __restrict__ bias,  // [max_relative_distance + 1][HEADS]: row d is for a key d tokens before the query
    int max_relative_distance, int capacity, int k_splits,
    __half* __restrict__ attended)  // [k_splits][batch][HEADS * D_KV / k_splits]
{
    __shared__ float shared[WARPS][D_KV + 2];
    const int head = blockIdx.x, row = blockIdx.y, kv_head = head / GROUP;
    const int position = positions[row];
    __half* out = attended + split_offset(row, gridDim.y, head * D_KV + threadIdx.x % D_KV, HEADS * D_KV, k_splits) - threadIdx.x % D_KV;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
    __half* cached = cache + static_cast<size_t>(slots[row]) * capacity * STRIDE + kv_head * D_KV;
    // The cached tokens were written in earlier steps, so they may be read before grid_dependency_wait.
    uint4 keys[UNROLL], values[UNROLL];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = base + u * WARPS * TOKENS + lane / LANES;
            if (token >= position) continue;
            const __half* row_of_token = cached + static_cast<size_t>(token) * STRIDE + part * VECTOR;
            keys[u] = load(row_of_token);
            values[u] = load(row_of_token + KV_HEADS * D_KV);
        }
    };
    fetch(warp * TOKENS);
    grid_dependency_wait(query_key_value, out);
    if (position < 0) {
        if (threadIdx.x < D_KV) out[threadIdx.x] = __half(0.f);
        return;
    }
    const __half* qkv = query_key_value + row * (HEADS + 2 * KV_HEADS) * D_KV;
    const __half* new_key = qkv + (HEADS + kv_head) * D_KV;
    const __half* new_value = new_key + KV_HEADS * D_KV;
    const size_t split_stride = static_cast<size_t>(gridDim.y) * (HEADS + 2 * KV_HEADS) * D_KV;
    const Vector query = sum_splits(qkv + head * D_KV + part * VECTOR, splits_in, split_stride);
    const uint4 present_key = narrow(sum_splits(new_key + part * VECTOR, splits_in, split_stride));
    const uint4 present_value = narrow(sum_splits(new_value + part * VECTOR, splits_in, split_stride));
    if (head % GROUP == 0 && threadIdx.x < LANES) {
        __half* present = cached + static_cast<size_t>(position) * STRIDE + part * VECTOR;
        store(present, present_key);
        store(present + KV_HEADS * D_KV, present_value);
    }
    OnlineSoftmax<VECTOR> state;
    for (int base = warp * TOKENS; base <= position; base += WARPS * TOKENS * UNROLL) {
        float scores[UNROLL], largest = state.largest;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = base + u * WARPS * TOKENS + lane / LANES;
            scores[u] = token <= position ? bias[min(position - token, max_relative_distance) * HEADS + head] : MASKED;
            if (token < position) continue;
            // the new token's key and value may not be in the cache yet
            keys[u] = present_key;
            values[u] = present_value;
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            scores[u] += sum_of_token<VECTOR>(dot(query, widen(keys[u])));
            largest = fmaxf(largest, scores[u]);
        }
        state.rescale(largest);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) state.add(scores[u], widen(values[u]));
        fetch(base + WARPS * TOKENS * UNROLL);
    }
    const Combined combined = combine_block(state, shared);
    if (threadIdx.x < D_KV) out[threadIdx.x] = __float2half_rn(combined.value / combined.total);
}
