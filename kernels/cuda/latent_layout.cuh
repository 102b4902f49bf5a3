#pragma once
// Hopper's latent attention: how a block shares its work out over warps, and what lies where in shared memory.
#include "hopper.cuh"
#include "latent_parts.cuh"

constexpr int SCORE_WARPS = 4, SUM_WARPS = 8;
constexpr int THREADS = (SCORE_WARPS + SUM_WARPS) * 32;
constexpr int SCORE_REGISTERS = 184, SUM_REGISTERS = 160;

// Heads are the N of the matrix instructions, eight at a time. Where four are left, one more eight takes them twice,
// for two steps of the scores or two tiles of the sums, so that no registers hold queries or sums of empty heads.
constexpr int EIGHTS = (HEADS + 3) / 8;
constexpr bool TWICE = HEADS % 8 == 4;
constexpr int PADDED_HEADS = (HEADS + 7) / 8 * 8;
constexpr int KEY_TILES = KEYS / 16;
constexpr int GROUPS = WIDTH / 64;  // of columns that share a scale
constexpr int ROW_BYTES = WIDTH * BITS / 8;

// A tile lies in chunks, 128 bytes of each of its rows, whose 16-byte pieces the copy engine swaps: piece p of row r is
// at p ^ r % 8. So it is read without bank conflicts in both directions.
constexpr int CHUNK = KEYS * 128;
constexpr int EIGHT_ROWS = 8 * 128;
constexpr int TILE_BYTES = KEYS * ROW_BYTES;
constexpr int SCALES_BYTES = GROUPS * KEYS * 2;
constexpr int SCALES_PLACE = BITS == 8 ? (SCALES_BYTES + 127) / 128 * 128 : 0;
constexpr int SCORE_PITCH = KEYS + 4;
constexpr int WEIGHT_PITCH = KEYS + 8;
constexpr int SCORES = SCORE_WARPS * PADDED_HEADS * SCORE_PITCH;  // of one tile

// shared memory, in bytes from a multiple of 1024
constexpr int SCALES_AT = STAGES * TILE_BYTES;
constexpr int SCORES_AT = SCALES_AT + STAGES * SCALES_PLACE;
constexpr int WEIGHTS_AT = SCORES_AT + 2 * SCORES * 4;
constexpr int RESCALES_AT = WEIGHTS_AT + STAGES * PADDED_HEADS * WEIGHT_PITCH * 2;
constexpr int NORMS_AT = RESCALES_AT + STAGES * PADDED_HEADS * 4;
constexpr int GROWN_AT = NORMS_AT + STAGES * PADDED_HEADS * 4;
constexpr int BARRIERS_AT = GROWN_AT + STAGES * SCORE_WARPS * 4;

// barriers of a stage, from its first
constexpr unsigned FULL = 0, WEIGHED = STAGES * 8, EMPTY = 2 * STAGES * 8;

// Scores are taken relative to a reference, which follows the largest only when that has grown by more than this many
// powers of two: the sums are then hardly ever rescaled, and weights stay far from FP16's largest number.
constexpr float GROWTH = 8.0f;

static_assert(WIDTH % 128 == 0, "whole chunks");
static_assert(KEYS == 16 || KEYS == 32 || KEYS == 64, "warps take softmaxes over 16 or 32 positions at a time");

// The stage a tile is in, and the parity of its barriers' phase.
struct Place {
    int stage = 0, parity = 0;
    DEVICE void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A block's work, and where things are.
struct Run {
    int begin, end;
    int tiles;  // of all blocks
    char* shared;
    unsigned barriers;

    DEVICE const char* tile(int stage) const { return shared + stage * TILE_BYTES; }
    DEVICE const half_t* scales(int stage) const {
        return reinterpret_cast<const half_t*>(shared + SCALES_AT + stage * SCALES_PLACE);
    }
    DEVICE float* scores(int buffer) const {
        return reinterpret_cast<float*>(shared + SCORES_AT) + buffer * SCORES;
    }
    DEVICE half_t* weights(int stage) const {
        return reinterpret_cast<half_t*>(shared + WEIGHTS_AT) + stage * PADDED_HEADS * WEIGHT_PITCH;
    }
    DEVICE float* rescales(int stage) const {
        return reinterpret_cast<float*>(shared + RESCALES_AT) + stage * PADDED_HEADS;
    }
    DEVICE float* norms(int stage) const { return reinterpret_cast<float*>(shared + NORMS_AT) + stage * PADDED_HEADS; }
    DEVICE int* grown(int stage) const { return reinterpret_cast<int*>(shared + GROWN_AT) + stage * SCORE_WARPS; }
    DEVICE unsigned barrier(unsigned kind, int stage) const { return barriers + kind + stage * 8; }
};

DEVICE unsigned word(const uint4& four, int i) { return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w; }

// Bytes as FP16 numbers. 0x6400 + u is 1024 + u. The product with a scale of at most 7 significant bits, less 1152
// times the scale, which then is an FP16 number, is (u - 128) times the scale, rounded once.
DEVICE half2_t bytes_to_halves(unsigned values, unsigned selector, half2_t scale, half2_t bias) {
    return multiply_add2(__byte_perm(values, 0x64646464u, selector), scale, bias);
}
DEVICE half2_t bias_of(half2_t scale) { return multiply2(scale, 0xe480e480u); }  // times -1152

DEVICE void scores_meet() { asm volatile("bar.sync 1, %0;" ::"n"(SCORE_WARPS * 32) : "memory"); }
