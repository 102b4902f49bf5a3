#pragma once
// Hopper's latent attention: the eight warps that sum tiles by their weights.
#include "latent_layout.cuh"

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
