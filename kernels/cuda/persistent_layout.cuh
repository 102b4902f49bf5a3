#pragma once
// How the persistent step is shared out over blocks and warps, and what lies where in global and in shared memory.
#include "hopper.cuh"
#include "persistent_exchange.cuh"

constexpr int HEADS = WIDTH / 64;
constexpr int WARPS = 16, THREADS = WARPS * 32;  // that compute
constexpr int MEMORY_WARPS = 4;                  // behind them, that bring memory
constexpr int ENCODED = 1500;                    // positions of cross-attention
constexpr float SCALE = LOG2_E / 8.0f;           // 8: the root of the 64 numbers of a head
// Of a thread. All begin with 96: a block that takes more than others of it have given waits for ever.
constexpr int REGISTERS = 112, MEMORY_REGISTERS = 32;
static_assert(THREADS * REGISTERS + MEMORY_WARPS * 32 * MEMORY_REGISTERS <= (THREADS + MEMORY_WARPS * 32) * 96);
constexpr int MOST_LAYERS = 32;
constexpr int MOST_SHARED = 227 * 1024;  // that a block can have

// Cross-attention's shares: some of the positions of one head of one slot.
constexpr int UNITS = SLOTS * HEADS;
constexpr int SPLITS = BLOCKS / UNITS > 12 ? 12 : BLOCKS / UNITS;
constexpr int SPLIT = (ENCODED + SPLITS - 1) / SPLITS;
constexpr int ROUND = WARPS * 16;  // positions that a block looks at together
constexpr int ROUNDS = (SPLIT + ROUND - 1) / ROUND;
constexpr int KEPT = ROUNDS > 2 ? 2 : ROUNDS;  // of those, in registers before the query arrives
static_assert(UNITS <= BLOCKS && (SPLITS - 1) * SPLIT < ENCODED, "a share for each, none empty");

struct Layer {  // addresses; kernels/persistent_step.py fills them in, in this order
    const half_t *qkv_weight, *self_out_weight, *query_weight, *cross_out_weight, *up_weight, *down_weight;
    half_t *self_keys, *self_values;            // [slots, n_ctx, WIDTH]
    const half_t *cross_keys, *cross_values;  // [slots, HEADS, 1500, 64]
};

// A layer's normalisations and biases, float32, side by side.
struct Small {
    float self_norm_weight[WIDTH], self_norm_bias[WIDTH], cross_norm_weight[WIDTH], cross_norm_bias[WIDTH];
    float mlp_norm_weight[WIDTH], mlp_norm_bias[WIDTH];
    float qkv_bias[3 * WIDTH], self_out_bias[WIDTH], query_bias[WIDTH], cross_out_bias[WIDTH], up_bias[4 * WIDTH];
    float down_bias[WIDTH];
};

// What blocks write for others; zeros before the first step.
struct Exchange {
    float residual[3][SLOTS][WIDTH];  // after self-attention, after cross-attention, after the perceptron
    float qkv[SLOTS][3 * WIDTH];
    float query[SLOTS][WIDTH];
    Word mixed[SLOTS][WIDTH / 4];
    Word inner[SLOTS][WIDTH];
    Word parts[UNITS][SPLITS][16];  // of cross-attention: means of values,
    Word shares[UNITS][SPLITS];     // the largest score and the sum of weights
    unsigned uses[BLOCKS];          // how often a block has used all of this; each its own
};
static_assert(sizeof(Exchange) <= EXCHANGE, "what kernels/persistent_step.py takes");

// How a product of ROWS × K is shared out: rows over blocks, GRAIN of them at a time; K over warps.
template <int ROWS_, int K_, int GRAIN_ = 1>
struct Product {
    static constexpr int ROWS = ROWS_, K = K_, GRAIN = GRAIN_;
    static constexpr int MOST = (ROWS / GRAIN + BLOCKS - 1) / BLOCKS * GRAIN;  // rows of a block
    static constexpr int WHOLE = MOST / 16 + (MOST % 16 > 8);  // tiles of 16 rows
    static constexpr bool HALF = MOST > WHOLE * 16;            // and one of eight
    static constexpr int SEGMENTS = K / WIDTH;                // of a row, as it lies in shared memory
    static constexpr int OWN = (K / 16 + WARPS - 1) / WARPS;  // pieces of 16 columns of a warp
    static constexpr int ACTIVE = K / 16 / OWN;               // warps that have any
    static constexpr int CHAINS = WHOLE > 2 ? 1 : WHOLE == 2 || OWN < 4 ? 2 : 4;  // sums that a warp keeps of a tile
    static_assert(ROWS / GRAIN >= BLOCKS, "each block has rows, on which the waits rely");
    static_assert(ACTIVE * OWN * 16 == K && ACTIVE % 4 == 0 && WIDTH / 16 % OWN == 0, "whole shares");
    DEVICE static int first(int block) { return block * (ROWS / GRAIN) / BLOCKS * GRAIN; }
};
using Qkv = Product<3 * WIDTH, WIDTH>;
using Square = Product<WIDTH, WIDTH>;
using Up = Product<4 * WIDTH, WIDTH, 4>;
using Down = Product<WIDTH, 4 * WIDTH>;
using Vocabulary = Product<16 * BLOCKS, WIDTH>;  // 16 rows at a time

