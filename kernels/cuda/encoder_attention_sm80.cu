// Self-attention of Whisper's encoder for every GPU from sm_80 on, in the manner of FlashAttention-2 (Dao, 2023): four
// warps of 32 query rows each, keys and values copied asynchronously one block ahead, scores, weights and sums in
// registers. qkv [batch, positions, 3, heads, 64], out [batch, positions, heads, 64], FP16.
#include "common.cuh"

constexpr int WIDTH = 64;  // of a head
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROWS = 32 * WARPS;  // queries of a block
constexpr int KEYS = 64;          // at a time
constexpr int ROW_BYTES = WIDTH * 2, CHUNKS = ROW_BYTES / 16;
constexpr float SCALE = 0.125f * LOG2_E;  // of scores, for powers of two

// NOTES: rows are 128 bytes, all 32 banks; without the exclusive or, 8 rows read at one column would share their banks.
DEVICE unsigned place(unsigned tile, int row, int chunk) { return tile + row * ROW_BYTES + (chunk ^ row % 8) * 16; }

DEVICE void store_shared(unsigned address, half2_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Rows [first, first + COUNT) of one head to shared memory; zeros behind ``positions``.
template <int COUNT>
DEVICE void copy_rows(unsigned tile, const half_t* head, int first, int positions, long long stride) {
#pragma unroll
    for (int i = 0; i < COUNT * CHUNKS / THREADS; i++) {
        const int row = (i * THREADS + threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const bool valid = first + row < positions;
        copy_async_16(place(tile, row, chunk), head + (valid ? (first + row) * stride : 0) + chunk * 8, valid);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    encoder_attention_sm80(const half_t* qkv, half_t* out, int positions, int heads) {
    __shared__ alignas(128) char memory[(ROWS + 4 * KEYS) * ROW_BYTES];
    const unsigned q_at = shared_address(memory), kv_at = q_at + ROWS * ROW_BYTES;  // keys, values; keys, values
    constexpr unsigned KEYS_BYTES = KEYS * ROW_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.x * ROWS, head = blockIdx.y;
    const long long stride = 3ll * heads * WIDTH;
    const half_t* q = qkv + blockIdx.z * stride * positions + head * WIDTH;
    const half_t *k = q + heads * WIDTH, *v = k + heads * WIDTH;
    const int blocks = ceil_div(positions, KEYS);

    auto copy_block = [&](int block) {
        const unsigned at = kv_at + block % 2 * 2 * KEYS_BYTES;
        copy_rows<KEYS>(at, k, block * KEYS, positions, stride);
        copy_rows<KEYS>(at + KEYS_BYTES, v, block * KEYS, positions, stride);
        copy_async_commit();
    };
    copy_rows<ROWS>(q_at, q, first, positions, stride);
    copy_block(blocks - 1);

    unsigned a[2][4][4];  // this warp's queries
    float o[2][8][4] = {}, top[2][2], sum[2][2] = {};
    for (int m = 0; m < 2; m++) top[m][0] = top[m][1] = -infinity();

    for (int block = blocks - 1; block >= 0; block--) {  // the last first: it alone has keys to mask
        copy_async_wait<0>();
        __syncthreads();  // this block is here, and all warps are done with the buffers that the next one goes to
        if (block > 0) copy_block(block - 1);
        if (block == blocks - 1) {
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    load_matrices(a[m][i], place(q_at, warp * 32 + m * 16 + lane % 16, 2 * i + lane / 16));
        }
        const unsigned k_at = kv_at + block % 2 * 2 * KEYS_BYTES, v_at = k_at + KEYS_BYTES;

        float s[2][KEYS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++) {
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                unsigned b[4];
                load_matrices(b, place(k_at, n * 16 + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    multiply_add(s[m][2 * n], a[m][i], b[0], b[1]);
                    multiply_add(s[m][2 * n + 1], a[m][i], b[2], b[3]);
                }
            }
        }
        if (block == blocks - 1 && positions % KEYS) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (n * 8 + lane % 4 * 2 + i % 2 >= positions % KEYS) s[0][n][i] = s[1][n][i] = -infinity();
        }

        // NOTES: weights are powers relative to ``top``, which follows a row's maximum only when that has grown by more
        // than a factor of 2^8: any top is right as long as nothing overflows, and the sums are hardly ever scaled.
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float factor[2];
#pragma unroll
            for (int row = 0; row < 2; row++) {
                float high = -infinity();
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) high = fmaxf(high, fmaxf(s[m][n][2 * row], s[m][n][2 * row + 1]));
                high = warp_max<4>(high);
                const float old = top[m][row];
                top[m][row] = (high - old) * SCALE > 8.f ? high : old;
                factor[row] = exp2_approximate((old - top[m][row]) * SCALE);
                const float shift = -top[m][row] * SCALE;
                float part = 0.f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 2 * row; i < 2 * row + 2; i++) {
                        s[m][n][i] = exp2_approximate(fmaf(s[m][n][i], SCALE, shift));
                        part += s[m][n][i];
                    }
                sum[m][row] = fmaf(sum[m][row], factor[row], part);
            }
            if (__any_sync(ALL_LANES, factor[0] != 1.f || factor[1] != 1.f)) {
#pragma unroll
                for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) o[m][n][i] *= factor[i / 2];
            }
        }
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
            unsigned p[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float* pair = &s[m][2 * i + j / 2][j % 2 * 2];
                    p[m][j] = to_half2(pair[0], pair[1]);
                }
#pragma unroll
            for (int n = 0; n < WIDTH / 16; n++) {
                unsigned b[4];
                load_matrices_transposed(b, place(v_at, i * 16 + lane % 16, 2 * n + lane / 16));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    multiply_add(o[m][2 * n], p[m], b[0], b[1]);
                    multiply_add(o[m][2 * n + 1], p[m], b[2], b[3]);
                }
            }
        }
    }

    // Through this warp's own rows of shared memory, whose queries it holds in registers, so that it stores whole rows.
    __syncwarp();  // with a single block of keys nothing else parts those reads from these stores
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const float inverse = 1.f / warp_sum<4>(sum[m][row]);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
                store_shared(place(q_at, warp * 32 + m * 16 + row * 8 + lane / 4, n) + lane % 4 * 4,
                             to_half2(o[m][n][2 * row] * inverse, o[m][n][2 * row + 1] * inverse));
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const int row = warp * 32 + i * 4 + lane / 8, chunk = lane % 8;
        if (first + row < positions) {
            half_t* to = out + ((blockIdx.z * (long long)positions + first + row) * heads + head) * WIDTH + chunk * 8;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(memory + (place(q_at, row, chunk) - q_at));
        }
    }
}
