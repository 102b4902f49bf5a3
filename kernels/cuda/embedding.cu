// The decoder's input: a token's embedding and its position's, as the residual stream. Grid: slots; a thread four columns.
// Compiled with WIDTH.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(WIDTH / 4)
embed(const half_t* tokens_table, const float* positions_table, const int* tokens, const int* positions, float* out,
      int token_stride, int position_stride, int n_ctx) {
    const int slot = blockIdx.x, i = threadIdx.x * 4;
    const long long token = tokens[slot * token_stride];
    const int position = min(positions[slot * position_stride], n_ctx - 1);
    const uint2 four = *reinterpret_cast<const uint2*>(tokens_table + token * WIDTH + i);
    const float4 at = *reinterpret_cast<const float4*>(positions_table + (long long)position * WIDTH + i);
    const float2 a = to_float2(four.x), b = to_float2(four.y);
    *reinterpret_cast<float4*>(out + (long long)slot * WIDTH + i) = make_float4(a.x + at.x, a.y + at.y, b.x + at.z, b.y + at.w);
}
