// Vectors of eight fp16 numbers: all kernels load and store 16 bytes at a time. Every module of kernels.py begins with this file.
//
// kernels.py defines MAX_SPLITS, the largest number of splits of a split-K GEMM.
#include <cuda_fp16.h>

namespace {

constexpr int VECTOR = 8;  // halves in one 16-byte load
constexpr unsigned ALL = 0xffffffff;

template <int N> struct Floats {
    float at[N];
};
using Vector = Floats<VECTOR>;

__device__ uint4 load(const __half* address) { return *reinterpret_cast<const uint4*>(address); }
__device__ void store(__half* address, const uint4& bits) { *reinterpret_cast<uint4*>(address) = bits; }

__device__ Vector widen(const uint4& bits) {
    Vector v;
    const __half2* pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) {
        const float2 pair = __half22float2(pairs[i]);
        v.at[2 * i] = pair.x;
        v.at[2 * i + 1] = pair.y;
    }
    return v;
}

__device__ unsigned pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ uint4 narrow(const Vector& v) {
    return make_uint4(pack(v.at[0], v.at[1]), pack(v.at[2], v.at[3]), pack(v.at[4], v.at[5]), pack(v.at[6], v.at[7]));
}

// Waits until all earlier kernels of the graph have ended and their writes are visible.
//
// With programmatic dependent launch (cuda_graph.py) this kernel may start before that, and so may the kernels before it. Every thread must
// therefore call this before it writes anything and before it returns, and must read what earlier kernels write only after the call. The
// pointers to such data are arguments: otherwise the compiler might move reads through __restrict__ pointers to before the call.
template <typename... Pointers> __device__ void grid_dependency_wait(Pointers&... pointers) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const auto hide = [](auto& pointer) { asm volatile("" : "+l"(pointer)); };
    (hide(pointers), ...);
}

// Sums one vector over the splits of a split-K GEMM's output; `stride` halves lie between a split's vector and the next one's.
__device__ Vector sum_splits(const __half* first, int k_splits, size_t stride) {
    uint4 bits[MAX_SPLITS];
#pragma unroll
    for (int split = 0; split < MAX_SPLITS; ++split) {
        if (split < k_splits) bits[split] = load(first + split * stride);
    }
    Vector sum = widen(bits[0]);
#pragma unroll
    for (int split = 1; split < MAX_SPLITS; ++split) {
        if (split >= k_splits) break;
        const Vector more = widen(bits[split]);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum.at[i] += more.at[i];
    }
    return sum;
}

// Offset of element (row, column) in the input of a split-K GEMM, which is [k_splits][rows][columns / k_splits].
__device__ size_t split_offset(size_t row, size_t rows, int column, int columns, int k_splits) {
    const int split_columns = columns / k_splits;
    return (column / split_columns * rows + row) * split_columns + column % split_columns;
}

}  // namespace
