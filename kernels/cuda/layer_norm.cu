// Residual sum and layer normalisation in one pass: the residual stream (FP32) takes what a layer gives (FP16) with its
// bias, and leaves normalised as FP16. A row stays in the registers of its warps, so that memory is passed over once.
#include "common.cuh"

// DIM: of a row, a multiple of 128.

struct Moments {
    float mean, squares;  // squares: the sum of squared distances from the mean
};

// Of two sets of COUNT numbers each (Chan, Golub and LeVeque 1979).
// NOTES: sums of x and x² would also need only one reduction, but cancel where the mean is far from zero.
template <int COUNT>
DEVICE Moments merge(Moments a, Moments b) {
    const float distance = b.mean - a.mean;
    return {0.5f * (a.mean + b.mean), a.squares + b.squares + distance * distance * (0.5f * COUNT)};
}

template <int COUNT, int LANES = 1>
DEVICE Moments merge_warp(Moments m) {
    if constexpr (LANES == 32) {
        return m;
    } else {
        const Moments other = {__shfl_xor_sync(ALL_LANES, m.mean, LANES), __shfl_xor_sync(ALL_LANES, m.squares, LANES)};
        return merge_warp<2 * COUNT, 2 * LANES>(merge<COUNT>(m, other));
    }
}

DEVICE float4 to_float4(uint2 x) {
    const float2 low = to_float2(x.x), high = to_float2(x.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

DEVICE void add(float4& x, float4 y) { x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w; }

// VECTORS: of four numbers, that a lane holds. WARPS share a row, ROWS rows a block.
template <int VECTORS, int WARPS, int ROWS>
DEVICE void normalise(float* residual, const half_t* y, const half_t* y_bias, const float* weight, const float* bias,
                      half_t* out, int rows, float epsilon) {
    static_assert(VECTORS * WARPS * 128 == DIM, "a row is all that its warps hold");
    constexpr int LANES = 32 * WARPS;
    const int lane = threadIdx.x % LANES, row = blockIdx.x * ROWS + threadIdx.x / LANES;
    if (ROWS > 1 && row >= rows) return;
    float4* x_row = reinterpret_cast<float4*>(residual + size_t(row) * DIM);

    // NOTES: where a lane holds little, weights come with the first loads: of few rows only the latency counts.
    constexpr bool EARLY = VECTORS <= 2;
    const float4* weight_row = reinterpret_cast<const float4*>(weight);
    const float4* bias_row = reinterpret_cast<const float4*>(bias);
    float4 x[VECTORS], early_weight[EARLY ? VECTORS : 1], early_bias[EARLY ? VECTORS : 1];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) x[i] = x_row[i * LANES + lane];
    if constexpr (EARLY) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            early_weight[i] = __ldg(weight_row + i * LANES + lane);
            early_bias[i] = __ldg(bias_row + i * LANES + lane);
        }
    }
    if (y != nullptr) {
        const uint2* y_row = reinterpret_cast<const uint2*>(y + size_t(row) * DIM);
        uint2 given[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) given[i] = y_row[i * LANES + lane];
        if (y_bias != nullptr) {
#pragma unroll
            for (int i = 0; i < VECTORS; ++i)
                add(x[i], to_float4(__ldg(reinterpret_cast<const uint2*>(y_bias) + i * LANES + lane)));
        }
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            add(x[i], to_float4(given[i]));
            x_row[i * LANES + lane] = x[i];
        }
    }

    constexpr int COUNT = 4 * VECTORS;
    Moments m = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) m.mean += x[i].x + x[i].y + (x[i].z + x[i].w);
    m.mean *= 1.0f / COUNT;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const float a = x[i].x - m.mean, b = x[i].y - m.mean, c = x[i].z - m.mean, d = x[i].w - m.mean;
        m.squares += a * a + b * b + (c * c + d * d);
    }
    m = merge_warp<COUNT>(m);
    if constexpr (WARPS > 1) {
        static_assert(ROWS == 1, "a block is a row where several warps share it");
        __shared__ Moments parts[WARPS];
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = m;
        __syncthreads();
        float mean = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) mean += parts[i].mean;
        mean *= 1.0f / WARPS;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            const float distance = parts[i].mean - mean;
            squares += parts[i].squares + distance * distance * (32 * COUNT);
        }
        m = {mean, squares};
    }

    const float scale = rsqrtf(m.squares * (1.0f / DIM) + epsilon);
    uint2* out_row = reinterpret_cast<uint2*>(out + size_t(row) * DIM);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const float4 w = EARLY ? early_weight[EARLY ? i : 0] : __ldg(weight_row + i * LANES + lane);
        const float4 b = EARLY ? early_bias[EARLY ? i : 0] : __ldg(bias_row + i * LANES + lane);
        out_row[i * LANES + lane] = make_uint2(
            to_half2((x[i].x - m.mean) * scale * w.x + b.x, (x[i].y - m.mean) * scale * w.y + b.y),
            to_half2((x[i].z - m.mean) * scale * w.z + b.z, (x[i].w - m.mean) * scale * w.w + b.w));
    }
}

// residual [rows, DIM] FP32, y [rows, DIM] and y_bias [DIM] FP16 or null, weight and bias [DIM] FP32, out [rows, DIM]
// FP16. residual is only written where there is a y.

// Many rows: a warp takes one, so that a multiprocessor has many loads on their way and no barriers.
extern "C" __global__ void __launch_bounds__(32 * MANY_ROWS)
add_layer_norm(float* residual, const half_t* __restrict__ y, const half_t* __restrict__ y_bias,
               const float* __restrict__ weight, const float* __restrict__ bias, half_t* __restrict__ out, int rows,
               float epsilon) {
    normalise<DIM / 128, 1, MANY_ROWS>(residual, y, y_bias, weight, bias, out, rows, epsilon);
}

// Few rows: a block takes one, so that its loads are all issued at once.
extern "C" __global__ void __launch_bounds__(DIM / 4 / FEW_VECTORS)
add_layer_norm_few(float* residual, const half_t* __restrict__ y, const half_t* __restrict__ y_bias,
                   const float* __restrict__ weight, const float* __restrict__ bias, half_t* __restrict__ out, int rows,
                   float epsilon) {
    normalise<FEW_VECTORS, DIM / 128 / FEW_VECTORS, 1>(residual, y, y_bias, weight, bias, out, rows, epsilon);
}
