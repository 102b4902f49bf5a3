// One decoding step of a few slots as one kernel: the whole loop over the layers, by blocks that stay.
//
// A step of one window is bound by reading the weights once; as some five hundred launches it takes three times that,
// because each begins with nothing on its way. Here each block, one a multiprocessor, has its share of every product's
// rows, and the step is a sequence of eight phases a layer, each of which needs numbers that other blocks have computed
// in the one before.
//
// Memory does not wait for them: some warps do nothing but bring the block's weights, in the order in which they will
// be used and as far ahead as shared memory holds them (half a layer), and before a phase's input arrives its weights
// lie in registers. So the step takes the longer of the two times, that of memory and that of the waits, not their sum.
//
// A wait is for the numbers themselves: no barriers, no counters, no fences. Each word that blocks exchange tells by
// its last bit whether it is this layer's or still that of the layer before: the bit turns with each use. Who needs a
// word reads it until the bit is right, so that a wait costs a write to the L2 cache and a read of it. A place is
// written again a layer later. By then all have read it. For each block has some rows of every product, and gives their
// results after it has read what came before; and no block goes on without all of some products' results:
//   qkv, mixed, residual[0]: read before the block gives to residual[1], for all of which each waits
//   query, parts, residual[1], inner: read before the block gives to residual[2], for all of which each waits
//   residual[2]: read before the block gives to residual[0], for all of which each waits
// and the next layer's words come after that. Between steps stands the kernel's end.
//
// Cross-attention reads ready keys and values: for few windows they are fewer bytes than the encoder state with the two
// products that latent cross-attention needs instead.
//
// Compiled with WIDTH, BLOCKS (the grid), SLOTS and EXCHANGE (bytes of the memory for what they exchange).
//
// NOTES: products are matrix instructions with the weights as their 16 rows and the slots as their columns, most of
// which are of no use: conversion and summation in float32 come free. A lane's four columns of a row lie side by side,
// which orders the columns inside of a piece of 16 otherwise than the instruction does; that is the same for weights
// and input, and so does not matter.
#include "hopper.cuh"

typedef unsigned long long Word;  // four FP16, or two float32

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

// ---- numbers between blocks: words that carry the use's bit ----

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

// Waits for four numbers, of which ``x`` was seen; the bit is taken off, so that it does not change what is computed.
DEVICE float4 get(uint4 x, const float* from, unsigned bit) {
    while (((x.x ^ bit) | (x.y ^ bit) | (x.z ^ bit) | (x.w ^ bit)) & 1) x = look(from);
    return make_float4(__uint_as_float(x.x & ~1u), __uint_as_float(x.y & ~1u), __uint_as_float(x.z & ~1u),
                       __uint_as_float(x.w & ~1u));
}

DEVICE uint4 get(uint4 x, const Word* from, unsigned bit) {
    while (((x.x ^ bit) | (x.z ^ bit)) & 1) x = look(from);
    return make_uint4(x.x & ~1u, x.y, x.z & ~1u, x.w);
}

DEVICE uint2 get_one(uint2 x, const Word* from, unsigned bit) {
    while ((x.x ^ bit) & 1) x = look_at_one(from);
    return make_uint2(x.x & ~1u, x.y);
}

