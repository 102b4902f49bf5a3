// One decoding step of a few slots as one kernel: the whole loop over the layers, by blocks that stay.
//
// A step of one window is bound by reading the weights once; as some five hundred launches it takes three times that,
// because each begins with nothing on its way. Here each block, one a multiprocessor, has its share of every product's
// rows. It loads the next product's weights into registers before it waits for the others at the end of the current one,
// so that memory is never without requests; a wait costs a round trip to the L2 cache.
//
// Cross-attention reads ready keys and values: for few windows they are fewer bytes than the encoder state with the two
// products that latent cross-attention needs instead.
//
// Compiled with WIDTH, BLOCKS (the grid) and SLOTS.
//
// NOTES: products are matrix instructions with the slots as their 16 rows, most of them zero: conversion and summation in
// float32 come free. Eight rows of weights and 32 columns make one 16-byte load a lane; the order of columns inside such
// a piece is the same for weights and input, and so does not matter.
#include "common.cuh"

constexpr int HEADS = WIDTH / 64;
constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int ENCODED = 1500;  // positions of cross-attention
constexpr float SCALE = LOG2_E / 8.0f;  // 8: the root of the 64 numbers of a head

// How a product of ROWS × K is shared out: tiles of eight rows over blocks, slices of K over a tile's warps.
template <int ROWS_, int K_>
struct Product {
    static constexpr int ROWS = ROWS_, K = K_;
    static constexpr int TILES = (ROWS + 7) / 8;
    static constexpr int PER_BLOCK = (TILES + BLOCKS - 1) / BLOCKS > WARPS ? 4 : (TILES + BLOCKS - 1) / BLOCKS;
    static constexpr int SLICES = WARPS / PER_BLOCK;
    static constexpr int PIECES = K / 32;
    static constexpr int OWN = (PIECES + SLICES - 1) / SLICES;  // pieces of a warp
    static_assert(K % 32 == 0, "whole pieces");
};

struct Layer {  // addresses; kernels/persistent_step.py fills them in, in this order
    const float *self_norm_weight, *self_norm_bias;
    const half_t *qkv_weight, *qkv_bias, *self_out_weight, *self_out_bias;
    half_t *self_keys, *self_values;  // [slots, n_ctx, WIDTH]
    const float *cross_norm_weight, *cross_norm_bias;
    const half_t *query_weight, *query_bias, *cross_keys, *cross_values;  // [slots, 1500, WIDTH]
    const half_t *cross_out_weight, *cross_out_bias;
    const float *mlp_norm_weight, *mlp_norm_bias;
    const half_t *up_weight, *up_bias, *down_weight, *down_bias;
};

struct Work {  // memory that blocks share
    float* residual;    // [SLOTS, WIDTH]
    half_t* qkv;        // [SLOTS, 3 · WIDTH]
    half_t* mixed;      // [SLOTS, WIDTH]
    half_t* inner;      // [SLOTS, 4 · WIDTH]
    float* parts;       // [SLOTS, HEADS, SPLITS, 66]: of cross-attention, its maximum, sum and weighted sum of values
    unsigned* arrived;  // 0 at the start
};

struct Shared {
    half_t input[SLOTS][4 * WIDTH + 8];
    float4 residual[SLOTS][WIDTH / 4];
    float sums[WARPS][8][SLOTS];
    float maxima[WARPS * 4], totals[WARPS * 4];
    float mixed[WARPS * 4][64 + 1];
};

DEVICE uint4 load_weights(const half_t* from) {
    uint4 to;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(from));
    return to;
}

// All blocks, and what they wrote before is seen after.
DEVICE void wait_for_all(unsigned* arrived, unsigned& expected) {
    expected += BLOCKS;
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
        unsigned seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        while (seen < expected);
    }
    __syncthreads();
}

template <typename P>
struct Share {
    int tile, slice;  // of this warp; a tile behind the last counts for nothing
    DEVICE explicit Share(int round = 0) {
        const int warp = threadIdx.x / 32;
        tile = blockIdx.x + (round * P::PER_BLOCK + warp / P::SLICES) * BLOCKS;
        slice = warp % P::SLICES;
    }
};

