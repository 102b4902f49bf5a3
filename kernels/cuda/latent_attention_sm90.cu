// Latent cross-attention on Hopper: attention of one query a head over the encoder state itself, which is keys and
// values at once.
//
//     scores[h, k] = query[h] · x[k]        weights = softmax over k        out[h] = Σ_k weights[h, k] x[k]
//
// with x [1500, WIDTH], read once from memory for all heads. Compiled with
//   WIDTH, HEADS  the model's            KEYS    positions of x in one tile      STAGES  tiles in shared memory
//   BITS          16: x is FP16. 8: x is bytes (128 stands for 0) with one FP16 scale for each 64 columns
//
// A block works off a run of tiles, which may cross windows; what it has of a window that it does not hold whole goes
// into ``partial``. Where few blocks share a window, the last one to finish puts their parts together; else
// latent_attention_combine does.
//
// NOTES: each step of a tile is a chain of waits, so the steps of different tiles run side by side in different warps.
// Four warps turn tiles into weights: each multiplies a quarter of the columns with its part of the queries, which
// stays in registers; the partial scores meet in shared memory. Eight warps sum tiles by these weights, each an eighth
// of the columns, in registers. The copy engine brings tiles into a ring ahead of both. Both kinds of warps make FP16
// of bytes in registers, as they need it: the two products want different neighbours in a register anyway.
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

// ---- the four warps that turn tiles into weights ----

constexpr int SLICES = ROW_BYTES / 64;  // of a row; a warp's are warp, warp + 4, …
constexpr int OWN_SLICES = (SLICES + SCORE_WARPS - 1) / SCORE_WARPS;
constexpr int PIECE = 128 / BITS;  // columns in 16 bytes, of which a lane takes one a slice and row
constexpr int STEPS = PIECE / 4;   // of 16 columns, in a slice

