// Matrix multiplication on tensor cores (mma.m16n8k16: fp16 operands, fp32 sums), and asynchronous copies to shared memory.
//
// A warp holds a tile of sums of 16 rows and 8 columns. Each thread has four of them: columns 2 * (lane % 4) and the next one, of the rows
// lane / 4 and lane / 4 + 8.

namespace {

constexpr float LOG2E = 1.44269504f;
constexpr float LOWEST = -1e30f;  // less than every score: the largest score of no keys
constexpr float MASKED = -3e38f;  // the score of a masked key: so low that its weight is 0 even if all keys so far were masked

__device__ unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }

__device__ void copy_async(__half* to, const __half* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

__device__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int left>
__device__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(left)); }

struct Fragments {
    unsigned at[4];
};

// Loads four 8x8 matrices from shared memory; lane i passes the address of row i % 8 of matrix i / 8.
__device__ Fragments load_matrices(const __half* row) {
    Fragments f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.at[0]), "=r"(f.at[1]), "=r"(f.at[2]), "=r"(f.at[3])
                 : "r"(shared_address(row)));
    return f;
}

// The same, with each matrix transposed.
__device__ Fragments load_transposed(const __half* row) {
    Fragments f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.at[0]), "=r"(f.at[1]), "=r"(f.at[2]), "=r"(f.at[3])
                 : "r"(shared_address(row)));
    return f;
}

// sum += a * b for one tile: a is 16 by 16, b is 16 by 8.
__device__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2 to the power of x.
__device__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Reductions over the four lanes that hold one row of a tile.
__device__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ float sum_of_row(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

}  // namespace
