#pragma once
// What the kernels share: numbers, warp reductions, asynchronous copies and matrix instructions.
// NVRTC finds no CUDA headers on a machine that has only the driver and the compiler, so none are used: half precision
// is moved as bits and converted by instructions.

typedef unsigned short half_t;   // the bits of one FP16 number
typedef unsigned int half2_t;    // of two, the first in the lower half

#define DEVICE __device__ __forceinline__

template <typename T>
DEVICE T ceil_div(T a, T b) { return (a + b - 1) / b; }

DEVICE float to_float(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

DEVICE half_t to_half(float x) {
    half_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE float2 to_float2(half2_t x) {
    return make_float2(to_float(half_t(x & 0xffff)), to_float(half_t(x >> 16)));
}

DEVICE half2_t to_half2(float low, float high) {
    half2_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

DEVICE half2_t multiply2(half2_t a, half2_t b) {
    half2_t y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// a · b + c, rounded once
DEVICE half2_t multiply_add2(half2_t a, half2_t b, half2_t c) {
    half2_t y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

DEVICE half2_t subtract2(half2_t a, half2_t b) {
    half2_t y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// 2^x, to about 2 units in the last place; 0 for -infinity
DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr float LOG2_E = 1.4426950408889634f;
constexpr unsigned ALL_LANES = 0xffffffffu;

DEVICE float infinity() { return __int_as_float(0x7f800000); }

template <int LANES = 32>
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

template <int LANES = 32>
DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

DEVICE unsigned shared_address(const void* pointer) { return unsigned(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory, past L1; nothing is read and zeros are written where ``valid`` is false
DEVICE void copy_async_16(unsigned shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most ``PENDING`` of the latest committed groups of this thread are still on their way.
template <int PENDING>
DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Four 8 × 8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
// Lane i receives of each matrix the elements (i / 4, i % 4 · 2) and the one behind it.
DEVICE void load_matrices(unsigned (&to)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// The same, transposed: lane i receives the elements (i % 4 · 2, i / 4) and the one below it.
DEVICE void load_matrices_transposed(unsigned (&to)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// C [16 × 8, FP32] += A [16 × 16, FP16] · B [16 × 8, FP16]. With group = lane / 4 and pair = lane % 4 · 2:
//   a: (group, pair), (group + 8, pair), (group, pair + 8), (group + 8, pair + 8), each with the element right of it
//   b: (pair, group), (pair + 8, group), each with the element below it
//   c: (group, pair), (group, pair + 1), (group + 8, pair), (group + 8, pair + 1)
DEVICE void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
