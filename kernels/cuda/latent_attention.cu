// Latent cross-attention: attention of one query a head over the encoder state itself, which is keys and values at once.
//
//     scores[h, k] = query[h] · x[k]        weights = softmax over k        out[h] = Σ_k weights[h, k] x[k]
//
// with x [1500, WIDTH], read once from memory for all heads. Compiled with
//   WIDTH, HEADS  the model's            KEYS    positions of x in one tile      STAGES  tiles on their way
//   WARPS         each owns WIDTH / WARPS columns of x, both as the scores' inner dimension and as rows of the output
//   BITS          16: x is FP16. 8: x is bytes (128 stands for 0) with one FP16 scale for each 64 columns
//
// A block works off a run of tiles, which may cross windows; what it has of a window that it does not hold whole goes
// into ``partial``, and latent_attention_combine puts such parts together.
//
// NOTES: a warp copies, converts and multiplies its own columns only, so that warps need not wait for each other's data.
// They meet twice a tile: scores are sums over all columns, so each warp's partial ones go to shared memory, where each
// warp takes the softmax of its heads, a lane a position; and all warps need the weights of all heads. Queries and the
// output's accumulators stay in registers.
#include "hopper.cuh"
#include "latent_parts.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int COLUMNS = WIDTH / WARPS;  // of a warp
constexpr int STEPS = COLUMNS / 16;
constexpr int HEAD_TILES = (HEADS + 7) / 8;
constexpr int PADDED_HEADS = HEAD_TILES * 8;
constexpr int OWN_HEADS = (PADDED_HEADS + WARPS - 1) / WARPS;  // whose softmax a warp takes
constexpr int KEY_TILES = KEYS / 16;
constexpr int GROUPS = WIDTH / 64;  // that share a scale
constexpr int OWN_GROUPS = (COLUMNS + 63) / 64 + (COLUMNS % 64 != 0);  // that a warp's columns may touch
constexpr int SCALE_POSITIONS = (POSITIONS + 7) / 8 * 8;

constexpr int ROW_BYTES = WIDTH * BITS / 8;
constexpr int SLICE_BYTES = COLUMNS * BITS / 8;  // of a row, of a warp
constexpr int PITCH = SLICE_BYTES % 32 ? SLICE_BYTES : SLICE_BYTES + 16;  // odd in 16 bytes: no bank conflicts
constexpr int HALF_PITCH = COLUMNS * 2 + 16;                              // of bytes made FP16
constexpr int SCORE_PITCH = KEYS + 4;
constexpr int WEIGHT_PITCH = KEYS + 8;

// shared memory, in bytes
constexpr int SCALES = BITS == 8 ? OWN_GROUPS * KEYS * 2 : 0;
constexpr int STAGE = KEYS * PITCH + SCALES;  // of a warp
constexpr int HALVES = BITS == 8 ? KEYS * HALF_PITCH : 0;
constexpr int OWN = STAGES * STAGE + HALVES;
constexpr int SCORES_AT = WARPS * OWN;
constexpr int WEIGHTS_AT = SCORES_AT + WARPS * PADDED_HEADS * SCORE_PITCH * 4;
constexpr int RESCALE_AT = WEIGHTS_AT + PADDED_HEADS * WEIGHT_PITCH * 2;
constexpr int ARRIVED_AT = RESCALE_AT + PADDED_HEADS * 4;  // a barrier for each stage of a warp

static_assert(WIDTH % (16 * WARPS) == 0, "each warp owns whole steps of 16 columns");
static_assert(KEYS == 16 || KEYS == 32, "a lane a position");