// Eight float32 each from several places, as FP16.
template <int N>
DEVICE void get_eights(uint4 (&to)[N], const float* const (&from)[N], unsigned bit) {
    uint4 seen[N][2];
#pragma unroll
    for (int i = 0; i < N; i++) {
        seen[i][0] = look(from[i]);
        seen[i][1] = look(from[i] + 4);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float4 a = get(seen[i][0], from[i], bit), b = get(seen[i][1], from[i] + 4, bit);
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

// ---- the ring ----

// A warp that brings memory, by one of its threads: every fourth unit. It waits only for shared memory that the block
// itself will leave.
struct Memory {
    Shared& shared;
    const int warp;
    const unsigned long long policy = read_once();
    int at = 0, room = RING;
    unsigned begun = 0, left = 0, barrier;

    DEVICE Memory(Shared& shared_, int warp_) : shared(shared_), warp(warp_) {}

    DEVICE void make_room() {
        barrier_wait(shared_address(&shared.empty[left % STAGES]), left / STAGES & 1);
        room += shared.sizes[warp][left % STAGES];
        left++;
    }

    DEVICE void begin(int units, int bytes) {
        if (begun - left == STAGES) make_room();
        shared.sizes[warp][begun % STAGES] = units;
        barrier = shared_address(&shared.full[begun % STAGES]);
        if (warp == 0) barrier_expect(barrier, bytes);  // others' bytes may come before it: the barrier waits for this
        begun++;
    }

    // ``stride``: from one to the next, in numbers; ``rest``: bytes of the last one
    DEVICE void units(const half_t* from, int count, int stride, int rest = UNIT) {
#pragma unroll 1
        while (count > 0) {
            while (room == 0) make_room();
            const int n = min(min(count, room), RING - at);
            unsigned to = shared_address(&shared) + RING_AT + (at + warp) * PITCH;
            const half_t* own = from + (long long)warp * stride;
#pragma unroll 1
            for (int i = warp; i < n; i += MEMORY_WARPS) {
                copy_bytes(to, own, i + 1 < count ? UNIT : rest, barrier, policy);
                to += MEMORY_WARPS * PITCH;
                own += (long long)MEMORY_WARPS * stride;
            }
            from += (long long)n * stride;
            count -= n;
            room -= n;
            at = at + n == RING ? 0 : at + n;
        }
    }

    // Rows from the first on; a row's segments lie apart, so that those of neighbouring rows are neighbours.
    template <typename P>
    DEVICE void rows(const half_t* first, int rows) {
        begin(rows * P::SEGMENTS, rows * P::SEGMENTS * UNIT);
#pragma unroll 1
        for (int segment = 0; segment < P::SEGMENTS; segment++) units(first + segment * WIDTH, rows, P::K);
    }

    template <typename P>
    DEVICE void product(const half_t* matrix) {
        const int first = P::first(blockIdx.x);
        rows<P>(matrix + (long long)first * P::K, P::first(blockIdx.x + 1) - first);
    }

    DEVICE void positions(const half_t* keys, const half_t* values, int count) {
        const int n = (count + UNIT_POSITIONS - 1) / UNIT_POSITIONS, rest = count * 128 - (n - 1) * UNIT;
        begin(n * 2, count * 256);
        units(keys, n, WIDTH, rest);
        units(values, n, WIDTH, rest);
    }
};

// The same for a warp that uses it.
struct Stream {
    Shared& shared;
    int at = 0;
    unsigned begun = 0;

    DEVICE explicit Stream(Shared& shared_) : shared(shared_) {}

    DEVICE void wait() { barrier_wait(shared_address(&shared.full[begun % STAGES]), begun / STAGES & 1); }

    DEVICE unsigned unit(int i) {
        i += at;
        return shared_address(&shared) + RING_AT + (i < RING ? i : i - RING) * PITCH;
    }

    DEVICE void leave(int units) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&shared.empty[begun % STAGES]));
        begun++;
        at += units;
        if (at >= RING) at -= RING;
    }
};

// ---- products ----

// A warp's weights of a product. A lane has four columns of a piece from row group of each tile and, beside them, the
// same of row group + 8, in a tile of eight rows those of the next piece. Each such pair is a matrix operand as it
// comes, without moving words about, if the operand's rows and columns are read so: its row group holds the first two
// of the four columns, and its row group + 8 the other two; of what lies beside, likewise, on the right. The input's
// operand has four columns for a slot. In a tile of 16 rows they are the input's first two and other two numbers (for
// row group, with nothing on the right), and the same on the right (for row group + 8); in a tile of eight, the numbers
// of both pieces, twice. Of the results two count for a lane, [group, part · 2] and [group + 8, part · 2 + 1]: their
// sum is that of row group, or in odd parts of row group + 8, for slot part / 2.
template <typename P>
struct Weights {
    static constexpr int PAIRS = (P::OWN + 1) / 2;
    uint4 whole[P::WHOLE > 0 ? P::WHOLE : 1][P::OWN], half[PAIRS];

