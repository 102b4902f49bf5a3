// The decoder's self-attention of one step, over slots of different lengths: stores each slot's new key and value in the
// cache, and attends over the positions up to its own. Grid: slots × heads. Compiled with WIDTH and HEADS.
//
// NOTES: a step is bound by reading the caches. Eight lanes hold one position's 64 numbers, 16 bytes each, and keep a
// softmax of their own over every GROUPS-th position, so that loads of many positions are on their way at once and
// groups meet only at the end.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int GROUPS = THREADS / 8;
constexpr int AHEAD = 4;  // positions whose keys and values a group loads before it uses the first

DEVICE void unpack(float (&to)[8], const uint4& from) {
    const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = to_float2(words[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
    }
}

// qkv [slots, 3, HEADS, 64]; keys, values [slots, n_ctx, HEADS, 64]; positions: one in every ``position_stride``;
// out [slots, HEADS, 64]
extern "C" __global__ void __launch_bounds__(THREADS)
self_attention(const half_t* qkv, half_t* keys, half_t* values, const int* positions, half_t* out, int n_ctx,
               int position_stride) {
    const int slot = blockIdx.x, head = blockIdx.y;
    const int group = threadIdx.x / 8, part = threadIdx.x % 8;
    const int position = min(positions[slot * position_stride], n_ctx - 1);

    const half_t* own = qkv + (long long)slot * 3 * WIDTH + head * 64 + part * 8;
    const uint4 new_key = *reinterpret_cast<const uint4*>(own + WIDTH);
    const uint4 new_value = *reinterpret_cast<const uint4*>(own + 2 * WIDTH);
    half_t* slot_keys = keys + (long long)slot * n_ctx * WIDTH + head * 64 + part * 8;
    half_t* slot_values = values + (long long)slot * n_ctx * WIDTH + head * 64 + part * 8;

    float query[8];
    unpack(query, *reinterpret_cast<const uint4*>(own));
#pragma unroll
    for (int i = 0; i < 8; i++) query[i] *= LOG2_E / 8.0f;  // 8: the root of the 64 numbers of a head

    float maximum = -infinity(), sum = 0.0f, mixed[8] = {};
    auto attend = [&](const uint4& key, const uint4& value) {
        float k[8], v[8], score = 0.0f;
        unpack(k, key);
        unpack(v, value);
#pragma unroll
        for (int i = 0; i < 8; i++) score += query[i] * k[i];
#pragma unroll
        for (int offset = 4; offset; offset /= 2) score += __shfl_xor_sync(0xffu << (threadIdx.x % 32 / 8 * 8), score, offset);
        const float before = maximum;
        maximum = fmaxf(before, score);
        const float rescale = exp2_approximate(before - maximum), weight = exp2_approximate(score - maximum);
        sum = sum * rescale + weight;
#pragma unroll
        for (int i = 0; i < 8; i++) mixed[i] = mixed[i] * rescale + weight * v[i];
    };

    for (int first = group; first < position; first += GROUPS * AHEAD) {
        uint4 k[AHEAD], v[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = first + i * GROUPS;
            if (at >= position) break;
            k[i] = *reinterpret_cast<const uint4*>(slot_keys + at * WIDTH);
            v[i] = *reinterpret_cast<const uint4*>(slot_values + at * WIDTH);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i * GROUPS < position) attend(k[i], v[i]);
    }
    if (group == 0) {  // its own position, which stands in no cache yet
        attend(new_key, new_value);
        *reinterpret_cast<uint4*>(slot_keys + position * WIDTH) = new_key;
        *reinterpret_cast<uint4*>(slot_values + position * WIDTH) = new_value;
    }

    __shared__ float maxima[GROUPS], sums[GROUPS], parts[GROUPS][64];
    if (part == 0) {
        maxima[group] = maximum;
        sums[group] = sum;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) parts[group][part * 8 + i] = mixed[i];
    __syncthreads();
    if (threadIdx.x >= 32) return;
    float most = -infinity();
#pragma unroll
    for (int i = 0; i < GROUPS; i++) most = fmaxf(most, maxima[i]);
    float total = 0.0f;
    float2 result = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const float share = exp2_approximate(maxima[i] - most);  // 0 of a group that had no position
        total += share * sums[i];
        result.x += share * parts[i][threadIdx.x * 2];
        result.y += share * parts[i][threadIdx.x * 2 + 1];
    }
    *reinterpret_cast<half2_t*>(out + (long long)slot * WIDTH + head * 64 + threadIdx.x * 2) =
        to_half2(result.x / total, result.y / total);
}
