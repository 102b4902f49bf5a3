// Self-attention the plain way, where the comparison of kernels starts: a warp takes one query, each lane the score of
// one key, then the softmax over all scores in shared memory, then the weighted sum. With SHARED_KEYS the queries of a
// block read 32 keys at a time from shared memory, brought there once for all of them in whole rows; without, each lane
// walks along its own key's row in global memory, so that a warp's 32 words lie in 32 sectors.
// qkv [batch, positions, 3, heads, 64], out [batch, positions, heads, 64], FP16.
#include "common.cuh"

constexpr int WIDTH = 64;   // of a head
constexpr int QUERIES = 4;  // of a block, a warp each
constexpr int KEYS = 32;    // at a time, a lane each
constexpr int PAIRS = WIDTH / 2;

extern "C" __global__ void __launch_bounds__(32 * QUERIES)
    encoder_attention_simple(const half2_t* qkv, half2_t* out, int positions, int heads) {
    extern __shared__ float scores[];  // [QUERIES, positions]
    __shared__ half2_t queries[QUERIES][PAIRS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int query = min(blockIdx.x * QUERIES + warp, positions - 1);  // a warp behind the end repeats the last one
    const long long stride = 3ll * heads * PAIRS;
    const half2_t* q = qkv + blockIdx.z * stride * positions + blockIdx.y * PAIRS;
    const half2_t *k = q + heads * PAIRS, *v = k + heads * PAIRS;
    float* mine = scores + warp * positions;

    queries[warp][lane] = q[query * stride + lane];
    __syncwarp();
    float top = -infinity();
    for (int first = 0; first < positions; first += KEYS) {
        const int key = min(first + lane, positions - 1);
#if SHARED_KEYS
        __shared__ half2_t keys[KEYS][PAIRS + 1];  // one more, so that the lanes' rows begin in different banks
        __syncthreads();
        for (int row = warp; row < KEYS; row += QUERIES)
            keys[row][lane] = k[min(first + row, positions - 1) * stride + lane];
        __syncthreads();
        const half2_t* of_key = keys[lane];
#else
        const half2_t* of_key = k + key * stride;
#endif
        float score = 0.f;
        for (int i = 0; i < PAIRS; i++) {
            const float2 a = to_float2(queries[warp][i]), b = to_float2(of_key[i]);
            score = fmaf(a.x, b.x, fmaf(a.y, b.y, score));
        }
        score *= 0.125f;
        if (first + lane < positions) mine[key] = score;
        top = fmaxf(top, score);
    }
    top = warp_max(top);
    __syncwarp();
    float sum = 0.f;
    for (int key = lane; key < positions; key += 32) {
        mine[key] = exp2_approximate((mine[key] - top) * LOG2_E);
        sum += mine[key];
    }
    sum = warp_sum(sum);
    __syncwarp();
    float2 total = make_float2(0.f, 0.f);
    for (int key = 0; key < positions; key++) {
        const float2 value = to_float2(v[key * stride + lane]);
        total.x = fmaf(mine[key], value.x, total.x);
        total.y = fmaf(mine[key], value.y, total.y);
    }
    if (blockIdx.x * QUERIES + warp < positions)
        out[((blockIdx.z * (long long)positions + query) * heads + blockIdx.y) * PAIRS + lane] =
            to_half2(total.x / sum, total.y / sum);
}