    DEVICE explicit Weights(Stream& stream, int rows = P::first(blockIdx.x + 1) - P::first(blockIdx.x)) {
        const Place at(stream.begun);
        stream.wait();
        // what has no value would keep its register all the time
#pragma unroll
        for (int i = 0; i < P::OWN; i++)
#pragma unroll
            for (int tile = 0; tile < P::WHOLE; tile++) whole[tile][i] = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) half[i] = make_uint4(0, 0, 0, 0);
        if (P::ACTIVE == WARPS || at.warp() < P::ACTIVE) {
            const int segment = P::SEGMENTS == 1 ? 0 : at.warp() * P::OWN / (WIDTH / 16);
            const int offset = (at.warp() * P::OWN - segment * (WIDTH / 16)) * 32 + at.part() * 8;
            auto address = [&](int row) { return stream.unit(segment * rows + min(row, rows - 1)) + offset; };
#pragma unroll
            for (int tile = 0; tile < P::WHOLE; tile++) {
                const unsigned upper = address(tile * 16 + at.group()), lower = address(tile * 16 + 8 + at.group());
#pragma unroll
                for (int i = 0; i < P::OWN; i++) {
                    const uint2 a = load_shared_8(upper + i * 32), b = load_shared_8(lower + i * 32);
                    whole[tile][i] = make_uint4(a.x, a.y, b.x, b.y);
                }
            }
            if (P::HALF) {
                const unsigned from = address(P::WHOLE * 16 + at.group());
#pragma unroll
                for (int i = 0; i < P::OWN; i += 2) {
                    const uint2 a = load_shared_8(from + i * 32);
                    const uint2 b = i + 1 < P::OWN ? load_shared_8(from + i * 32 + 32) : make_uint2(0, 0);
                    half[i / 2] = make_uint4(a.x, a.y, b.x, b.y);
                }
            }
        }
        stream.leave(rows * P::SEGMENTS);
    }

    // With the warp's columns of shared.input: its part of each result to ``sums``.
    DEVICE void multiply(const Stream& stream, float (*sums)[WARPS + 4]) const {
        static_assert(P::MOST * SLOTS <= MOST_RESULTS && P::OWN * 16 <= MOST_INPUT, "they have places");
        const Place at(stream.begun);
        const Shared& shared = stream.shared;
        if (P::ACTIVE == WARPS || at.warp() < P::ACTIVE) {
            float c[P::WHOLE + 1][P::CHAINS][4] = {};
            const int slot = at.group() / 4 < SLOTS ? at.group() / 4 : 0;
            const half_t* input = &shared.input[at.warp()][slot][at.part() * 4 + at.group() % 2 * 2];
            const bool right = at.group() & 2;
            unsigned before = 0;
#pragma unroll
            for (int i = 0; i < P::OWN; i++) {
                const unsigned x = *reinterpret_cast<const unsigned*>(input + i * 16);
#pragma unroll
                for (int tile = 0; tile < P::WHOLE; tile++) {
                    const uint4& w = whole[tile][i];
                    multiply_add(c[tile][i % P::CHAINS], {w.x, w.y, w.z, w.w}, right ? 0 : x, right ? x : 0);
                }
                if (P::HALF && (i % 2 == 1 || i + 1 == P::OWN)) {
                    const uint4& w = half[i / 2];
                    const unsigned first = i % 2 ? before : x, second = i % 2 ? x : 0;
                    multiply_add(c[P::WHOLE][i / 2 % P::CHAINS], {w.x, w.y, w.z, w.w}, first, second);
                }
                before = x;
            }
#pragma unroll
            for (int tile = 0; tile < P::WHOLE + P::HALF; tile++) {
                float sum = c[tile][0][0] + c[tile][0][3];
#pragma unroll
                for (int chain = 1; chain < P::CHAINS; chain++) sum += c[tile][chain][0] + c[tile][chain][3];
                const int row = tile * 16 + at.part() % 2 * 8 + at.group();
                const bool counts = at.part() / 2 < SLOTS && row < P::MOST;
                if (counts) sums[at.part() / 2 * P::MOST + row][at.warp()] = sum;
            }
        }
        compute_sync();
    }
};

// The whole of a result; ``i``: slot · MOST + row
template <typename P>
DEVICE float whole(const float (*sums)[WARPS + 4], int i) {
    float part[4] = {};
#pragma unroll
    for (int warp = 0; warp < P::ACTIVE; warp += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&sums[i][warp]);
        part[0] += four.x;
        part[1] += four.y;
        part[2] += four.z;
        part[3] += four.w;
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

// Of the columns that products with WIDTH of them take, a lane's four; lanes without any look at another's.
struct Columns {
    bool any;
    int first;

    DEVICE explicit Columns(const Place& at) {
        any = at.warp() < Square::ACTIVE && at.lane() < QUADS;
        first = (min(at.warp(), Square::ACTIVE - 1) * Square::OWN * 4 + min(at.lane(), QUADS - 1)) * 4;
    }
};

// A thread's result of a product, if it has one: those of the block's rows are the first threads'.
template <typename P>
struct Result {
    bool any;
    int slot, row;

    DEVICE explicit Result(const Place& at) {
        const int first = P::first(blockIdx.x), rows = P::first(blockIdx.x + 1) - first;
        slot = at.thread / P::MOST;
        any = slot < SLOTS && at.thread % P::MOST < rows;
        row = first + at.thread % P::MOST;
    }
};

// A normalisation's weights and biases of a lane's columns
struct Norm {
    float4 weight, bias;

    DEVICE Norm(const float* weights, const float* biases) {
        const Columns columns{Place()};
        weight = load_early_4(weights + columns.first);
        bias = load_early_4(biases + columns.first);
    }
};

// LayerNorm of this lane's numbers of each slot to shared.input; ``means``: what the
// last one found, so that squares are summed of small numbers.
DEVICE void normalise(Shared& shared, const float4 (&x)[SLOTS], const Norm& by, float (&means)[SLOTS]) {
    const Place at;
    const bool any = Columns(at).any;
    const int warp = at.warp(), lane = at.lane();
    float sum[SLOTS], squares[SLOTS];
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        const float mean = means[slot];
        const float4 y = make_float4(x[slot].x - mean, x[slot].y - mean, x[slot].z - mean, x[slot].w - mean);
        sum[slot] = any ? (y.x + y.y) + (y.z + y.w) : 0.0f;
        squares[slot] = any ? (y.x * y.x + y.y * y.y) + (y.z * y.z + y.w * y.w) : 0.0f;
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            sum[slot] += __shfl_xor_sync(ALL_LANES, sum[slot], offset);
            squares[slot] += __shfl_xor_sync(ALL_LANES, squares[slot], offset);
        }
    if (lane == 0 && warp < Square::ACTIVE) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) shared.moments[slot][warp] = make_float2(sum[slot], squares[slot]);
    }
    compute_sync();
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < Square::ACTIVE; i += 2) {
            const float4 two = *reinterpret_cast<const float4*>(&shared.moments[slot][i]);
            all = make_float4(all.x + two.x, all.y + two.y, all.z + two.z, all.w + two.w);
        }
        const float moved = (all.x + all.z) * (1.0f / WIDTH);
        const float norm = rsqrtf(fmaxf((all.y + all.w) * (1.0f / WIDTH) - moved * moved, 0.0f) + 1e-5f);
        const float mean = means[slot] += moved;
        if (any)
            *reinterpret_cast<uint2*>(&shared.input[warp][slot][lane * 4]) =
                make_uint2(to_half2((x[slot].x - mean) * norm * by.weight.x + by.bias.x,
                                    (x[slot].y - mean) * norm * by.weight.y + by.bias.y),
                           to_half2((x[slot].z - mean) * norm * by.weight.z + by.bias.z,
                                    (x[slot].w - mean) * norm * by.weight.w + by.bias.w));
    }
    __syncwarp();
}

