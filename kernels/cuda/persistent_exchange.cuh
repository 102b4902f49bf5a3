#pragma once
// Numbers between blocks of the persistent step: words whose last bit tells which use of their place they are of, so
// that who reads them needs nothing else to wait for (persistent_step.cu says when a place may be written again).
#include "common.cuh"

typedef unsigned long long Word;  // four FP16, or two float32

DEVICE void put(float* to, float x, unsigned bit) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"((__float_as_uint(x) & ~1u) | bit) : "memory");
}

DEVICE void put(Word* to, Word x, unsigned bit) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((x & ~Word(1)) | bit) : "memory");
}

DEVICE uint4 look(const float* from) {
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

DEVICE uint4 look(const Word* from) {  // at two
    Word a, b;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
    return make_uint4(unsigned(a), unsigned(a >> 32), unsigned(b), unsigned(b >> 32));
}

DEVICE uint2 look_at_one(const Word* from) {
    Word x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
    return make_uint2(unsigned(x), unsigned(x >> 32));
}

// The same again, if ``late``
DEVICE void look_again(uint4& x, const float* from, bool late) {
    asm volatile(
        "{\n"
        ".reg .pred late;\n"
        "setp.ne.u32 late, %5, 0;\n"
        "@late ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
        : "l"(from), "r"(unsigned(late))
        : "memory");
}

DEVICE void look_again(uint4& x, const Word* from, bool late) {
    asm volatile(
        "{\n"
        ".reg .pred late;\n"
        ".reg .b64 first, second;\n"
        "setp.ne.u32 late, %5, 0;\n"
        "mov.b64 first, {%0, %1};\n"
        "mov.b64 second, {%2, %3};\n"
        "@late ld.relaxed.gpu.global.v2.b64 {first, second}, [%4];\n"
        "mov.b64 {%0, %1}, first;\n"
        "mov.b64 {%2, %3}, second;\n"
        "}\n"
        : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
        : "l"(from), "r"(unsigned(late))
        : "memory");
}

DEVICE void look_again(uint2& x, const Word* from, bool late) {
    asm volatile(
        "{\n"
        ".reg .pred late;\n"
        ".reg .b64 word;\n"
        "setp.ne.u32 late, %3, 0;\n"
        "mov.b64 word, {%0, %1};\n"
        "@late ld.relaxed.gpu.global.b64 word, [%2];\n"
        "mov.b64 {%0, %1}, word;\n"
        "}\n"
        : "+r"(x.x), "+r"(x.y)
        : "l"(from), "r"(unsigned(late))
        : "memory");
}

// Whether what was seen is not this use's; and the bit taken off, so that it does not change what is computed.
DEVICE bool is_late(const uint4& x, const float*, unsigned bit) {
    return ((x.x ^ bit) | (x.y ^ bit) | (x.z ^ bit) | (x.w ^ bit)) & 1;
}
DEVICE bool is_late(const uint4& x, const Word*, unsigned bit) { return ((x.x ^ bit) | (x.z ^ bit)) & 1; }
DEVICE bool is_late(const uint2& x, const Word*, unsigned bit) { return (x.x ^ bit) & 1; }
DEVICE void clear(uint4& x, const float*) { x = make_uint4(x.x & ~1u, x.y & ~1u, x.z & ~1u, x.w & ~1u); }
DEVICE void clear(uint4& x, const Word*) { x = make_uint4(x.x & ~1u, x.y, x.z & ~1u, x.w); }
DEVICE void clear(uint2& x, const Word*) { x.x &= ~1u; }

// Waits for the numbers of several places, of which ``x`` were seen. It looks at all that are late and only then waits
// for what it sees: many looks take as long as one.
template <int N, typename X, typename T>
DEVICE void get(X (&x)[N], const T* const (&from)[N], unsigned bit) {
    bool any;
    do {
        any = false;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const bool late = is_late(x[i], from[i], bit);
            look_again(x[i], from[i], late);
            any |= late;
        }
    } while (any);
#pragma unroll
    for (int i = 0; i < N; i++) clear(x[i], from[i]);
}

DEVICE float4 as_floats(const uint4& x) {
    return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
}

// Eight float32 each from several places, as FP16.
template <int N>
DEVICE void get_eights(uint4 (&to)[N], const float* const (&from)[N], unsigned bit) {
    uint4 seen[2 * N];
    const float* places[2 * N];
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
        places[i] = from[i / 2] + i % 2 * 4;
        seen[i] = look(places[i]);
    }
    get(seen, places, bit);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float4 a = as_floats(seen[2 * i]), b = as_floats(seen[2 * i + 1]);
        to[i] = make_uint4(to_half2(a.x, a.y), to_half2(a.z, a.w), to_half2(b.x, b.y), to_half2(b.z, b.w));
    }
}

// The numbers of four neighbouring lanes as FP16, in the first of them; its own is rounded so that its last bit is
// free.
DEVICE Word pack(float x) {
    unsigned half = to_half(x);
    if ((half & 0x7c00) != 0x7c00 && threadIdx.x % 4 == 0) half += half >> 1 & half & 1;
    half |= __shfl_down_sync(ALL_LANES, half, 1) << 16;
    return Word(__shfl_down_sync(ALL_LANES, half, 2)) << 32 | half;
}