constexpr int QUADS = Square::OWN * 4;  // of a warp's columns in a product of WIDTH columns
constexpr int MOST_INPUT = Down::OWN * 16;
DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
// of any product in a block; where a block has few rows, it is the vocabulary that has most
constexpr int MOST_RESULTS = larger(larger(Qkv::MOST, Up::MOST), larger(Down::MOST, Vocabulary::MOST)) * SLOTS;
constexpr int STAGES = 8;  // pieces of work that memory is ahead at most

struct Shared {
    Layer layers[MOST_LAYERS];
    Word full[STAGES], empty[STAGES];  // barriers
    float2 moments[SLOTS][WARPS];
    float sums[2][MOST_RESULTS][WARPS + 4];          // a warp's part of each result; two, which take turns
    half_t input[WARPS][SLOTS][MOST_INPUT + 16];  // a warp's columns
    float mixed[WARPS][64], maxima[WARPS], totals[WARPS];
    float kept[SLOTS * Square::MOST];  // the block's own of the residual stream
    int sizes[MEMORY_WARPS][STAGES];
    unsigned uses;
    int last;  // position of the slot whose self-attention is this block's
};

// Behind it the ring of units, which hold WIDTH columns of a row each; 32 bytes more put neighbours into other banks.
constexpr int UNIT = WIDTH * 2, PITCH = UNIT + 32;
constexpr int RING_AT = (sizeof(Shared) + 127) / 128 * 128;
constexpr int RING = (MOST_SHARED - RING_AT) / PITCH / 4 * 4;
constexpr int UNIT_POSITIONS = UNIT / 128;  // of a head's keys or values
static_assert(Down::MOST * 4 <= RING && Up::MOST <= RING && Qkv::MOST <= RING && 16 <= RING, "a product fits");
static_assert((ROUND / UNIT_POSITIONS + 1) * 2 <= RING, "a round fits");

// This thread's place. It is asked for anew where it is needed: what the compiler derives from it once for all phases
// takes registers from the weights. ``turn``: a number below 2^31 that changes from phase to phase; the compiler does
// not know that it adds nothing.
struct Place {
    unsigned thread;

    DEVICE explicit Place(unsigned turn = 0) : thread(threadIdx.x ^ turn >> 31) { asm volatile("" : "+r"(thread)); }
    DEVICE int warp() const { return int(thread / 32); }
    DEVICE int lane() const { return int(thread % 32); }
    DEVICE int group() const { return thread % 32 / 4; }
    DEVICE int part() const { return thread % 4; }
    // where in the 64 numbers of a head its first or second eight are, as ``Tile`` has them
    DEVICE int eight(int which) const { return (group() + which) % 2 * 32 + part() * 8; }
};

DEVICE void compute_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

DEVICE uint2 load_shared_8(unsigned from) {
    uint2 to;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "r"(from) : "memory");
    return to;
}

DEVICE uint4 load_shared_16(unsigned from) {
    uint4 to;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "r"(from)
                 : "memory");
    return to;
}

// Of what no one writes while the kernel runs; now, not when it is first used.
DEVICE float load_early(const float* from) {
    float to;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(to) : "l"(from) : "memory");
    return to;
}

DEVICE float4 load_early_4(const float* from) {
    float4 to;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to.x), "=f"(to.y), "=f"(to.z), "=f"(to.w)
                 : "l"(from)
                 : "memory");
    return to;
}

DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// It is read by all blocks in every step, and so shall stay.
DEVICE void prefetch_to_stay(const void* from) { asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(from)); }