// This warp's weights of a product.
template <typename P>
DEVICE void load_product(uint4 (&weights)[P::OWN], const half_t* matrix, int round = 0, int rows = P::ROWS) {
    const Share<P> share(round);
    const int lane = threadIdx.x % 32;
    const int row = min(share.tile * 8 + lane / 4, rows - 1);
    const half_t* from = matrix + (long long)row * P::K + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < P::OWN; i++) {
        // one that lies behind the row is multiplied with zeros
        const int piece = share.slice * P::OWN + i;
        weights[i] = load_weights(from + (P::OWN * P::SLICES == P::PIECES ? piece : min(piece, P::PIECES - 1)) * 32);
    }
}

// The product of the loaded weights with shared.input; ``store(slot, row, sum)`` is called once for each of its results.
template <typename P, typename Store>
DEVICE void multiply(const uint4 (&weights)[P::OWN], Shared& shared, Store store, int round = 0, int rows = P::ROWS) {
    const Share<P> share(round);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, pair = lane % 4 * 2;
    float c[4] = {};
#pragma unroll
    for (int i = 0; i < P::OWN; i++) {
        const int piece = share.slice * P::OWN + i;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (group < SLOTS && piece < P::PIECES) x = *reinterpret_cast<const uint4*>(&shared.input[group][piece * 32 + lane % 4 * 8]);
        const unsigned first[4] = {x.x, 0, x.y, 0}, second[4] = {x.z, 0, x.w, 0};
        multiply_add(c, first, weights[i].x, weights[i].y);
        multiply_add(c, second, weights[i].z, weights[i].w);
    }
    if (group < SLOTS) {
        shared.sums[warp][pair][group] = c[0];
        shared.sums[warp][pair + 1][group] = c[1];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < P::PER_BLOCK * 8 * SLOTS; i += THREADS) {
        const int slot = i % SLOTS, row = i / SLOTS % 8, j = i / SLOTS / 8;
        const int at = (blockIdx.x + (round * P::PER_BLOCK + j) * BLOCKS) * 8 + row;
        if (at >= rows) continue;
        float sum = 0.0f;
#pragma unroll
        for (int slice = 0; slice < P::SLICES; slice++) sum += shared.sums[j * P::SLICES + slice][row][slot];
        store(slot, at, sum);
    }
}

// shared.input = LayerNorm(residual), a warp a slot
DEVICE void normalise(Shared& shared, const float* residual, const float* weight, const float* bias) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < SLOTS) {
        // a lane's numbers wait in shared memory: its registers are full of weights
        float4* own = shared.residual[warp] + lane;
        float sum = 0.0f;
#pragma unroll 5
        for (int i = 0; i < WIDTH / 4; i += 32) {
            const float4 x = __ldcg(reinterpret_cast<const float4*>(residual + warp * WIDTH) + i + lane);
            own[i] = x;
            sum += x.x + x.y + x.z + x.w;
        }
        const float mean = warp_sum(sum) / WIDTH;
        float squares = 0.0f;
#pragma unroll 2
        for (int i = 0; i < WIDTH / 4; i += 32) {
            float4 x = own[i];
            x = make_float4(x.x - mean, x.y - mean, x.z - mean, x.w - mean);
            squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        }
        const float norm = rsqrtf(warp_sum(squares) / WIDTH + 1e-5f);
#pragma unroll 2
        for (int i = 0; i < WIDTH / 4; i += 32) {
            const float4 x = own[i];
            const float4 w = __ldg(reinterpret_cast<const float4*>(weight) + i + lane);
            const float4 b = __ldg(reinterpret_cast<const float4*>(bias) + i + lane);
            *reinterpret_cast<uint2*>(&shared.input[warp][(i + lane) * 4]) =
                make_uint2(to_half2((x.x - mean) * norm * w.x + b.x, (x.y - mean) * norm * w.y + b.y),
                           to_half2((x.z - mean) * norm * w.z + b.z, (x.w - mean) * norm * w.w + b.w));
        }
    }
    __syncthreads();
}