constexpr int HEAD_LANES = KEYS < 32 ? KEYS : 32;  // that take the softmax of one head together
constexpr int LANE_KEYS = KEYS / HEAD_LANES;       // positions of a lane
constexpr int HEADS_AT_ONCE = SCORE_WARPS * 32 / HEAD_LANES;
constexpr int OWN_HEADS = (HEADS + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;  // of a lane

DEVICE bool has_slice(int warp, int i) { return SLICES % SCORE_WARPS == 0 || warp + SCORE_WARPS * i < SLICES; }

DEVICE void weigh(const Run& run, const half_t* queries, float2* partial_sums, int window_stride, int head_stride,
                  float scale_log2) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    // NOTES: eight lanes read from shared memory at once: those of two rows, which have to differ by 4
    const int row = group / 2 + group % 2 * 4;
    const int offset = warp / 2 * CHUNK + row * 128 + ((warp % 2 * 4 + member) ^ row) * 16;
    const int first_head = warp + SCORE_WARPS * (lane / HEAD_LANES);
    const int key = lane % HEAD_LANES;

    // With the columns of a lane's piece: a step's first two are 2 · member of the matrix instruction, the next two
    // 2 · member + 8, of queries and state alike. ``last`` has the last four heads for an even step and the odd one
    // after it.
    unsigned query[OWN_SLICES][STEPS][EIGHTS][2], last[OWN_SLICES][STEPS / 2][2];
    float reference[OWN_HEADS], sum[OWN_HEADS];  // the sum is this lane's share

    Place place;
    for (int index = run.begin; index < run.end; index++, place.next()) {
        const Tile tile(index);
        if (index == run.begin || tile.first == 0) {
            const half_t* from = queries + (long long)tile.window * window_stride + (warp * 4 + member) * PIECE;
#pragma unroll
            for (int i = 0; i < OWN_SLICES; i++)
#pragma unroll
                for (int s = 0; s < STEPS; s += 2) {
                    const half_t* at = from + i * 4 * SCORE_WARPS * PIECE + s * 4;
#pragma unroll
                    for (int j = 0; j < EIGHTS; j++) {
                        const int head = j * 8 + group;
                        uint4 four = make_uint4(0, 0, 0, 0);
                        if (head < HEADS && has_slice(warp, i))
                            four = *reinterpret_cast<const uint4*>(at + head * head_stride);
                        query[i][s][j][0] = four.x;
                        query[i][s][j][1] = four.y;
                        query[i][s + 1][j][0] = four.z;
                        query[i][s + 1][j][1] = four.w;
                    }
                    if constexpr (TWICE) {
                        const int head = EIGHTS * 8 + group % 4;
                        uint2 two = make_uint2(0, 0);
                        if (has_slice(warp, i))
                            two = *reinterpret_cast<const uint2*>(at + head * head_stride + group / 4 * 4);
                        last[i][s / 2][0] = two.x;
                        last[i][s / 2][1] = two.y;
                    }
                }
#pragma unroll
            for (int j = 0; j < OWN_HEADS; j++) {
                reference[j] = -infinity();
                sum[j] = 0.0f;
            }
        }

        barrier_wait(run.barrier(FULL, place.stage), place.parity);
        const char* const rows = run.tile(place.stage) + offset;
        float* const scores = run.scores((index - run.begin) % 2);
        float* const own_scores = scores + (warp * PADDED_HEADS + member * 2) * SCORE_PITCH + row;
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
            float partial[2][EIGHTS + TWICE][4] = {};  // of even and odd steps
#pragma unroll
            for (int i = 0; i < OWN_SLICES; i++) {
                if (!has_slice(warp, i)) break;
                uint4 pieces[2];
                half2_t scale[2], bias[2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    pieces[r] = *reinterpret_cast<const uint4*>(rows + i * 2 * CHUNK + (m * 2 + r) * EIGHT_ROWS);
                    if constexpr (BITS == 8) {
                        const half_t* scales = run.scales(place.stage) + (warp + SCORE_WARPS * i) * KEYS + row;
                        scale[r] = scales[(m * 2 + r) * 8] * 0x10001u;
                        bias[r] = bias_of(scale[r]);
                    }
                }
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    unsigned a[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const int r = k % 2;
                        if constexpr (BITS == 8)
                            a[k] = bytes_to_halves(word(pieces[r], s), k < 2 ? 0x4140 : 0x4342, scale[r], bias[r]);
                        else
                            a[k] = word(pieces[r], s * 2 + k / 2);
                    }
#pragma unroll
                    for (int j = 0; j < EIGHTS; j++)
                        multiply_add(partial[s % 2][j], a, query[i][s][j][0], query[i][s][j][1]);
                    if constexpr (TWICE)
                        multiply_add(partial[s % 2][EIGHTS], a, last[i][s / 2][0], last[i][s / 2][1]);
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float* const to = own_scores + k % 2 * SCORE_PITCH + m * 16 + k / 2 * 8;
#pragma unroll
                for (int j = 0; j < EIGHTS; j++) to[j * 8 * SCORE_PITCH] = partial[0][j][k] + partial[1][j][k];
                // the last four heads once from even, once from odd steps
                if constexpr (TWICE)
                    to[EIGHTS * 8 * SCORE_PITCH] = member < 2 ? partial[0][EIGHTS][k] : partial[1][EIGHTS][k];
            }
        }
        scores_meet();  // NOTES: once a tile, as what they read next is written again only behind the next meeting

        // a lane's heads side by side, as each is a chain of waits; heads that the model does not have repeat the last
        float score[OWN_HEADS][LANE_KEYS];
        bool grown = false;
#pragma unroll
        for (int j = 0; j < OWN_HEADS; j++) {
            const int head = min(first_head + HEADS_AT_ONCE * j, HEADS - 1);
#pragma unroll
            for (int k = 0; k < LANE_KEYS; k++) {
                float x = 0.0f;
#pragma unroll
                for (int w = 0; w < SCORE_WARPS; w++) {
                    const float* from = scores + (w * PADDED_HEADS + head) * SCORE_PITCH + key + k * 32;
                    x += HEADS_AT_ONCE * j < EIGHTS * 8 ? from[0] : from[0] + from[4 * SCORE_PITCH];
                }
                score[j][k] = tile.first + key + k * 32 < POSITIONS ? x * scale_log2 : -infinity();
                grown |= score[j][k] > reference[j] + GROWTH;
            }
        }
        grown = __any_sync(ALL_LANES, grown);
        if (grown) {
            float most[OWN_HEADS];
#pragma unroll
            for (int j = 0; j < OWN_HEADS; j++) {
                most[j] = score[j][0];
#pragma unroll
                for (int k = 1; k < LANE_KEYS; k++) most[j] = fmaxf(most[j], score[j][k]);
            }
#pragma unroll
            for (int i = HEAD_LANES / 2; i; i /= 2)
#pragma unroll
                for (int j = 0; j < OWN_HEADS; j++) most[j] = fmaxf(most[j], __shfl_xor_sync(ALL_LANES, most[j], i));
#pragma unroll
            for (int j = 0; j < OWN_HEADS; j++) {
                const int head = first_head + HEADS_AT_ONCE * j;
                const float next = most[j] > reference[j] + GROWTH ? most[j] : reference[j];
                const float rescale = exp2_approximate(reference[j] - next);
                reference[j] = next;
                sum[j] *= rescale;
                if (key == 0 && head < HEADS) run.rescales(place.stage)[head] = rescale;
            }
        }
        if (lane == 0) run.grown(place.stage)[warp] = grown;
#pragma unroll
        for (int j = 0; j < OWN_HEADS; j++) {
            const int head = first_head + HEADS_AT_ONCE * j;
#pragma unroll
            for (int k = 0; k < LANE_KEYS; k++) {
                const half_t weight = to_half(exp2_approximate(score[j][k] - reference[j]));
                sum[j] += to_float(weight);
                if (head < HEADS) run.weights(place.stage)[head * WEIGHT_PITCH + key + k * 32] = weight;
            }
        }
        if (index == run.end - 1 || tile.ends_window()) {
            const Part part(tile.window, run.begin, run.end);
#pragma unroll
            for (int j = 0; j < OWN_HEADS; j++) {
                const int head = first_head + HEADS_AT_ONCE * j;
                const float total = warp_sum<HEAD_LANES>(sum[j]);
                if (key == 0 && head < HEADS) {
                    run.norms(place.stage)[head] = 1.0f / total;
                    if (!part.whole) partial_sums[part.index * HEADS + head] = make_float2(reference[j], total);
                }
            }
        }
        barrier_arrive(run.barrier(WEIGHED, place.stage));
    }
}

