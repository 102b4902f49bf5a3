#pragma once
// How latent attention's blocks share windows, and how what they have of a window that none holds whole is put together.
// The kernel that includes this is compiled with WIDTH, HEADS and KEYS, the positions of a tile.
#include "common.cuh"

constexpr int POSITIONS = 1500;
constexpr int TILES = (POSITIONS + KEYS - 1) / KEYS;  // of a window

struct Tile {
    int window, first;  // position
    DEVICE explicit Tile(int index) : window(index / TILES), first(index % TILES * KEYS) {}
    DEVICE bool ends_window() const { return first + KEYS >= POSITIONS; }
};

// First tile of a block's run, of ``tiles`` shared among ``blocks``.
DEVICE int run_begin(int block, int tiles, int blocks) { return int((long long)tiles * block / blocks); }

// What the block whose run is ``begin`` to ``end`` has of a window: all of it, or the part with this index. A run has at
// most two parts, its first and its last.
struct Part {
    bool whole;
    int index;
    DEVICE Part(int window, int begin, int end) {
        const int window_begin = window * TILES;
        whole = window_begin >= begin && window_begin + TILES <= end;
        index = 2 * blockIdx.x + (window_begin > begin ? 1 : 0);
    }
};

// The blocks that have parts of a window.
struct Sharing {
    int first, last, first_part;
    DEVICE Sharing(int window, int tiles, int blocks) {
        const int begin = window * TILES;
        // the block of the window's first tile, and of its last: run_begin, inverted
        first = int(((long long)(begin + 1) * blocks - 1) / tiles);
        last = int(((long long)(begin + TILES) * blocks - 1) / tiles);
        // only the first may have begun before the window
        first_part = 2 * first + (begin > run_begin(first, tiles, blocks) ? 1 : 0);
    }
    DEVICE int part(int block) const { return block == first ? first_part : 2 * block; }
};

constexpr int MOST_BLOCKS = TILES + 1;  // that share a window
constexpr int COMBINERS = 8;            // warps of a block of the kernel below; each takes every eighth part

// Puts together the windows that several blocks share. Grid: windows × heads × parts of the width, a lane four columns.
extern "C" __global__ void __launch_bounds__(COMBINERS * 32)
latent_attention_combine(const half_t* partial_out, const float2* partial_sums, half_t* out, int windows, int blocks,
                         int window_stride, int head_stride) {
    const int window = blockIdx.x, head = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Sharing sharing(window, windows * TILES, blocks);
    const int first = sharing.first, last = sharing.last;
    if (first == last) return;
    auto part = [&](int block) { return sharing.part(block) * HEADS + head; };

    __shared__ float shares[MOST_BLOCKS];
    __shared__ float4 sums[COMBINERS][32];
    if (warp == 0) {
        float maximum = -infinity(), sum = 0.0f;
        for (int block = first + lane; block <= last; block += 32)
            maximum = fmaxf(maximum, partial_sums[part(block)].x);
        maximum = warp_max(maximum);
        for (int block = first + lane; block <= last; block += 32) {
            const float2 sums = partial_sums[part(block)];
            const float share = sums.y * exp2_approximate(sums.x - maximum);
            shares[block - first] = share;
            sum += share;
        }
        sum = warp_sum(sum);
        for (int block = first + lane; block <= last; block += 32) shares[block - first] /= sum;
    }
    __syncthreads();
    const int i = (blockIdx.z * 32 + lane) * 4;
    float4 own = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    auto add = [&](float share, float2 a, float2 b) {
        own.x += share * a.x;
        own.y += share * a.y;
        own.z += share * b.x;
        own.w += share * b.y;
    };
#pragma unroll 8
    for (int block = first + warp; block <= last; block += COMBINERS) {
        const uint2 four = *reinterpret_cast<const uint2*>(partial_out + (long long)part(block) * WIDTH + i);
        add(shares[block - first], to_float2(four.x), to_float2(four.y));
    }
    sums[warp][lane] = own;
    __syncthreads();
    if (warp) return;
    for (int w = 1; w < COMBINERS; w++) {
        const float4 other = sums[w][lane];
        add(1.0f, make_float2(other.x, other.y), make_float2(other.z, other.w));
    }
    half_t* to = out + (long long)window * window_stride + head * head_stride + i;
    *reinterpret_cast<uint2*>(to) = make_uint2(to_half2(own.x, own.y), to_half2(own.z, own.w));
}