// shared.input = what other blocks wrote, [SLOTS, width]
DEVICE void fetch(Shared& shared, const half_t* from, int width) {
#pragma unroll 1
    for (int i = threadIdx.x; i < SLOTS * width / 8; i += THREADS) {
        const int slot = i / (width / 8), at = i % (width / 8) * 8;
        *reinterpret_cast<uint4*>(&shared.input[slot][at]) = __ldcg(reinterpret_cast<const uint4*>(from + slot * width + at));
    }
    __syncthreads();
}

// Eight lanes hold a position's 64 numbers of a head; such a group keeps a softmax of its own over its positions.
struct Softmax {
    float maximum = -infinity(), sum = 0.0f, mixed[8] = {};

    DEVICE void attend(const float (&query)[8], const uint4& key, const uint4& value, bool counts) {
        const unsigned k[4] = {key.x, key.y, key.z, key.w}, v[4] = {value.x, value.y, value.z, value.w};
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 both = to_float2(k[i]);
            score += query[2 * i] * both.x + query[2 * i + 1] * both.y;
        }
#pragma unroll
        for (int offset = 4; offset; offset /= 2) score += __shfl_xor_sync(ALL_LANES, score, offset);
        if (!counts) return;
        const float before = maximum;
        maximum = fmaxf(before, score);
        const float rescale = exp2_approximate(before - maximum), weight = exp2_approximate(score - maximum);
        sum = sum * rescale + weight;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 both = to_float2(v[i]);
            mixed[2 * i] = mixed[2 * i] * rescale + weight * both.x;
            mixed[2 * i + 1] = mixed[2 * i + 1] * rescale + weight * both.y;
        }
    }

    // All groups together; thread i of the first 64 gets number i of the weighted sum, not yet divided by ``total``.
    DEVICE float merge(Shared& shared, float& most, float& total) {
        const int group = threadIdx.x / 8, part = threadIdx.x % 8;
        if (part == 0) {
            shared.maxima[group] = maximum;
            shared.totals[group] = sum;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) shared.mixed[group][part * 8 + i] = mixed[i];
        __syncthreads();
        float result = 0.0f;
        most = -infinity();
        total = 0.0f;
        if (threadIdx.x < 64) {
#pragma unroll 4
            for (int i = 0; i < WARPS * 4; i++) most = fmaxf(most, shared.maxima[i]);
#pragma unroll 4
            for (int i = 0; i < WARPS * 4; i++) {
                const float share = exp2_approximate(shared.maxima[i] - most);  // 0 of a group without positions
                total += share * shared.totals[i];
                result += share * shared.mixed[i][threadIdx.x];
            }
        }
        return result;
    }
};

DEVICE void load_query(float (&query)[8], const half_t* from) {
    const uint4 eight = __ldcg(reinterpret_cast<const uint4*>(from));
    const unsigned words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 both = to_float2(words[i]);
        query[2 * i] = both.x * SCALE;
        query[2 * i + 1] = both.y * SCALE;
    }
}