// ---- the eight warps that sum tiles by their weights ----

constexpr int BLOCK = 32;  // columns, in two tiles of the matrix instructions; a warp's blocks are warp, warp + 8, …
constexpr int BLOCKS = WIDTH / BLOCK;
constexpr int OWN_BLOCKS = (BLOCKS + SUM_WARPS - 1) / SUM_WARPS;
constexpr int CHUNK_BLOCKS = BITS == 8 ? 4 : 2;  // in a chunk

DEVICE bool has_block(int warp, int i) { return BLOCKS % SUM_WARPS == 0 || warp + SUM_WARPS * i < BLOCKS; }

// A lane's sums, columns × heads as matrix instructions have them, of its blocks.
struct Sums {
    // of heads 8 · j + 2 · member and the next, of two tiles
    float sums[OWN_BLOCKS][2][EIGHTS][4];
    // of the last four: members 0 and 1 have the first tile's, 2 and 3 the second's
    float last[OWN_BLOCKS][4];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < OWN_BLOCKS; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int j = 0; j < EIGHTS; j++) sums[i][0][j][k] = sums[i][1][j][k] = 0.0f;
                last[i][k] = 0.0f;
            }
    }

    // Multiplies by a factor for each head, ``of(head)``.
    template <typename Factor>
    DEVICE void scale(int member, Factor of) {
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            const float2 factor = of(j * 8 + member * 2);
#pragma unroll
            for (int i = 0; i < OWN_BLOCKS; i++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    sums[i][0][j][k] *= k % 2 ? factor.y : factor.x;
                    sums[i][1][j][k] *= k % 2 ? factor.y : factor.x;
                }
        }
        if constexpr (TWICE) {
            const float2 factor = of(EIGHTS * 8 + member % 2 * 2);
#pragma unroll
            for (int i = 0; i < OWN_BLOCKS; i++)
#pragma unroll
                for (int k = 0; k < 4; k++) last[i][k] *= k % 2 ? factor.y : factor.x;
        }
    }
};

// Sums of one tile, columns group and group + 8 of two heads, so exchanged that a lane has four columns in a row of one
// head: the second where its group is odd; columns from 8 on where group / 2 is odd.
DEVICE uint2 four_columns(const float (&sums)[4], int group) {
    const bool odd = group % 2, high = group / 2 % 2;
    const half2_t first = to_half2(sums[0], sums[2]), second = to_half2(sums[1], sums[3]);
    half2_t keep = odd ? second : first;
    half2_t got = __shfl_xor_sync(ALL_LANES, odd ? first : second, 4);
    const half2_t even_column = odd ? got : keep, odd_column = odd ? keep : got;
    const half2_t low_pair = __byte_perm(even_column, odd_column, 0x5410);
    const half2_t high_pair = __byte_perm(even_column, odd_column, 0x7632);
    keep = high ? high_pair : low_pair;
    got = __shfl_xor_sync(ALL_LANES, high ? low_pair : high_pair, 8);
    return high ? make_uint2(got, keep) : make_uint2(keep, got);
}