// Waits for the FP16 input of a product, this warp's columns.
template <typename P>
DEVICE void fetch(Shared& shared, const Word (*from)[P::K / 4], unsigned bit) {
    constexpr int EACH = P::OWN * 2, ALL = EACH * SLOTS, TURNS = (ALL + 31) / 32;  // pairs of words
    const Place at;
    const int warp = at.warp(), lane = at.lane();
    if (P::ACTIVE == WARPS || warp < P::ACTIVE) {
        const Word* own = from[0] + warp * P::OWN * 4;
        uint4 seen[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int i = turn * 32 + lane, slot = i / EACH;
            seen[turn] = make_uint4(0, 0, 0, 0);
            if (i < ALL) seen[turn] = look(own + slot * (P::K / 4) + (i - slot * EACH) * 2);
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int i = turn * 32 + lane, slot = i / EACH;
            if (i < ALL)
                *reinterpret_cast<uint4*>(&shared.input[warp][slot][(i - slot * EACH) * 8]) =
                    get(seen[turn], own + slot * (P::K / 4) + (i - slot * EACH) * 2, bit);
        }
    }
    __syncwarp();
}

// ---- attention ----

// What a lane has of 16 positions of a head: of positions group and group + 8, eight numbers of each half of the head.
// Odd groups take the halves the other way round, so that both come from other banks: [position][first, second].
struct Tile {
    uint4 keys[2][2], values[2][2];
};

// This lane's part of a head's query, from its 64 float32 numbers: words v and v + 2 of eight numbers of each half of
// the head, where v = group % 2 and the halves' order is that of a position whose group is group / 2.
DEVICE void get_query(uint2 (&to)[2], const float* from, unsigned bit) {
    const Place at;
    const int first = at.group() / 2 % 2 * 32 + at.part() * 8;
    uint4 eights[2];
    get_eights<2>(eights, {from + first, from + (first ^ 32)}, bit);
#pragma unroll
    for (int i = 0; i < 2; i++)
        to[i] = at.group() % 2 ? make_uint2(eights[i].y, eights[i].w) : make_uint2(eights[i].x, eights[i].z);
}

// A warp's softmax over its positions. The largest score is the warp's; the rest is of the lane's own positions.
struct Attention {
    float maximum = -infinity(), sum = 0.0f, mixed[16] = {};

