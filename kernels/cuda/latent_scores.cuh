#pragma once
// Hopper's latent attention: the four warps that turn tiles into weights.
#include "latent_layout.cuh"

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