// Writes what a lane has of block i to ``to``, where the block's first column of the first head goes.
DEVICE void store(half_t* to, int stride, const Sums& all, int i, int lane) {
    const int group = lane / 4, member = lane % 4;
    if constexpr (BITS == 8) {
        to += group * 2;
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int j = 0; j < EIGHTS; j++)
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    const auto& sums = all.sums[i][b][j];
                    const int head = j * 8 + member * 2 + k;
                    if (head < HEADS)
                        *reinterpret_cast<half2_t*>(to + head * stride + b * 16) = to_half2(sums[k], sums[k + 2]);
                }
            if constexpr (TWICE)
                *reinterpret_cast<half2_t*>(to + (EIGHTS * 8 + member % 2 * 2 + k) * stride + member / 2 * 16) =
                    to_half2(all.last[i][k], all.last[i][k + 2]);
        }
    } else {
        to += group / 2 % 2 * 8 + group / 4 * 4;
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const uint2 four = four_columns(all.sums[i][b][j], group);
                const int head = j * 8 + member * 2 + group % 2;
                if (head < HEADS) *reinterpret_cast<uint2*>(to + head * stride + b * 16) = four;
            }
        if constexpr (TWICE)
            *reinterpret_cast<uint2*>(to + (EIGHTS * 8 + member % 2 * 2 + group % 2) * stride + member / 2 * 16) =
                four_columns(all.last[i], group);
    }
}

// Puts together a warp's columns of a window, if it is the last of the warps that have them, one a block. The sum is in
// the order of the parts, whoever takes it. ``arrivals``: of each block as the last of a window, and each warp; zeros
// before and after.
DEVICE void join(const Run& run, int window, half_t* out, const half_t* partial_out, const float2* partial_sums,
                 unsigned* arrivals, int head_stride, int warp, int lane) {
    const Sharing sharing(window, run.tiles, gridDim.x);
    const unsigned others = sharing.last - sharing.first;
    __syncwarp();
    bool last = false;
    if (lane == 0) {
        __threadfence();
        last = atomicInc(arrivals + sharing.last * SUM_WARPS + warp, others) == others;
        __threadfence();
    }
    if (!__any_sync(ALL_LANES, last)) return;

    // a lane's head for the parts' shares
    const float2* const own_sums = partial_sums + min(lane, HEADS - 1);
    float maximum = -infinity(), total = 0.0f;
    for (int block = sharing.first; block <= sharing.last; block++) {
        const float2 sums = own_sums[sharing.part(block) * HEADS];
        const float next = fmaxf(maximum, sums.x);
        total = total * exp2_approximate(maximum - next) + sums.y * exp2_approximate(sums.x - next);
        maximum = next;
    }
    const float norm = 1.0f / total;

    // eight columns in a row of each block of columns, of every eighth head
#pragma unroll 1
    for (int first_head = 0; first_head < HEADS; first_head += 8) {
        const int head = min(first_head + lane / 4, HEADS - 1);
        const int at = head * WIDTH + warp * BLOCK + lane % 4 * 8;
        float2 sums[OWN_BLOCKS][4] = {};
#pragma unroll 2
        for (int block = sharing.first; block <= sharing.last; block++) {
            const int part = sharing.part(block);
            const half_t* const from = partial_out + (long long)part * HEADS * WIDTH + at;
            uint4 eights[OWN_BLOCKS];
#pragma unroll
            for (int i = 0; i < OWN_BLOCKS; i++)
                if (has_block(warp, i)) eights[i] = *reinterpret_cast<const uint4*>(from + i * SUM_WARPS * BLOCK);
            const float2 all = own_sums[part * HEADS];
            const float share = __shfl_sync(ALL_LANES, all.y * exp2_approximate(all.x - maximum) * norm, head);
#pragma unroll
            for (int i = 0; i < OWN_BLOCKS; i++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    if (!has_block(warp, i)) break;
                    const float2 two = to_float2(word(eights[i], k));
                    sums[i][k].x += share * two.x;
                    sums[i][k].y += share * two.y;
                }
        }
        half_t* const to = out + head * head_stride + warp * BLOCK + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < OWN_BLOCKS; i++) {
            if (!has_block(warp, i)) break;
            unsigned eight[4];
#pragma unroll
            for (int k = 0; k < 4; k++) eight[k] = to_half2(sums[i][k].x, sums[i][k].y);
            *reinterpret_cast<uint4*>(to + i * SUM_WARPS * BLOCK) = make_uint4(eight[0], eight[1], eight[2], eight[3]);
        }
    }
}

