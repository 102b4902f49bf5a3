#pragma once
// The persistent step's attention: one query over positions that a block's warps share, 16 of them at a time.
#include "persistent_layout.cuh"

// What a lane has of 16 positions of a head: of positions group and group + 8, eight numbers of each half of the head.
// Odd groups take the halves the other way round, so that both come from other banks: [position][first, second].
struct Tile {
    uint4 keys[2][2], values[2][2];
};

// A lane's part of a head's query, from its 64 numbers: words v and v + 2 of eight numbers of each half of the head,
// where v = group % 2 and the halves' order is that of a position whose group is group / 2.
struct Query {
    const float *first, *second;  // where the eights are

    DEVICE explicit Query(const float* from) {
        const Place at;
        const int offset = at.group() / 2 % 2 * 32 + at.part() * 8;
        first = from + offset;
        second = from + (offset ^ 32);
    }

    DEVICE static uint2 of(const uint4& eight) {
        return Place().group() % 2 ? make_uint2(eight.y, eight.w) : make_uint2(eight.x, eight.z);
    }

    DEVICE void get(uint2 (&to)[2], unsigned bit) const {
        uint4 eights[2];
        get_eights<2>(eights, {first, second}, bit);
        to[0] = of(eights[0]);
        to[1] = of(eights[1]);
    }
};

// A warp's softmax over its positions. The largest score is the warp's; the rest is of the lane's own positions.
struct Attention {
    float maximum = -infinity(), sum = 0.0f, mixed[16] = {};

    // query: from ``Query``. ``first``: position of this lane's group in the first of the tiles, which are
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
