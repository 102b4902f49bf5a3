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

constexpr int MOST_BLOCKS = TILES + 1;  // that share a window

// Puts together the windows that several blocks share. Grid: windows × heads × parts of the width, a thread four columns.
extern "C" __global__ void __launch_bounds__(WIDTH / 4)
latent_attention_combine(const half_t* partial_out, const float2* partial_sums, half_t* out, int windows, int blocks,
                         int window_stride, int head_stride) {
    const int window = blockIdx.x, head = blockIdx.y;
    const int tiles = windows * TILES, window_begin = window * TILES;
    // the block of the window's first tile, and of its last: run_begin, inverted
    const int first = int(((long long)(window_begin + 1) * blocks - 1) / tiles);
    const int last = int(((long long)(window_begin + TILES) * blocks - 1) / tiles);
    if (first == last) return;
    // only the first may have begun before the window
    const int first_part = 2 * first + (window_begin > run_begin(first, tiles, blocks) ? 1 : 0);
    auto part = [&](int block) { return (block == first ? first_part : 2 * block) * HEADS + head; };

    __shared__ float shares[MOST_BLOCKS];
    if (threadIdx.x < 32) {
        float maximum = -infinity(), sum = 0.0f;
        for (int block = first + threadIdx.x; block <= last; block += 32)
            maximum = fmaxf(maximum, partial_sums[part(block)].x);
        maximum = warp_max(maximum);
        for (int block = first + threadIdx.x; block <= last; block += 32) {
            const float2 sums = partial_sums[part(block)];
            const float share = sums.y * exp2_approximate(sums.x - maximum);
            shares[block - first] = share;
            sum += share;
        }
        sum = warp_sum(sum);
        for (int block = first + threadIdx.x; block <= last; block += 32) shares[block - first] /= sum;
    }
    __syncthreads();
    const int i = (blockIdx.z * blockDim.x + threadIdx.x) * 4;
    float2 left = make_float2(0.0f, 0.0f), right = left;
#pragma unroll 8
    for (int block = first; block <= last; block++) {
        const uint2 four = *reinterpret_cast<const uint2*>(partial_out + (long long)part(block) * WIDTH + i);
        const float share = shares[block - first];
        const float2 a = to_float2(four.x), b = to_float2(four.y);
        left.x += share * a.x;
        left.y += share * a.y;
        right.x += share * b.x;
        right.y += share * b.y;
    }
    half_t* to = out + (long long)window * window_stride + head * head_stride + i;
    *reinterpret_cast<uint2*>(to) = make_uint2(to_half2(left.x, left.y), to_half2(right.x, right.y));
}