template <typename Load>
DEVICE void sum(const Run& run, half_t* out, half_t* partial_out, const float2* partial_sums, unsigned* arrivals,
                int window_stride, int head_stride, Load load) {
    const int warp = threadIdx.x / 32 - SCORE_WARPS, lane = threadIdx.x % 32;
    const int group = lane / 4, member = lane % 4;
    const int chunk = warp / CHUNK_BLOCKS * CHUNK;
    // of the row that the lane names for transposed matrices, in the first block of a tile
    const int row = (BITS == 8 ? lane / 8 % 2 : lane / 16) * 8 + lane % 8;
    const int piece = BITS == 8 ? warp % 4 * 2 + lane / 16 : warp % 2 * 4 + lane / 8 % 2;
    const int offset = chunk + row * 128 + (piece ^ row % 8) * 16;
    // the last four heads' weights a second time, as heads 4 to 7: the rows behind them are zeros
    const int again = group < 4 ? EIGHTS * 8 + 4 : EIGHTS * 8 + group - 4;

    Sums all;
    all.clear();
    Place place;
    for (int index = run.begin; index < run.end; index++, place.next()) {
        const Tile tile(index);
        barrier_wait(run.barrier(FULL, place.stage), place.parity);
        barrier_wait(run.barrier(WEIGHED, place.stage), place.parity);
        const int4 grown = *reinterpret_cast<const int4*>(run.grown(place.stage));
        if (grown.x | grown.y | grown.z | grown.w) {
            // a head's warp is head % 4; only of those that have grown there are factors
            const bool first = member % 2 ? grown.z : grown.x, second = member % 2 ? grown.w : grown.y;
            all.scale(member, [&](int head) {
                const float2 rescale = *reinterpret_cast<const float2*>(run.rescales(place.stage) + head);
                return make_float2(first ? rescale.x : 1.0f, second ? rescale.y : 1.0f);
            });
        }

        const char* const stage = run.tile(place.stage);
        const half_t* const weights = run.weights(place.stage) + member * 2;
#pragma unroll
        for (int m = 0; m < KEY_TILES; m++) {
            auto weights_at = [&](int head, int k) {
                return *reinterpret_cast<const unsigned*>(weights + head * WEIGHT_PITCH + m * 16 + k * 8);
            };
            unsigned weight[EIGHTS][2], last[2][2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
#pragma unroll
                for (int j = 0; j < EIGHTS; j++) weight[j][k] = weights_at(j * 8 + group, k);
                if constexpr (TWICE) {
                    last[0][k] = weights_at(EIGHTS * 8 + group, k);
                    last[1][k] = weights_at(again, k);
                }
            }
#pragma unroll
            for (int i = 0; i < OWN_BLOCKS; i++) {
                if (!has_block(warp, i)) break;
                const char* const at = stage + offset + i * (SUM_WARPS / CHUNK_BLOCKS) * CHUNK + m * 2 * EIGHT_ROWS;
                unsigned a[2][4];
                if constexpr (BITS == 8) {
                    // The matrices' elements are pairs of bytes: a lane gets two columns of rows 2 · member and the next
                    // one, and of both 8 below, from each of the block's halves.
                    unsigned pairs[4];
                    load_matrices_transposed(pairs, shared_address(at));
                    const half_t* scales = run.scales(place.stage) + (warp / 2 + SUM_WARPS / 2 * i) * KEYS + m * 16;
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        const half2_t scale = *reinterpret_cast<const unsigned*>(scales + member * 2 + k * 8);
                        const half2_t bias = bias_of(scale);
#pragma unroll
                        for (int b = 0; b < 2; b++) {
                            a[b][k * 2] = bytes_to_halves(pairs[b * 2 + k], 0x4240, scale, bias);
                            a[b][k * 2 + 1] = bytes_to_halves(pairs[b * 2 + k], 0x4341, scale, bias);
                        }
                    }
                } else {
                    load_matrices_transposed(a[0], shared_address(at));
                    load_matrices_transposed(a[1], shared_address(stage + (offset ^ 32) + (at - (stage + offset))));
                }
#pragma unroll
                for (int b = 0; b < 2; b++) {
#pragma unroll
                    for (int j = 0; j < EIGHTS; j++)
                        multiply_add(all.sums[i][b][j], a[b], weight[j][0], weight[j][1]);
                    if constexpr (TWICE) multiply_add(all.last[i], a[b], last[b][0], last[b][1]);
                }
            }
        }

        const bool ends = index == run.end - 1 || tile.ends_window();
        if (ends)
            all.scale(member, [&](int head) {
                return *reinterpret_cast<const float2*>(run.norms(place.stage) + head);
            });
        barrier_arrive(run.barrier(EMPTY, place.stage));
        if (warp == 0 && lane == 0 && index + STAGES < run.end) {
            barrier_wait(run.barrier(EMPTY, place.stage), place.parity);
            load(index + STAGES, place.stage);
        }
        __syncwarp();
        if (ends) {
            const Part part(tile.window, run.begin, run.end);
            half_t* const whole = out + (long long)tile.window * window_stride;
            half_t* const to = part.whole ? whole : partial_out + (long long)part.index * HEADS * WIDTH;
            const int stride = part.whole ? head_stride : WIDTH;
#pragma unroll
            for (int i = 0; i < OWN_BLOCKS; i++)
                if (has_block(warp, i)) store(to + (warp + SUM_WARPS * i) * BLOCK, stride, all, i, lane);
            all.clear();
            if (!part.whole && arrivals)
                join(run, tile.window, whole, partial_out, partial_sums, arrivals, head_stride, warp, lane);
        }
    }
}