    // query: from ``get_query``. ``first``: position of this lane's group in the first of the tiles, which are
    // ROUND apart; those from ``end`` on do not count, but hold finite numbers.
    template <int N>
    DEVICE void attend(const uint2 (&query)[2], const Tile (&tiles)[N], int first, int end) {
        const Place at;
        float scores[N][2];
        float best = maximum;
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // a position is a matrix operand as it comes, like a product's weights, if every other word of it
                // counts as another row; the query has its halves one way round in some columns, the other in others
                float c[4] = {};
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    const uint4& key = tiles[n].keys[i][which];
                    multiply_add(c, {key.x, key.y, key.z, key.w}, query[which].x, query[which].y);
                }
                const float mine = c[0] + c[3], other = __shfl_xor_sync(ALL_LANES, mine, 1);
                const bool counts = first + n * ROUND + i * 8 < end;
                scores[n][i] = counts ? ((at.part() + at.group()) % 2 ? other : mine) * SCALE : -infinity();
            }
            best = fmaxf(best, fmaxf(scores[n][0], scores[n][1]));
        }
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, offset));
        const float reference = best == -infinity() ? 0.0f : best;  // none of the warp's positions counts
        const float rescale = exp2_approximate(maximum - reference);
        sum *= rescale;
        half2_t both[2][4];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float weight = exp2_approximate(scores[n][i] - reference);
                sum += weight;
                const half2_t twice = to_half2(weight, weight);
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    const uint4& value = tiles[n].values[i][which];
                    const half2_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        half2_t& sum_of = both[which][j];
                        sum_of = n + i == 0 ? multiply2(twice, words[j]) : multiply_add2(twice, words[j], sum_of);
                    }
                }
            }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float2 two = to_float2(both[i / 4][i % 4]);
            mixed[2 * i] = mixed[2 * i] * rescale + two.x;
            mixed[2 * i + 1] = mixed[2 * i + 1] * rescale + two.y;
        }
        maximum = best;
    }

    // All warps together: thread i of the first 64 gets number i of the mean of values; ``most`` and ``total``: the
    // largest score and the sum of weights.
    DEVICE float merge(Shared& shared, float& most, float& total) {
        const Place at;
        const int warp = at.warp(), lane = at.lane();
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
        // with each exchange a lane keeps half of its numbers
#pragma unroll
        for (int i = 0; i < 8; i++) mixed[i] += __shfl_xor_sync(ALL_LANES, mixed[8 + i], 4);
#pragma unroll
        for (int keep = 4; keep > 1; keep /= 2) {
            const int offset = 32 / keep;
            const bool upper = lane & offset;
#pragma unroll
            for (int i = 0; i < keep; i++) {
                const float other = upper ? mixed[i] : mixed[keep + i];
                mixed[i] = (upper ? mixed[keep + i] : mixed[i]) + __shfl_xor_sync(ALL_LANES, other, offset);
            }
        }
        const int number = at.eight(0) + (lane & 8 ? 4 : 0) + (lane & 16 ? 2 : 0);
        *reinterpret_cast<float2*>(&shared.mixed[warp][number]) = make_float2(mixed[0], mixed[1]);
        if (lane == 0) {
            shared.maxima[warp] = maximum;
            shared.totals[warp] = sum;
        }
        compute_sync();
        float result = 0.0f;
        most = -infinity();
        total = 0.0f;
        if (at.thread < 64) {
            float share[WARPS];
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                share[i] = shared.maxima[i];
                most = fmaxf(most, share[i]);
            }
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                share[i] = exp2_approximate(share[i] - most);  // 0 of a warp without positions
                total += share[i] * shared.totals[i];
                result += share[i] * shared.mixed[i][at.thread];
            }
            result = __fdividef(result, total);
        }
        return result;
    }
};

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

DEVICE void bring(Shared& shared, int warp, int n_layer, const half_t* tokens_table, int n_vocab) {
    Memory memory(shared, warp);
    const int unit = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
#pragma unroll 1
    for (int l = 0; l < n_layer; l++) {
        const Layer& layer = shared.layers[l];
        memory.product<Qkv>(layer.qkv_weight);
        memory.product<Square>(layer.self_out_weight);
        memory.product<Square>(layer.query_weight);
        if (unit < UNITS) {
            const int end = min((split + 1) * SPLIT, ENCODED);
#pragma unroll 1
            for (int at = split * SPLIT; at < end; at += ROUND) {
                const long long from = ((long long)unit * ENCODED + at) * 64;
                memory.positions(layer.cross_keys + from, layer.cross_values + from, min(ROUND, end - at));
            }
        }
        memory.product<Square>(layer.cross_out_weight);
        memory.product<Up>(layer.up_weight);
        memory.product<Down>(layer.down_weight);
    }
    const int end = (long long)(blockIdx.x + 1) * n_vocab / BLOCKS;
#pragma unroll 1
    for (int at = (long long)blockIdx.x * n_vocab / BLOCKS; at < end; at += 16)
        memory.rows<Vocabulary>(tokens_table + (long long)at * WIDTH, min(16, end - at));
}

// What a block that computes keeps from phase to phase
struct Step {
    Shared& shared;
    Stream stream;
    Exchange* exchange_;
    unsigned bit;
    float means[SLOTS] = {};

    DEVICE Step(Shared& shared_, Exchange* exchange) : shared(shared_), stream(shared_), exchange_(exchange) {}

    // Its places are found anew each time, as ``Place`` is.
    DEVICE Exchange* exchange() const {
        Exchange* to = exchange_;
        asm volatile("" : "+l"(to));
        return to;
    }

    DEVICE void get_residual(float4 (&x)[SLOTS], int which, unsigned bit) {
        const Columns columns{Place()};
        const float(*from)[WIDTH] = exchange()->residual[which];
        uint4 seen[SLOTS];
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) seen[slot] = look(from[slot] + columns.first);
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) x[slot] = get(seen[slot], from[slot] + columns.first, bit);
    }

    // A product's bias, into what is the block's own of the residual stream
    template <typename P>
    DEVICE void add(float bias) {
        const Place at(stream.begun);
        if (Result<P>(at).any) shared.kept[at.thread] += bias;
    }

    // and its result, which the others get too
    template <typename P>
    DEVICE void put_residual(const float (*sums)[WARPS + 4], int which) {
        const Place at(stream.begun);
        const Result<P> result(at);
        if (!result.any) return;
        const float kept = shared.kept[at.thread] += whole<P>(sums, at.thread);
        put(&exchange()->residual[which][result.slot][result.row], kept, bit);
    }

    template <typename P>
    DEVICE float bias(const float* biases) const {
        const Result<P> result{Place(stream.begun)};
        return result.any ? load_early(biases + result.row) : 0.0f;
    }
};