// Starts copying a warp's columns of a tile. Rows behind the window's end repeat its last one: their weights are zero,
// but what those multiply must be numbers.
DEVICE void load_slice(unsigned stage, unsigned arrived, int index, int column, int lane, const char* states,
                       const half_t* scales) {
    const Tile tile(index);
    const char* rows = states + (long long)tile.window * POSITIONS * ROW_BYTES + column * (BITS / 8);
    constexpr int RUNS = KEYS / 8;  // of 16 bytes, of a group's scales
    const half_t* columns = scales + (long long)tile.window * GROUPS * SCALE_POSITIONS + tile.first;
#if __CUDA_ARCH__ >= 900
    // the copy engine: a lane a row
    if (lane == 0) barrier_expect(arrived, KEYS * SLICE_BYTES + SCALES);
    __syncwarp();
    if (lane < KEYS)
        copy_bytes(stage + lane * PITCH, rows + min(tile.first + lane, POSITIONS - 1) * ROW_BYTES, SLICE_BYTES, arrived);
    if (BITS == 8 && lane < OWN_GROUPS)
        copy_bytes(stage + KEYS * PITCH + lane * RUNS * 16, columns + min(column / 64 + lane, GROUPS - 1) * SCALE_POSITIONS,
                   RUNS * 16, arrived);
#else
    // two lanes a row, so that a sector of memory is asked for once
    constexpr int CHUNKS = SLICE_BYTES / 16;
#pragma unroll
    for (int i = 0; i < KEY_TILES; i++) {
        const int row = i * 16 + lane / 2;
        const char* from = rows + min(tile.first + row, POSITIONS - 1) * ROW_BYTES + lane % 2 * 16;
#pragma unroll
        for (int j = 0; j < CHUNKS; j += 2)
            if (j + 1 < CHUNKS || lane % 2 == 0) copy_async_16(stage + row * PITCH + (j + lane % 2) * 16, from + j * 16);
    }
    if constexpr (BITS == 8)
        for (int i = lane; i < OWN_GROUPS * RUNS; i += 32)
            copy_async_16(stage + KEYS * PITCH + i * 16,
                          columns + min(column / 64 + i / RUNS, GROUPS - 1) * SCALE_POSITIONS + i % RUNS * 8);
    copy_async_commit();
#endif
}

// Two bytes of ``values``, picked by ``selector``, as FP16 numbers: 0x6400 + u is 1024 + u.
DEVICE half2_t dequantise(unsigned values, unsigned selector, half2_t scale) {
    return multiply2(subtract2(__byte_perm(values, 0x64646464u, selector), 0x64806480u), scale);
}

// A warp's columns of a tile, from bytes to FP16: a lane a row.
DEVICE void dequantise_slice(char* halves, const char* stage, int column, int lane) {
    if (KEYS < 32 && lane >= KEYS) return;
    const half_t* scales = reinterpret_cast<const half_t*>(stage + KEYS * PITCH);
#pragma unroll
    for (int i = 0; i < SLICE_BYTES / 16; i++) {
        const uint4 bytes = *reinterpret_cast<const uint4*>(stage + lane * PITCH + i * 16);
        const int group = (column + i * 16) / 64 - column / 64;
        const half2_t scale = half2_t(scales[group * KEYS + lane]) * 0x10001u;
        uint4* to = reinterpret_cast<uint4*>(halves + lane * HALF_PITCH + i * 32);
        to[0] = make_uint4(dequantise(bytes.x, 0x4140, scale), dequantise(bytes.x, 0x4342, scale),
                           dequantise(bytes.y, 0x4140, scale), dequantise(bytes.y, 0x4342, scale));
        to[1] = make_uint4(dequantise(bytes.z, 0x4140, scale), dequantise(bytes.z, 0x4342, scale),
                           dequantise(bytes.w, 0x4140, scale), dequantise(bytes.w, 0x4342, scale));
    }
}

