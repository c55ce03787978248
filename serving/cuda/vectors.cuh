// Eight halves at a time, as all kernels load, store and compute.
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

}  // namespace