// This block's head of self-attention, if it has one
struct SelfUnit {
    int unit, slot, head;

    DEVICE SelfUnit() : unit(BLOCKS - 1 - blockIdx.x), slot(unit / HEADS), head(unit % HEADS) {}
    DEVICE bool any() const { return unit < UNITS; }

    DEVICE void prefetch_caches(const Layer& layer, int last, int n_ctx) const {
        if (!any()) return;
        const Place at;
        const half_t* from = at.lane() % 2 ? layer.self_values : layer.self_keys;
        for (int row = at.warp() * 16 + at.lane() / 2; row < last; row += ROUND)
            prefetch(from + ((long long)slot * n_ctx + row) * WIDTH + head * 64);
    }

    DEVICE void attend(Step& step, const Layer& layer, int last, int n_ctx) const {
        const long long begin = (long long)slot * n_ctx * WIDTH + head * 64;
        half_t *keys = layer.self_keys + begin, *values = layer.self_values + begin;
        const Place at;
        const int group = at.warp() * 16 + at.group();  // position
        Tile tile[1];
        auto load = [&](int round) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int position = round + group + i * 8;
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    tile[0].keys[i][which] = tile[0].values[i][which] = make_uint4(0, 0, 0, 0);
                    if (position >= last) continue;
                    const int from = position * WIDTH + at.eight(which);
                    tile[0].keys[i][which] = *reinterpret_cast<const uint4*>(keys + from);
                    tile[0].values[i][which] = *reinterpret_cast<const uint4*>(values + from);
                }
            }
        };
        load(0);
        const float* own = step.exchange()->qkv[slot] + head * 64;
        uint2 query[2];
        get_query(query, own, step.bit);
        Attention attention;
#pragma unroll 1
        for (int round = 0; round <= last; round += ROUND) {
            if (round > 0) load(round);
            if (last / 16 == round / 16 + at.warp()) {
                uint4 made[4];  // this position's key and value
                const float *first = own + WIDTH + at.eight(0), *second = own + WIDTH + at.eight(1);
                get_eights<4>(made, {first, second, first + WIDTH, second + WIDTH}, step.bit);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (round + group + i * 8 != last) continue;
#pragma unroll
                    for (int which = 0; which < 2; which++) {
                        tile[0].keys[i][which] = made[which];
                        tile[0].values[i][which] = made[2 + which];
                        *reinterpret_cast<uint4*>(keys + last * WIDTH + at.eight(which)) = made[which];
                        *reinterpret_cast<uint4*>(values + last * WIDTH + at.eight(which)) = made[2 + which];
                    }
                }
            }
            attention.attend<1>(query, tile, round + group, last + 1);
        }
        float most, total;
        const float mean = attention.merge(step.shared, most, total);
        if (at.thread >= 64) return;
        const Word four = pack(mean);
        if (at.part() == 0) put(&step.exchange()->mixed[slot][head * 16 + at.thread / 4], four, step.bit);
    }
};

// This block's share of cross-attention, if it has one
struct CrossUnit {
    int unit, split, begin, end;

    DEVICE CrossUnit() : unit(blockIdx.x / SPLITS), split(blockIdx.x % SPLITS) {
        begin = split * SPLIT;
        end = min(begin + SPLIT, ENCODED);
    }
    DEVICE bool any() const { return unit < UNITS; }

    DEVICE void take(Tile& tile, Stream& stream, int from) const {
        const int count = min(ROUND, end - from), units = (count + UNIT_POSITIONS - 1) / UNIT_POSITIONS;
        const Place at;
        stream.wait();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int position = min(at.warp() * 16 + at.group() + i * 8, count - 1);
            const int in = position / UNIT_POSITIONS, offset = position % UNIT_POSITIONS * 128;
            const unsigned key = stream.unit(in) + offset, value = stream.unit(units + in) + offset;
#pragma unroll
            for (int which = 0; which < 2; which++) {
                tile.keys[i][which] = load_shared_16(key + at.eight(which) * 2);
                tile.values[i][which] = load_shared_16(value + at.eight(which) * 2);
            }
        }
        stream.leave(units * 2);
    }

    DEVICE void attend(Step& step) const {
        Tile tiles[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            tiles[i] = {};
            if (i == 0 || begin + i * ROUND < end) take(tiles[i], step.stream, begin + i * ROUND);
        }
        const Place at;
        const float* own = step.exchange()->query[unit / HEADS] + unit % HEADS * 64;
        uint2 query[2];
        get_query(query, own, step.bit);
        Attention attention;
        const int group = begin + at.warp() * 16 + at.group();
        attention.attend<KEPT>(query, tiles, group, end);
#pragma unroll 1
        for (int from = begin + KEPT * ROUND; from < end; from += ROUND) {
            Tile tile[1];
            take(tile[0], step.stream, from);
            attention.attend<1>(query, tile, group + from - begin, end);
        }
        float most, total;
        const float mean = attention.merge(step.shared, most, total);
        if (at.thread >= 64) return;
        const Word four = pack(mean);
        if (at.part() == 0) put(&step.exchange()->parts[unit][split][at.thread / 4], four, step.bit);
        if (at.thread != 0) return;
        const Word share = Word(__float_as_uint(total)) << 32 | __float_as_uint(most);
        put(&step.exchange()->shares[unit][split], share, step.bit);
    }
};