// queries, out: FP16, head h of window w at w · window_stride + h · head_stride
extern "C" __global__ void __launch_bounds__(THREADS, 1)
latent_attention(const char* states, const half_t* scales, const half_t* queries, half_t* out, half_t* partial_out,
                 float2* partial_sums, int windows, int window_stride, int head_stride, float scale_log2) {
    extern __shared__ __align__(128) char shared[];
    float* all_scores = reinterpret_cast<float*>(shared + SCORES_AT);
    half_t* weights = reinterpret_cast<half_t*>(shared + WEIGHTS_AT);
    float* rescales = reinterpret_cast<float*>(shared + RESCALE_AT);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, pair = lane % 4 * 2;
    const int column = warp * COLUMNS;
    char* const own = shared + warp * OWN;
    float* const own_scores = all_scores + warp * PADDED_HEADS * SCORE_PITCH;
    const int begin = run_begin(blockIdx.x, windows * TILES, gridDim.x);
    const int end = run_begin(blockIdx.x + 1, windows * TILES, gridDim.x);

    const unsigned arrived = shared_address(shared + ARRIVED_AT) + warp * STAGES * 8;
#if __CUDA_ARCH__ >= 900
    if (lane < STAGES) barrier_init(arrived + lane * 8, 1);
    barrier_init_fence();
    __syncwarp();
#endif
    auto load = [&](int index) {
        const int stage = (index - begin) % STAGES;
        if (index < end)
            load_slice(shared_address(own + stage * STAGE), arrived + stage * 8, index, column, lane, states, scales);
        else
            copy_async_commit();  // so that groups can be counted
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) load(begin + i);

    // heads that the model does not have weigh nothing
    for (int i = threadIdx.x; i < PADDED_HEADS * WEIGHT_PITCH; i += THREADS) weights[i] = 0;
    if (threadIdx.x < PADDED_HEADS) rescales[threadIdx.x] = 1.0f;

    unsigned query[STEPS][HEAD_TILES][2];
    float accumulated[STEPS][HEAD_TILES][4];
    float maximum[OWN_HEADS], sum[OWN_HEADS];  // of heads warp, warp + WARPS, …; the sum is this lane's share

    for (int index = begin; index < end; index++) {
        const Tile tile(index);
        if (index == begin || tile.first == 0) {
            const half_t* window_queries = queries + (long long)tile.window * window_stride;
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int j = 0; j < HEAD_TILES; j++) {
                    const int head = j * 8 + group;
                    const half_t* at = window_queries + head * head_stride + column + s * 16 + pair;
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        query[s][j][i] = head < HEADS ? *reinterpret_cast<const unsigned*>(at + i * 8) : 0;
#pragma unroll
                    for (int i = 0; i < 4; i++) accumulated[s][j][i] = 0.0f;
                }
#pragma unroll
            for (int j = 0; j < OWN_HEADS; j++) {
                maximum[j] = -infinity();
                sum[j] = 0.0f;
            }
        }

#if __CUDA_ARCH__ >= 900
        barrier_wait(arrived + (index - begin) % STAGES * 8, (index - begin) / STAGES % 2);
#else
        copy_async_wait<STAGES - 1>();
#endif
        __syncwarp();
        char* const stage = own + (index - begin) % STAGES * STAGE;
        char* const tile_halves = BITS == 8 ? own + STAGES * STAGE : stage;
        constexpr int TILE_PITCH = BITS == 8 ? HALF_PITCH : PITCH;
        if constexpr (BITS == 8) {
            dequantise_slice(tile_halves, stage, column, lane);
            __syncwarp();
            load(index + STAGES);
        }

        // partial scores: positions × heads
        {
            float scores[KEY_TILES][HEAD_TILES][4] = {};
            const unsigned rows = shared_address(tile_halves) + lane % 16 * TILE_PITCH + lane / 16 * 16;
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int m = 0; m < KEY_TILES; m++) {
                    unsigned a[4];
                    load_matrices(a, rows + m * 16 * TILE_PITCH + s * 32);
#pragma unroll
                    for (int j = 0; j < HEAD_TILES; j++) multiply_add(scores[m][j], a, query[s][j][0], query[s][j][1]);
                }
#pragma unroll
            for (int m = 0; m < KEY_TILES; m++)
#pragma unroll
                for (int j = 0; j < HEAD_TILES; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        own_scores[(j * 8 + pair + i % 2) * SCORE_PITCH + m * 16 + i / 2 * 8 + group] = scores[m][j][i];
        }
        __syncthreads();

        // a warp's heads side by side, as each is a chain of waits; heads that the model does not have repeat the last
        bool grown = false;
        float score[OWN_HEADS];
#pragma unroll
        for (int j = 0; j < OWN_HEADS; j++) {
            const int head = min(warp + j * WARPS, HEADS - 1);
            score[j] = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                score[j] += all_scores[(w * PADDED_HEADS + head) * SCORE_PITCH + lane % KEYS];
            score[j] = lane < KEYS && tile.first + lane < POSITIONS ? score[j] * scale_log2 : -infinity();
        }
        float most[OWN_HEADS];
#pragma unroll
        for (int j = 0; j < OWN_HEADS; j++) most[j] = score[j];
#pragma unroll
        for (int offset = 16; offset; offset /= 2)
#pragma unroll
            for (int j = 0; j < OWN_HEADS; j++) most[j] = fmaxf(most[j], __shfl_xor_sync(ALL_LANES, most[j], offset));
#pragma unroll
        for (int j = 0; j < OWN_HEADS; j++) {
            const int head = warp + j * WARPS;
            const float before = maximum[j];
            maximum[j] = fmaxf(before, most[j]);
            grown |= maximum[j] > before;
            const float rescale = exp2_approximate(before - maximum[j]);
            const half_t weight = to_half(exp2_approximate(score[j] - maximum[j]));
            sum[j] = sum[j] * rescale + to_float(weight);
            if (lane < KEYS && head < HEADS) weights[head * WEIGHT_PITCH + lane] = weight;
            if (lane == 0 && head < HEADS) rescales[head] = rescale;
        }
        if (__syncthreads_or(grown)) {
#pragma unroll
            for (int j = 0; j < HEAD_TILES; j++) {
                const float2 rescale = *reinterpret_cast<const float2*>(rescales + j * 8 + pair);
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    accumulated[s][j][0] *= rescale.x;
                    accumulated[s][j][1] *= rescale.y;
                    accumulated[s][j][2] *= rescale.x;
                    accumulated[s][j][3] *= rescale.y;
                }
            }
        }

        // the tile, transposed, times the weights: columns × heads
        {
            const unsigned rows =
                shared_address(tile_halves) + (lane / 16 * 8 + lane % 8) * TILE_PITCH + lane / 8 % 2 * 16;
#pragma unroll
            for (int m = 0; m < KEY_TILES; m++) {
                unsigned b[HEAD_TILES][2];
#pragma unroll
                for (int j = 0; j < HEAD_TILES; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        b[j][i] = *reinterpret_cast<const unsigned*>(weights + (j * 8 + group) * WEIGHT_PITCH + m * 16 +
                                                                     i * 8 + pair);
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    unsigned a[4];
                    load_matrices_transposed(a, rows + m * 16 * TILE_PITCH + s * 32);
#pragma unroll
                    for (int j = 0; j < HEAD_TILES; j++) multiply_add(accumulated[s][j], a, b[j][0], b[j][1]);
                }
            }
        }
        if constexpr (BITS == 16) {
            __syncwarp();  // all lanes have left the stage
            load(index + STAGES);
        }

        if (index == end - 1 || tile.ends_window()) {
            // the window, or what this block has of it, is done
            const Part part(tile.window, begin, end);
            __syncthreads();
#pragma unroll
            for (int j = 0; j < OWN_HEADS; j++) {
                const int head = warp + j * WARPS;
                const float total = warp_sum(sum[j]);
                if (lane == 0 && head < HEADS) {
                    rescales[head] = 1.0f / total;
                    if (!part.whole) partial_sums[part.index * HEADS + head] = make_float2(maximum[j], total);
                }
            }
            __syncthreads();
            half_t* to = part.whole ? out + (long long)tile.window * window_stride
                                    : partial_out + (long long)part.index * HEADS * WIDTH;
            const int stride = part.whole ? head_stride : WIDTH;
#pragma unroll
            for (int j = 0; j < HEAD_TILES; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int head = j * 8 + pair + i;
                    if (head >= HEADS) continue;
                    const float norm = rescales[head];
                    half_t* row = to + head * stride + column + group;
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        row[s * 16] = to_half(accumulated[s][j][i] * norm);
                        row[s * 16 + 8] = to_half(accumulated[s][j][i + 2] * norm);
                    }
                }
        }
    }
}
