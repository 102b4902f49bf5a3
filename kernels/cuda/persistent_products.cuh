#pragma once
// The persistent step's products: a warp multiplies its columns of the block's rows, of which weights come from the ring
// and the input from other blocks, and the first threads put the warps' sums together.
//
// NOTES: products are matrix instructions with the weights as their 16 rows and the slots as their columns, most of
// which are of no use: conversion and summation in float32 come free. A lane's four columns of a row lie side by side,
// which orders the columns inside of a piece of 16 otherwise than the instruction does; that is the same for weights
// and input, and so does not matter.
#include "persistent_ring.cuh"

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
        const Word* places[TURNS];
        uint4 seen[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int i = min(turn * 32 + lane, ALL - 1), slot = i / EACH;  // the last lanes all do the last
            places[turn] = own + slot * (P::K / 4) + (i - slot * EACH) * 2;
            seen[turn] = look(places[turn]);
        }
        get(seen, places, bit);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int i = min(turn * 32 + lane, ALL - 1), slot = i / EACH;
            *reinterpret_cast<uint4*>(&shared.input[warp][slot][(i - slot * EACH) * 8]) = seen[turn];
        }
    }
    __syncwarp();
}