// Puts the splits of cross-attention together, each warp the columns that it multiplies.
DEVICE void gather(Step& step) {
    const Place at;
    const Columns columns(at);
    if (columns.any) {
        const Word* shares = step.exchange()->shares[columns.first / 64];
        const Word* parts = step.exchange()->parts[columns.first / 64][0] + columns.first % 64 / 4;
        uint2 shares_seen[SLOTS][SPLITS], parts_seen[SLOTS][SPLITS];
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++)
#pragma unroll
            for (int i = 0; i < SPLITS; i++) {
                shares_seen[slot][i] = look_at_one(shares + slot * HEADS * SPLITS + i);
                parts_seen[slot][i] = look_at_one(parts + (slot * HEADS * SPLITS + i) * 16);
            }
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            float most = -infinity();
#pragma unroll
            for (int i = 0; i < SPLITS; i++) {
                uint2& share = shares_seen[slot][i];
                share = get_one(share, shares + slot * HEADS * SPLITS + i, step.bit);
                most = fmaxf(most, __uint_as_float(share.x));
            }
            float total = 0.0f;
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int i = 0; i < SPLITS; i++) {
                const uint2 part = get_one(parts_seen[slot][i], parts + (slot * HEADS * SPLITS + i) * 16, step.bit);
                const uint2& share = shares_seen[slot][i];
                const float weight = exp2_approximate(__uint_as_float(share.x) - most) * __uint_as_float(share.y);
                const float2 a = to_float2(part.x), b = to_float2(part.y);
                total += weight;
                sum.x += weight * a.x;
                sum.y += weight * a.y;
                sum.z += weight * b.x;
                sum.w += weight * b.y;
            }
            const float scale = __fdividef(1.0f, total);
            *reinterpret_cast<uint2*>(&step.shared.input[at.warp()][slot][at.lane() * 4]) =
                make_uint2(to_half2(sum.x * scale, sum.y * scale), to_half2(sum.z * scale, sum.w * scale));
        }
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS + MEMORY_WARPS * 32, 1)
persistent_step(const Layer* layers, const Small* smalls, int n_layer, const half_t* tokens_table,
                const float* positions_table, const float* norm_weight, const float* norm_bias, const int* tokens,
                const int* positions, int state_stride, float* logits, int n_vocab, int n_ctx, Exchange* exchange) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const SelfUnit self;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), WARPS);
        }
        barrier_init_fence();
        shared.uses = exchange->uses[blockIdx.x];
        shared.last = self.any() ? min(positions[self.slot * state_stride], n_ctx - 1) : 0;
    }
    for (int i = threadIdx.x; i < n_layer * int(sizeof(Layer) / sizeof(Word)); i += THREADS + MEMORY_WARPS * 32)
        reinterpret_cast<Word*>(shared.layers)[i] = reinterpret_cast<const Word*>(layers)[i];
    // a layer's small numbers come into the L2 cache a layer ahead, some lines by each block
    auto prefetch_small = [&](int l) {
        constexpr int LINES = int(sizeof(Small) / 128), EACH = (LINES + BLOCKS - 1) / BLOCKS;
        const Place at;
        const int line = blockIdx.x * EACH + at.thread;
        if (at.thread < EACH && line < LINES && l < n_layer)
            prefetch_to_stay(reinterpret_cast<const char*>(smalls + l) + line * 128);
    };
    prefetch_small(0);
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        registers_give<MEMORY_REGISTERS>();
        if (threadIdx.x % 32 == 0) bring(shared, threadIdx.x / 32 - WARPS, n_layer, tokens_table, n_vocab);
        return;
    }
    registers_take<REGISTERS>();

    Step step(shared, exchange);
    step.bit = shared.uses + 1 & 1;
    self.prefetch_caches(shared.layers[0], shared.last, n_ctx);

    auto position_of = [&](int slot) {
        return positions_table + min(positions[slot * state_stride], n_ctx - 1) * WIDTH;
    };
    auto token_of = [&](int slot) { return tokens_table + (long long)tokens[slot * state_stride] * WIDTH; };
    const Result<Square> kept{Place()};
    if (kept.any)
        shared.kept[threadIdx.x] = to_float(token_of(kept.slot)[kept.row]) + position_of(kept.slot)[kept.row];