// queries, out: FP16, head h of window w at w · window_stride + h · head_stride, multiples of 8
// arrivals: see join; null where latent_attention_combine follows
extern "C" __global__ void __launch_bounds__(THREADS, 1)
latent_attention_sm90(const __grid_constant__ TensorMap states_map,
#if BITS == 8
                      const __grid_constant__ TensorMap scales_map,
#endif
                      const half_t* queries, half_t* out, half_t* partial_out, float2* partial_sums,
                      unsigned* arrivals, int windows, int window_stride, int head_stride, float scale_log2) {
    extern __shared__ char memory[];
    Run run;
    run.tiles = windows * TILES;
    run.begin = run_begin(blockIdx.x, run.tiles, gridDim.x);
    run.end = run_begin(blockIdx.x + 1, run.tiles, gridDim.x);
    run.shared = memory + (-shared_address(memory) & 1023);
    run.barriers = shared_address(run.shared + BARRIERS_AT);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            // NOTES: each lane arrives by itself. One for its warp would do and is hardly faster, but racecheck does not
            // see that it speaks for the others.
            barrier_init(run.barrier(FULL, i), 1);
            barrier_init(run.barrier(WEIGHED, i), SCORE_WARPS * 32);
            barrier_init(run.barrier(EMPTY, i), SUM_WARPS * 32);
        }
        barrier_init_fence();
    }
    // heads that the model does not have weigh nothing
    for (int i = threadIdx.x; i < STAGES * PADDED_HEADS * WEIGHT_PITCH; i += THREADS) run.weights(0)[i] = 0;
    for (int i = threadIdx.x; i < 2 * STAGES * PADDED_HEADS; i += THREADS) run.rescales(0)[i] = 1.0f;
    __syncthreads();

    auto load = [&](int index, int stage) {
        const Tile tile(index);
        const unsigned full = run.barrier(FULL, stage);
        barrier_expect(full, TILE_BYTES + (BITS == 8 ? SCALES_BYTES : 0));
        copy_tile_4d(shared_address(run.tile(stage)), &states_map, full, 0, tile.first, 0, tile.window);
#if BITS == 8
        copy_tile_3d(shared_address(run.scales(stage)), &scales_map, full, tile.first, 0, tile.window);
#endif
    };
    if (threadIdx.x < SCORE_WARPS * 32) {
        registers_take<SCORE_REGISTERS>();
        weigh(run, queries, partial_sums, window_stride, head_stride, scale_log2);
    } else {
        registers_give<SUM_REGISTERS>();
        if (threadIdx.x == SCORE_WARPS * 32)
            for (int i = 0; i < STAGES && run.begin + i < run.end; i++) load(run.begin + i, i);
        __syncwarp();
        sum(run, out, partial_out, partial_sums, arrivals, window_stride, head_stride, load);
    }
}
