// What Hopper's multiprocessors have beyond older ones: products of a whole warpgroup from shared memory, barriers that count arrivals, and
// registers handed from one warpgroup to another. Needs the architecture sm_90a. gpu_kernels.py defines BF16: whether halves are bfloat16.
#include <cuda_bf16.h>

namespace {

__device__ void init_barrier(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ void arrive(unsigned barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Until the phase of this parity has ended; a barrier starts in a phase of parity 0, and the one before it counts as ended.
__device__ void wait_for_phase(unsigned barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Orders what this thread did in shared memory before what wgmma and the copy engine do there from now on.
__device__ void order_before_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What the copy engine puts into shared memory counts as arrived, to the byte, at a barrier that expects so many and no other arrival.
__device__ void arrive_expecting(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Makes a map that the host has written visible to the copy engine.
__device__ void acquire_map(const void* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

// Copies the box at this column and row of the map's matrix; one thread does it for all. Where the matrix has ended come zeros.
__device__ void copy_box(unsigned to, const void* map, int column, int row, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

template <int count> __device__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> __device__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }

// A matrix of rows of 128 bytes, whose eight 16-byte pieces lie at piece ^ (row % 8), from an address that 1,024 divides. If it has more
// than 64 columns, those beyond lie `apart` bytes further.
__device__ unsigned long long swizzled_matrix(unsigned address, unsigned apart = 16) {
    constexpr unsigned long long SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024ull / 16 << 32;
    return SWIZZLE_128 | EIGHT_ROWS | static_cast<unsigned long long>(apart / 16) << 16 | (address & 0x3ffff) / 16;
}

// Sums of 64 rows by 64 columns: a warp of the warpgroup holds 16 rows, and a thread of it [column / 8] of what tensor_cores.cuh describes.
typedef float Sums[32];
typedef float SumsAndTotal[36];  // eight columns more, equal to each other

__device__ void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last `left` groups are done; `sums` are those that may be read then.
template <int left, int count> __device__ void wait_for_wgmma(float (&sums)[count]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");  // keeps the compiler from reading them any earlier
}

// Four tiles of 8 by 8 halves, as `multiply_by_shared` wants them and as sums are packed; each thread names one row of 16 bytes.
__device__ void load_matrices(unsigned (&tiles)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(row)
                 : "memory");
}
__device__ void store_matrices(unsigned row, const unsigned (&tiles)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(tiles[0]), "r"(tiles[1]), "r"(tiles[2]), "r"(tiles[3])
                 : "memory");
}

__device__ void store_zeros(unsigned address) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}
__device__ uint4 load_shared(unsigned address) {
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(address)
                 : "memory");
    return bits;
}
__device__ void load_pair(float& a, float& b, unsigned address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(address) : "memory");
}
__device__ void store_shared(unsigned address, unsigned short bits) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
}

#if BF16
#define WGMMA_TYPES "bf16.bf16"
#else
#define WGMMA_TYPES "f16.f16"
#endif
#define SUMS_4(at) "+f"(sums[at]), "+f"(sums[at + 1]), "+f"(sums[at + 2]), "+f"(sums[at + 3])

// sums += a * b, for 64 rows, 16 terms and 64 columns, which are rows of b's matrix. `a` as for `multiply`.
__device__ void multiply_by_shared(Sums& sums, const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." WGMMA_TYPES
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        " {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
        : SUMS_4(0), SUMS_4(4), SUMS_4(8), SUMS_4(12), SUMS_4(16), SUMS_4(20), SUMS_4(24), SUMS_4(28)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// sums = a * b (+ sums if `adds`), for 64 rows, 16 terms, which are rows of b's matrix, and 72 columns.
__device__ void multiply_by_values(SumsAndTotal& sums, const unsigned (&a)[4], unsigned long long b, bool adds) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, %41, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k16.f32." WGMMA_TYPES
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17,"
        " %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35},"
        " {%36, %37, %38, %39}, %40, adds, 1, 1, 1;\n"
        "}"
        : SUMS_4(0), SUMS_4(4), SUMS_4(8), SUMS_4(12), SUMS_4(16), SUMS_4(20), SUMS_4(24), SUMS_4(28), SUMS_4(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));
}

#if BF16
__device__ unsigned pack_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}
#else
__device__ unsigned pack_pair(float low, float high) { return pack(low, high); }
#endif

// Two e4m3 numbers; what is too large becomes the largest.
__device__ unsigned short pack_fp8(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

}  // namespace
