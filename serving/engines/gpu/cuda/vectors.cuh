// Eight halves at a time, as all kernels load, store and compute. kernels.py defines MAX_SPLITS, that a gemm is made in.
#include <cuda_fp16.h>

namespace {

constexpr int VECTOR = 8;  // halves in one 16-byte load
constexpr unsigned ALL = 0xffffffff;

struct Vector {
    float at[VECTOR];
};

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

// Waits until what the kernels before have written is visible. In a graph a kernel may be launched before that (cuda_graph.py), and so may
// the one before it and the one before that: every thread calls this before it writes anything or ends, and reads whatever any kernel of the
// step writes through these pointers, behind this call. That they are passed keeps the compiler from reading earlier, as it may for
// __restrict__ ones.
template <typename... Pointers> __device__ void grid_dependency_wait(Pointers&... pointers) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const auto hide = [](auto& pointer) { asm volatile("" : "+l"(pointer)); };
    (hide(pointers), ...);
}

// What a gemm of several k_splits made: the sum of the k_splits, which lie `apart` halves from each other.
__device__ Vector sum_splits(const __half* first, int k_splits, size_t apart) {
    uint4 bits[MAX_SPLITS];
#pragma unroll
    for (int part = 0; part < MAX_SPLITS; ++part) {
        if (part < k_splits) bits[part] = load(first + part * apart);
    }
    Vector sum = widen(bits[0]);
#pragma unroll
    for (int part = 1; part < MAX_SPLITS; ++part) {
        if (part >= k_splits) break;
        const Vector more = widen(bits[part]);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum.at[i] += more.at[i];
    }
    return sum;
}

// Where a vector of a row lies for a gemm of `k_splits` k_splits, each of which reads its share of the columns of all rows.
__device__ size_t split_offset(size_t row, size_t rows, int column, int columns, int k_splits) {
    const int share = columns / k_splits;
    return (column / share * rows + row) * share + column % share;
}

}  // namespace