constexpr int GROUPS = THREADS / 8;
constexpr int UNITS = SLOTS * HEADS;
constexpr int SPLITS = UNITS >= BLOCKS ? 1 : BLOCKS / UNITS;  // of the encoded positions
constexpr int SPLIT = (ENCODED + SPLITS - 1) / SPLITS;
constexpr int KEPT = 4;  // positions a group has in registers before it knows the query

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
persistent_step(const Layer* layers, int n_layer, const half_t* tokens_table, const float* positions_table,
                const float* norm_weight, const float* norm_bias, const int* tokens, const int* positions, int state_stride,
                float* logits, int n_vocab, int n_ctx, const Work* work_memory) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Work work = *work_memory;
    const int group = threadIdx.x / 8, part = threadIdx.x % 8;
    unsigned expected = 0;

    using Qkv = Product<3 * WIDTH, WIDTH>;
    using Square = Product<WIDTH, WIDTH>;
    using Up = Product<4 * WIDTH, WIDTH>;
    using Down = Product<WIDTH, 4 * WIDTH>;
    using Vocabulary = Product<51866, WIDTH>;  // the largest of Whisper's

    int position[SLOTS];
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) position[slot] = min(positions[slot * state_stride], n_ctx - 1);

    // the input, a thread of some block a number
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < SLOTS * WIDTH; i += BLOCKS * THREADS) {
        const int slot = i / WIDTH, column = i % WIDTH;
        const long long token = tokens[slot * state_stride];
        const int at = min(positions[slot * state_stride], n_ctx - 1);
        work.residual[i] = to_float(tokens_table[token * WIDTH + column]) + positions_table[at * WIDTH + column];
    }
    auto add_to_residual = [&](const half_t* bias) {
        return [&work, bias](int slot, int row, float sum) {
            float* at = work.residual + slot * WIDTH + row;
            __stcg(at, __ldcg(at) + sum + to_float(bias[row]));
        };
    };

    for (int l = 0; l < n_layer; l++) {
        const Layer& layer = layers[l];
        {
            uint4 weights[Qkv::OWN];
            load_product<Qkv>(weights, layer.qkv_weight);
            wait_for_all(work.arrived, expected);
            normalise(shared, work.residual, layer.self_norm_weight, layer.self_norm_bias);
            multiply<Qkv>(weights, shared, [&](int slot, int row, float sum) {
                work.qkv[slot * 3 * WIDTH + row] = to_half(sum + to_float(layer.qkv_bias[row]));
            });
        }
        uint4 square[Square::OWN];
        load_product<Square>(square, layer.self_out_weight);
        wait_for_all(work.arrived, expected);

        for (int unit = blockIdx.x; unit < UNITS; unit += BLOCKS) {
            const int slot = unit / HEADS, head = unit % HEADS, last = position[slot];
            const int column = head * 64 + part * 8;
            half_t* keys = layer.self_keys + (long long)slot * n_ctx * WIDTH + column;
            half_t* values = layer.self_values + (long long)slot * n_ctx * WIDTH + column;
            const half_t* own = work.qkv + slot * 3 * WIDTH + column;
            float query[8];
            load_query(query, own);
            const uint4 new_key = __ldcg(reinterpret_cast<const uint4*>(own + WIDTH));
            const uint4 new_value = __ldcg(reinterpret_cast<const uint4*>(own + 2 * WIDTH));
            Softmax softmax;
            for (int first = 0; first <= last; first += GROUPS) {
                const int at = first + group;
                uint4 key = new_key, value = new_value;
                if (at < last) {
                    key = *reinterpret_cast<const uint4*>(keys + at * WIDTH);
                    value = *reinterpret_cast<const uint4*>(values + at * WIDTH);
                }
                softmax.attend(query, key, value, at <= last);
            }
            if (group == 0) {
                *reinterpret_cast<uint4*>(keys + last * WIDTH) = new_key;
                *reinterpret_cast<uint4*>(values + last * WIDTH) = new_value;
            }
            float most, total;
            const float mixed = softmax.merge(shared, most, total);
            if (threadIdx.x < 64) work.mixed[slot * WIDTH + head * 64 + threadIdx.x] = to_half(mixed / total);
            __syncthreads();
        }
        wait_for_all(work.arrived, expected);

        fetch(shared, work.mixed, WIDTH);
        multiply<Square>(square, shared, add_to_residual(layer.self_out_bias));
        load_product<Square>(square, layer.query_weight);
        wait_for_all(work.arrived, expected);

        normalise(shared, work.residual, layer.cross_norm_weight, layer.cross_norm_bias);
        multiply<Square>(square, shared, [&](int slot, int row, float sum) {
            work.qkv[slot * 3 * WIDTH + row] = to_half(sum + to_float(layer.query_bias[row]));
        });
        {
            const int unit = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
            const bool active = unit < UNITS;
            const int slot = min(unit, UNITS - 1) / HEADS, head = min(unit, UNITS - 1) % HEADS;
            const int begin = split * SPLIT, end = min(begin + SPLIT, ENCODED);
            const int column = head * 64 + part * 8;
            const half_t* keys = layer.cross_keys + (long long)slot * ENCODED * WIDTH + column;
            const half_t* values = layer.cross_values + (long long)slot * ENCODED * WIDTH + column;
            uint4 key[KEPT], value[KEPT];
#pragma unroll
            for (int i = 0; i < KEPT; i++) {
                const int at = min(begin + i * GROUPS + group, ENCODED - 1);
                key[i] = load_weights(keys + at * WIDTH);
                value[i] = load_weights(values + at * WIDTH);
            }
            wait_for_all(work.arrived, expected);
            if (active) {
                float query[8];
                load_query(query, work.qkv + slot * 3 * WIDTH + column);
                Softmax softmax;
#pragma unroll
                for (int i = 0; i < KEPT; i++) softmax.attend(query, key[i], value[i], begin + i * GROUPS + group < end);
                for (int first = begin + KEPT * GROUPS; first < end; first += GROUPS) {
                    const int at = min(first + group, ENCODED - 1);
                    softmax.attend(query, load_weights(keys + at * WIDTH), load_weights(values + at * WIDTH), first + group < end);
                }
                float most, total;
                const float mixed = softmax.merge(shared, most, total);
                float* to = work.parts + (unit * SPLITS + split) * 66;
                if (threadIdx.x < 64) __stcg(to + 2 + threadIdx.x, mixed);
                if (threadIdx.x == 0) {
                    __stcg(to, most);
                    __stcg(to + 1, total);
                }
            }
        }
        load_product<Square>(square, layer.cross_out_weight);
        wait_for_all(work.arrived, expected);

        // put the splits together, in each block
        for (int i = threadIdx.x; i < SLOTS * WIDTH; i += THREADS) {
            const int unit = i / 64, number = i % 64;
            const float* from = work.parts + unit * SPLITS * 66;
            float most = -infinity(), total = 0.0f, mixed = 0.0f;
#pragma unroll
            for (int split = 0; split < SPLITS; split++) most = fmaxf(most, __ldcg(from + split * 66));
#pragma unroll
            for (int split = 0; split < SPLITS; split++) {
                const float share = exp2_approximate(__ldcg(from + split * 66) - most);
                total += share * __ldcg(from + split * 66 + 1);
                mixed += share * __ldcg(from + split * 66 + 2 + number);
            }
            shared.input[i / WIDTH][i % WIDTH] = to_half(mixed / total);
        }
        __syncthreads();
        multiply<Square>(square, shared, add_to_residual(layer.cross_out_bias));
        {
            uint4 weights[Up::OWN];
            load_product<Up>(weights, layer.up_weight);
            wait_for_all(work.arrived, expected);
            normalise(shared, work.residual, layer.mlp_norm_weight, layer.mlp_norm_bias);
            multiply<Up>(weights, shared, [&](int slot, int row, float sum) {
                work.inner[slot * 4 * WIDTH + row] = to_half(gelu(sum + to_float(layer.up_bias[row])));
            });
        }
        {
            uint4 weights[Down::OWN];
            load_product<Down>(weights, layer.down_weight);
            wait_for_all(work.arrived, expected);
            fetch(shared, work.inner, 4 * WIDTH);
            multiply<Down>(weights, shared, add_to_residual(layer.down_bias));
        }
    }

    uint4 weights[Vocabulary::OWN];
    load_product<Vocabulary>(weights, tokens_table, 0, n_vocab);
    wait_for_all(work.arrived, expected);
    normalise(shared, work.residual, norm_weight, norm_bias);
    constexpr int ROUNDS = (Vocabulary::TILES + Vocabulary::PER_BLOCK * BLOCKS - 1) / (Vocabulary::PER_BLOCK * BLOCKS);
    for (int round = 0; round < ROUNDS; round++) {
        uint4 next[Vocabulary::OWN];
        if (round + 1 < ROUNDS) load_product<Vocabulary>(next, tokens_table, round + 1, n_vocab);
        multiply<Vocabulary>(weights, shared, [&](int slot, int row, float sum) {
            logits[(long long)slot * n_vocab + row] = sum;
        }, round, n_vocab);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Vocabulary::OWN; i++) weights[i] = next[i];
    }
}