#pragma unroll 1
    for (int l = 0; l < n_layer; l++) {
        const Layer& layer = shared.layers[l];
        const Small& small = smalls[l];
        prefetch_small(l + 1);

        {  // query, key and value
            const float bias = step.bias<Qkv>(small.qkv_bias);
            const Norm norm(small.self_norm_weight, small.self_norm_bias);
            const Weights<Qkv> weights(step.stream);
            float4 x[SLOTS];
            if (l > 0) {
                step.get_residual(x, 2, step.bit ^ 1);
            } else {  // the input, each block all of it
                const Columns columns{Place()};
#pragma unroll
                for (int slot = 0; slot < SLOTS; slot++) {
                    const uint2 four = *reinterpret_cast<const uint2*>(token_of(slot) + columns.first);
                    const float2 a = to_float2(four.x), b = to_float2(four.y);
                    const float4 y = *reinterpret_cast<const float4*>(position_of(slot) + columns.first);
                    x[slot] = make_float4(a.x + y.x, a.y + y.y, b.x + y.z, b.y + y.w);
                }
            }
            normalise(shared, x, norm, step.means);
            weights.multiply(step.stream, shared.sums[0]);
            const Place at;
            const Result<Qkv> result(at);
            if (result.any) {
                const float sum = whole<Qkv>(shared.sums[0], at.thread) + bias;
                put(&step.exchange()->qkv[result.slot][result.row], sum, step.bit);
            }
        }

        if (self.any()) self.attend(step, layer, shared.last, n_ctx);

        {
            const float bias = step.bias<Square>(small.self_out_bias);
            const Weights<Square> weights(step.stream);
            step.add<Square>(bias);
            fetch<Square>(shared, step.exchange()->mixed, step.bit);
            weights.multiply(step.stream, shared.sums[1]);
            step.put_residual<Square>(shared.sums[1], 0);
        }

        {  // cross-attention's query
            const float bias = step.bias<Square>(small.query_bias);
            const Norm norm(small.cross_norm_weight, small.cross_norm_bias);
            const Weights<Square> weights(step.stream);
            float4 x[SLOTS];
            step.get_residual(x, 0, step.bit);
            normalise(shared, x, norm, step.means);
            weights.multiply(step.stream, shared.sums[0]);
            const Place at;
            const Result<Square> result(at);
            if (result.any) {
                const float sum = whole<Square>(shared.sums[0], at.thread) + bias;
                put(&step.exchange()->query[result.slot][result.row], sum, step.bit);
            }
        }

        const CrossUnit cross;
        if (cross.any()) cross.attend(step);

        {
            const float bias = step.bias<Square>(small.cross_out_bias);
            const Weights<Square> weights(step.stream);
            step.add<Square>(bias);
            gather(step);
            weights.multiply(step.stream, shared.sums[1]);
            step.put_residual<Square>(shared.sums[1], 1);
        }

        {  // the perceptron
            const float bias = step.bias<Up>(small.up_bias);
            const Norm norm(small.mlp_norm_weight, small.mlp_norm_bias);
            if (l + 1 < n_layer) self.prefetch_caches(shared.layers[l + 1], shared.last, n_ctx);
            const Weights<Up> weights(step.stream);
            float4 x[SLOTS];
            step.get_residual(x, 1, step.bit);
            normalise(shared, x, norm, step.means);
            weights.multiply(step.stream, shared.sums[0]);
            const Place at;
            if (at.warp() * 32 < SLOTS * Up::MOST) {
                const Result<Up> result(at);
                const Word four = pack(result.any ? gelu(whole<Up>(shared.sums[0], at.thread) + bias) : 0.0f);
                if (result.any && at.part() == 0)
                    put(&step.exchange()->inner[result.slot][result.row / 4], four, step.bit);
            }
        }

        {
            const float bias = step.bias<Down>(small.down_bias);
            const Weights<Down> weights(step.stream);
            step.add<Down>(bias);
            fetch<Down>(shared, step.exchange()->inner, step.bit);
            weights.multiply(step.stream, shared.sums[1]);
            step.put_residual<Down>(shared.sums[1], 2);
        }
        step.bit ^= 1;
    }

    // the vocabulary
    const Norm norm(norm_weight, norm_bias);
    float4 x[SLOTS];
    step.get_residual(x, 2, step.bit ^ 1);
    normalise(shared, x, norm, step.means);
    const int end = (long long)(blockIdx.x + 1) * n_vocab / BLOCKS;
    int turn = 0;
#pragma unroll 1
    for (int first = (long long)blockIdx.x * n_vocab / BLOCKS; first < end; first += 16) {
        const Weights<Vocabulary> weights(step.stream, min(16, end - first));
        weights.multiply(step.stream, shared.sums[turn]);
        const int slot = threadIdx.x / 16, row = first + threadIdx.x % 16;
        if (slot < SLOTS && row < end)
            logits[(long long)slot * n_vocab + row] = whole<Vocabulary>(shared.sums[turn], threadIdx.x);
        turn ^= 1;
    }
    if (threadIdx.x == 0) exchange->uses[blockIdx.x] = shared.uses + n_layer;
}
