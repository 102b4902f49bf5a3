// Whisper's log-mel features of many windows in one launch. A block makes the frames of one tile (PAIRS pairs of frames) of
// one window at a time: samples to shared memory, two frames as the real and imaginary part of one complex transform of
// 400 = 20 × 20 points, powers, mel bands, logarithm. Some windows later, while it still is in the cache, the tile is
// lifted to its window's maximum less 8 decades, if any of it lies lower.
//
// NOTES: ten threads share a pair of frames. In both passes of the transform a thread computes two columns of 20 points
// in registers, in the second pass columns c and 20 - c: these hold bins k and 400 - k, from which the spectra of the two
// frames are told apart, so that only one exchange through shared memory is needed.
#include "common.cuh"

// PAIRS: pairs of frames of a tile. SAMPLE_FLOAT: samples are FP32 in [-1, 1), otherwise 16-bit integers.
// OUTPUT_HALF: FP16 instead of FP32. FRAMES_FIRST: [windows, 3000, bands] instead of [windows, bands, 3000].

constexpr int HOP = 160, N_FFT = 400, BINS = 201, FRAMES = 3000, WINDOW_SAMPLES = 480000;
constexpr int TILE_FRAMES = 2 * PAIRS, TILES = (FRAMES + TILE_FRAMES - 1) / TILE_FRAMES;
constexpr int TILE_SAMPLES = TILE_FRAMES * HOP + N_FFT - HOP;
constexpr int COLUMNS = 20, ROLES = COLUMNS / 2;
constexpr int WORKERS = ROLES * PAIRS, WARPS = (WORKERS + 31) / 32, THREADS = 32 * WARPS;
constexpr int FRAME_GROUPS = (TILE_FRAMES + 31) / 32, PARTS = WARPS / FRAME_GROUPS;  // of the bands, by warp
// Blocks by multiprocessor: as many as have 128 registers a thread, and, of the default size, 228 KB of shared memory.
constexpr int BLOCKS = (SAMPLE_FLOAT ? 320 : 480) / THREADS;

#if SAMPLE_FLOAT
typedef float sample_t;
#else
typedef short sample_t;
#endif
#if OUTPUT_HALF
typedef half_t output_t;
#else
typedef float output_t;
#endif

// In final units, (log10 + 4) / 4: the value of silence, and how far under the maximum values may lie.
constexpr float SILENCE = -1.5f, RANGE = 2.0f;
constexpr float MIN_POWER = 1e-10f;

// ---- shared memory ----
// NOTES: padding behind the samples of each pair of frames, so that the pairs that a warp reads lie in different banks.
constexpr int PAIR_SAMPLES = 2 * HOP;
constexpr int PAD_BYTES = 4 * (PAIRS < 16 ? 32 / PAIRS : 2);
constexpr int PAIR_BYTES = PAIR_SAMPLES * int(sizeof(sample_t)) + PAD_BYTES;
constexpr int EXCHANGE_BYTES = COLUMNS * ROLES * PAIRS * 16;
constexpr int POWER_BYTES = (BINS - 1) * PAIRS * 8;  // bins 0 and 200 are in no mel band; row 0 holds the next ticket
constexpr int SAMPLE_BYTES = (TILE_SAMPLES + PAIR_SAMPLES - 1) / PAIR_SAMPLES * PAIR_BYTES;
constexpr int SHARED_BYTES = EXCHANGE_BYTES + (SAMPLE_BYTES > POWER_BYTES ? SAMPLE_BYTES : POWER_BYTES);

// NOTES: read anew in each phase, as is all that follows from it: kept, it would cost the transform registers.
DEVICE int thread_in_block() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

DEVICE int sample_offset(int i) { return i * int(sizeof(sample_t)) + i / PAIR_SAMPLES * PAD_BYTES; }

// ---- the transform ----

DEVICE float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
DEVICE float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }

DEVICE float2 multiply(float2 a, float real, float imaginary) {
    return make_float2(a.x * real - a.y * imaginary, a.x * imaginary + a.y * real);
}

DEVICE void transform_4(float2& x0, float2& x1, float2& x2, float2& x3) {
    const float2 sum_even = x0 + x2, difference_even = x0 - x2, sum_odd = x1 + x3, difference_odd = x1 - x3;
    x0 = sum_even + sum_odd;
    x2 = sum_even - sum_odd;
    x1 = make_float2(difference_even.x + difference_odd.y, difference_even.y - difference_odd.x);
    x3 = make_float2(difference_even.x - difference_odd.y, difference_even.y + difference_odd.x);
}

DEVICE void transform_5(float2& x0, float2& x1, float2& x2, float2& x3, float2& x4) {
    constexpr float COS_1 = 0.30901699437494742f, COS_2 = -0.80901699437494742f;
    constexpr float SIN_1 = 0.95105651629515357f, RATIO = 0.61803398874989485f;  // sin(4π/5) / sin(2π/5)
    const float2 s1 = x1 + x4, d1 = x1 - x4, s2 = x2 + x3, d2 = x2 - x3;
    const float2 a1 = make_float2(x0.x + COS_1 * s1.x + COS_2 * s2.x, x0.y + COS_1 * s1.y + COS_2 * s2.y);
    const float2 a2 = make_float2(x0.x + COS_2 * s1.x + COS_1 * s2.x, x0.y + COS_2 * s1.y + COS_1 * s2.y);
    const float2 b1 = make_float2(d1.x + RATIO * d2.x, d1.y + RATIO * d2.y);
    const float2 b2 = make_float2(RATIO * d1.x - d2.x, RATIO * d1.y - d2.y);
    x0 = x0 + s1 + s2;
    x1 = make_float2(a1.x + SIN_1 * b1.y, a1.y - SIN_1 * b1.x);
    x4 = make_float2(a1.x - SIN_1 * b1.y, a1.y + SIN_1 * b1.x);
    x2 = make_float2(a2.x + SIN_1 * b2.y, a2.y - SIN_1 * b2.x);
    x3 = make_float2(a2.x - SIN_1 * b2.y, a2.y + SIN_1 * b2.x);
}

// Where transform_20 leaves element k.
DEVICE constexpr int slot(int k) { return (5 * (k % 4) + 4 * (k % 5)) % 20; }

// Σ x[n] exp(-2πi nk / 20), in place and permuted: 4 and 5 have no common factor, so there are no twiddle factors
// (Good 1958: n = 5 a + 4 b).
DEVICE void transform_20(float2 (&x)[20]) {
#pragma unroll
    for (int b = 0; b < 5; ++b) transform_4(x[4 * b], x[(5 + 4 * b) % 20], x[(10 + 4 * b) % 20], x[(15 + 4 * b) % 20]);
#pragma unroll
    for (int a = 0; a < 4; ++a)
        transform_5(x[5 * a], x[(5 * a + 4) % 20], x[(5 * a + 8) % 20], x[(5 * a + 12) % 20], x[(5 * a + 16) % 20]);
}

// Powers of two frames in one bin, four-fold, from their joint spectrum at bins k and 400 - k.
DEVICE float2 powers(float2 at, float2 mirrored) {
    const float sum_x = at.x + mirrored.x, sum_y = at.y + mirrored.y;
    const float difference_x = at.x - mirrored.x, difference_y = at.y - mirrored.y;
    return make_float2(sum_x * sum_x + difference_y * difference_y, sum_y * sum_y + difference_x * difference_x);
}

// ---- samples ----

constexpr int VECTOR = 16 / int(sizeof(sample_t)), VECTORS = TILE_SAMPLES / VECTOR;
constexpr int ROUNDS = (VECTORS + THREADS - 1) / THREADS;
static_assert(TILE_SAMPLES % VECTOR == 0 && PAIR_SAMPLES % VECTOR == 0, "whole vectors");

// Which sample stands at position i of the 30 s, which are continued by reflection at both ends.
DEVICE int reflected(int i) {
    i = abs(i);
    return i < WINDOW_SAMPLES ? i : 2 * (WINDOW_SAMPLES - 1) - i;
}

DEVICE int tiles_with_sound(int length) {
    const int frames = min(FRAMES, (length + N_FFT / 2 + HOP - 1) / HOP);  // of the others no sample is ever seen
    return ceil_div(frames, TILE_FRAMES);
}

struct Tile {
    int window, index, length;
    const sample_t* samples;  // of the window
    bool sounds;              // else it lies behind the last sample, or is none
    bool whole;               // it lies between the window's ends and can be read 16 bytes at a time

    DEVICE int first() const { return index * TILE_FRAMES * HOP - N_FFT / 2; }
};

DEVICE Tile tile_of(int ticket, int windows, const sample_t* samples, const long long* offsets, const int* lengths) {
    Tile tile = {ticket / TILES, ticket % TILES, 0, samples, false, false};
    if (tile.window < windows) {
        tile.length = __ldg(&lengths[tile.window]);
        tile.samples += __ldg(&offsets[tile.window]);
        tile.sounds = tile.index < tiles_with_sound(tile.length);
        const bool aligned = ((unsigned long long)(tile.samples + tile.first()) & 15) == 0;
        tile.whole = tile.sounds && aligned && tile.index > 0 && tile.first() + TILE_SAMPLES <= tile.length;
    }
    return tile;
}

DEVICE uint4 load_16(const void* pointer) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(pointer));
    return v;
}

// The samples of a whole tile on their way to shared memory.
// NOTES: zeros otherwise, so that nothing of the tile before has to be kept in registers.
DEVICE void fetch(uint4 (&v)[ROUNDS], const Tile& tile) {
    const sample_t* from = tile.samples + tile.first();
    const int thread = thread_in_block();
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int vector = i * THREADS + thread;
        v[i] = make_uint4(0, 0, 0, 0);
        if (tile.whole && vector < VECTORS) v[i] = load_16(from + vector * VECTOR);
    }
}

DEVICE void put(char* shared, const uint4 (&v)[ROUNDS]) {
    const int thread = thread_in_block();
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const int vector = i * THREADS + thread;
        if (vector < VECTORS) {
            uint2* to = reinterpret_cast<uint2*>(shared + sample_offset(vector * VECTOR));
            to[0] = make_uint2(v[i].x, v[i].y);
            to[1] = make_uint2(v[i].z, v[i].w);
        }
    }
}

// Other tiles: at the window's ends, or not aligned.
DEVICE void put_by_sample(char* shared, const Tile& tile) {
#pragma unroll 8
    for (int i = thread_in_block(); i < TILE_SAMPLES; i += THREADS) {
        const int from = reflected(tile.first() + i);
        *reinterpret_cast<sample_t*>(shared + sample_offset(i)) = from < tile.length ? tile.samples[from] : sample_t(0);
    }
}

// What a thread reads of two neighbouring columns, the second odd. Of a column frame 0 sees the first 20 samples and
// frame 1 the last 20.
struct Columns {
    static constexpr int SAMPLES = COLUMNS + HOP / COLUMNS;
#if SAMPLE_FLOAT
    const char* from;
    DEVICE explicit Columns(const char* from) : from(from) {}
    template <int ODD>
    DEVICE float get(int j) const { return reinterpret_cast<const float*>(from + sample_offset(COLUMNS * j))[ODD]; }
#else
    int both[SAMPLES];
    DEVICE explicit Columns(const char* from) {
#pragma unroll
        for (int j = 0; j < SAMPLES; ++j) both[j] = *reinterpret_cast<const int*>(from + sample_offset(COLUMNS * j));
    }
    template <int ODD>
    DEVICE float get(int j) const { return ODD ? float(both[j] >> 16) : float(short(both[j])); }
#endif
};

// A column, times Hann's window: frame 0 is the real part, frame 1 the imaginary.
template <int ODD>
DEVICE void windowed(float2 (&z)[20], const Columns& columns, const float2* hann) {
    float x[Columns::SAMPLES];
#pragma unroll
    for (int j = 0; j < Columns::SAMPLES; ++j) x[j] = columns.get<ODD>(j);
#pragma unroll
    for (int j = 0; j < 20; j += 4) {
        const float4 w = __ldg(reinterpret_cast<const float4*>(hann) + ODD * 5 + j / 4);
        z[j] = make_float2(x[j] * w.x, x[j + 8] * w.x);
        z[j + 1] = make_float2(x[j + 1] * w.y, x[j + 9] * w.y);
        z[j + 2] = make_float2(x[j + 2] * w.z, x[j + 10] * w.z);
        z[j + 3] = make_float2(x[j + 3] * w.w, x[j + 11] * w.w);
    }
}

// ---- bands ----

DEVICE float log2_approximate(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float final_units(float power) {
    constexpr float LOG10_2_OVER_4 = 0.30102999566398120f / 4;
    return log2_approximate(fmaxf(power, MIN_POWER)) * LOG10_2_OVER_4 + 1.0f;
}

// A bin's powers go into the band that falls there and into the next, which rises; then the falling band may be done.
struct Step {
    float falling, rising;  // weights
    int bin, done;          // done: the band that is, or -1
};

DEVICE Step load_step(const int4* at) {
    const int4 v = __ldg(at);
    return {__int_as_float(v.x), __int_as_float(v.y), v.z, v.w};
}

// ---- the floor under a window's maximum ----

// What blocks tell each other of a launch; zeros at its begin.
struct Progress {
    int* next_ticket;
    int* done;      // [windows] tiles
    int* greatest;  // [windows] value over silence's + 1: positive, so that its bits are ordered as integers
};

// NOTES: read relaxed, from the second-level cache, where a tile's values are before it counts as done. To acquire would
// empty the first-level cache of the tables.
DEVICE int load_relaxed(const int* from) {
    int x;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

DEVICE uint4 load_relaxed_16(const uint4* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

// Counts a tile as done, whose values all threads of the block have written before a barrier.
DEVICE void announce(const Progress& progress, int window) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(&progress.done[window]) : "memory");
}

DEVICE uint4 at_least(uint4 v, float floor) {
#if OUTPUT_HALF
    const auto lift = [floor](half2_t x) {
        const float2 y = to_float2(x);
        return to_half2(fmaxf(y.x, floor), fmaxf(y.y, floor));
    };
#else
    const auto lift = [floor](unsigned x) { return unsigned(__float_as_int(fmaxf(__int_as_float(int(x)), floor))); };
#endif
    return make_uint4(lift(v.x), lift(v.y), lift(v.z), lift(v.w));
}

// Lifts a tile's values to the floor, or writes silence.
DEVICE void lift(output_t* out, int window, int tile, int n_mels, float floor, bool silent) {
    constexpr int VALUES = 16 / int(sizeof(output_t));
    const float silence = fmaxf(SILENCE, floor);
#if OUTPUT_HALF
    const unsigned word = to_half2(silence, silence);
#else
    const unsigned word = __float_as_int(silence);
#endif
    uint4* vectors = reinterpret_cast<uint4*>(out + size_t(window) * n_mels * FRAMES);
    const int frames = min(TILE_FRAMES, FRAMES - tile * TILE_FRAMES);
    constexpr int COLUMN_VECTORS = TILE_FRAMES / VALUES;
#pragma unroll 4
    for (int i = thread_in_block(); i < COLUMN_VECTORS * n_mels; i += THREADS) {
#if FRAMES_FIRST
        if (i * VALUES >= frames * n_mels) break;
        uint4* at = vectors + tile * TILE_FRAMES * n_mels / VALUES + i;
#else
        const int band = i / COLUMN_VECTORS, column = i % COLUMN_VECTORS;
        if (column * VALUES >= frames) continue;
        uint4* at = vectors + (band * FRAMES + tile * TILE_FRAMES) / VALUES + column;
#endif
        *at = silent ? make_uint4(word, word, word, word) : at_least(load_relaxed_16(at), floor);
    }
}

// What is to be done with the tile of ``lag`` tickets before.
struct Lift {
    enum What { NO, LOW, SILENT } what;
    float floor;
};

// ---- the phases ----

// From samples to the exchange: windowed columns 2 role and 2 role + 1, their transforms, and the twiddle factors.
DEVICE void first_pass(float4* exchange, const char* sample_bytes, const float2* hann, const float4* twiddles) {
    float2 a[20], b[20];
    {
        const int thread = thread_in_block(), role = thread / PAIRS, pair = thread % PAIRS;
        if (THREADS > WORKERS && role >= ROLES) return;
        const Columns columns(sample_bytes + pair * PAIR_BYTES + 2 * role * int(sizeof(sample_t)));
        windowed<0>(a, columns, hann + role * 20);
        transform_20(a);
        windowed<1>(b, columns, hann + role * 20);
        transform_20(b);
    }
    const int thread = thread_in_block();
    float4* to = exchange + thread;
    twiddles += thread / PAIRS * 20;
#pragma unroll
    for (int k = 0; k < 20; ++k) {
        float2 even = a[slot(k)], odd = b[slot(k)];
        if (k > 0) {
            const float4 w = __ldg(&twiddles[k]);
            even = multiply(even, w.x, w.y);
            odd = multiply(odd, w.z, w.w);
        }
        to[k * ROLES * PAIRS] = make_float4(even.x, even.y, odd.x, odd.y);
    }
}

// From the exchange to powers: columns role and 20 - role; 0 and 10, which mirror themselves, go together.
DEVICE void second_pass(float2* power, const float4* exchange) {
    const int thread = thread_in_block(), role = thread / PAIRS, pair = thread % PAIRS;
    if (THREADS > WORKERS && role >= ROLES) return;
    const float4* from_a = exchange + role * ROLES * PAIRS + pair;
    const float4* from_b = exchange + (role > 0 ? COLUMNS - role : ROLES) * ROLES * PAIRS + pair;
    float2 a[20], b[20];
#pragma unroll
    for (int j = 0; j < 10; ++j) {
        const float4 u = from_a[j * PAIRS], v = from_b[j * PAIRS];
        a[2 * j] = make_float2(u.x, u.y), a[2 * j + 1] = make_float2(u.z, u.w);
        b[2 * j] = make_float2(v.x, v.y), b[2 * j + 1] = make_float2(v.z, v.w);
    }
    transform_20(a);
    transform_20(b);
    if (role > 0) {
        float2* up = power + role * PAIRS + pair;
        float2* down = power - role * PAIRS + pair;
#pragma unroll
        for (int k = 0; k < 20; ++k) {
            float2* to = k < 10 ? up + 20 * k * PAIRS : down + 20 * (20 - k) * PAIRS;
            *to = powers(a[slot(k)], b[slot(19 - k)]);
        }
    } else {
#pragma unroll
        for (int k = 1; k < 10; ++k) power[20 * k * PAIRS + pair] = powers(a[slot(k)], a[slot(20 - k)]);
#pragma unroll
        for (int k = 0; k < 10; ++k) power[(20 * k + 10) * PAIRS + pair] = powers(b[slot(k)], b[slot(19 - k)]);
    }
}

// From powers to values: a lane takes a frame, the warps share the bands.
DEVICE void bands(output_t* out, half_t* rows, float2* warp_ranges, const float* power, const int4* steps, int window,
                  int index, int n_mels, int part_steps) {
    const int thread = thread_in_block(), warp = thread / 32, lane = thread % 32;
    const int frame = warp / PARTS * 32 + lane;
    const bool valid = frame < TILE_FRAMES && index * TILE_FRAMES + frame < FRAMES;
    const float* frame_power = power + (frame < TILE_FRAMES ? frame : 0);
    const int4* program = steps + warp % PARTS * part_steps;
#if FRAMES_FIRST
    half_t* to = rows + frame * (n_mels + 2);
#else
    output_t* to = out + size_t(window) * n_mels * FRAMES + index * TILE_FRAMES + frame;
#endif
    float falling = 0.0f, rising = 0.0f, low = infinity(), high = -infinity();
    for (int i = 0; i < part_steps; i += 4) {
        Step step[4];
        float p[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) step[j] = load_step(program + i + j);
#pragma unroll
        for (int j = 0; j < 4; ++j) p[j] = frame_power[step[j].bin * TILE_FRAMES];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            falling += step[j].falling * p[j];
            rising += step[j].rising * p[j];
            if (step[j].done >= 0) {
                const float y = final_units(falling);
                if (valid) {
                    low = fminf(low, y);
                    high = fmaxf(high, y);
#if FRAMES_FIRST
                    to[step[j].done] = to_half(y);
#elif OUTPUT_HALF
                    to[step[j].done * FRAMES] = to_half(y);
#else
                    to[step[j].done * FRAMES] = y;
#endif
                }
                falling = rising;
                rising = 0.0f;
            }
        }
    }
    low = -warp_max(-low);
    high = warp_max(high);
    if (lane == 0) warp_ranges[warp] = make_float2(low, high);
}

// ---- the kernel ----

// samples: windows lie at offsets [windows] and are lengths [windows] long, in samples; device memory or mapped host
// memory. hann [10][2][20], twiddles [10][20][4] and steps [PARTS][part_steps], in which the bands are shared among the
// warps, come from log_mel.py. least [windows][TILES]: scratch. state [1 + 2 windows]: zeros. lag: whole windows of tiles.
//
// NOTES: blocks take tickets, one for each tile and ``lag`` more. A ticket says: make this tile, and lift that of ``lag``
// tickets before. To lift, a block may have to wait for tiles of tickets lower than its own, which running blocks hold,
// so that the lowest ticket never waits, whatever else runs on the GPU.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
log_mel(const sample_t* __restrict__ samples, const long long* __restrict__ offsets, const int* __restrict__ lengths,
        const float2* __restrict__ hann, const float4* __restrict__ twiddles, const int4* __restrict__ steps,
        output_t* out, float* least, int* state, int windows, int lag, int n_mels, int part_steps) {
    extern __shared__ __align__(16) char shared[];
    float4* exchange = reinterpret_cast<float4*>(shared);                // [20 bins][10 pairs of columns][PAIRS]
    char* sample_bytes = shared + EXCHANGE_BYTES;
    float2* power = reinterpret_cast<float2*>(shared + EXCHANGE_BYTES);  // [200 bins][PAIRS]
    int* shared_ticket = reinterpret_cast<int*>(power);
    // in the exchange's place, once it is read
    float2* warp_ranges = reinterpret_cast<float2*>(shared);
    Lift* shared_lift = reinterpret_cast<Lift*>(shared + 128);
    half_t* rows = reinterpret_cast<half_t*>(shared + 256);  // [TILE_FRAMES][n_mels + 2], against bank conflicts

    const Progress progress = {state, state + 1, state + 1 + windows};

    if (thread_in_block() == 0) *shared_ticket = atomicAdd(progress.next_ticket, 1);
    __syncthreads();
    int ticket = *shared_ticket, to_announce = -1;  // to_announce: the window of the tile made before
    Tile tile = tile_of(ticket, windows, samples, offsets, lengths);
    uint4 ahead[ROUNDS];
    fetch(ahead, tile);
    __syncthreads();

    while (ticket < windows * TILES + lag) {
        if (tile.whole) put(sample_bytes, ahead);
        else if (tile.sounds) put_by_sample(sample_bytes, tile);
        const bool sounds = tile.sounds;
        __syncthreads();
        if (to_announce >= 0 && thread_in_block() == 0) announce(progress, to_announce);
        if (sounds) {
            first_pass(exchange, sample_bytes, hann, twiddles);
            __syncthreads();
        }
        int next = 0;
        if (thread_in_block() == 0) next = atomicAdd(progress.next_ticket, 1);
        if (sounds) second_pass(power, exchange);
        if (thread_in_block() == 0) *shared_ticket = next;
        __syncthreads();

        next = *shared_ticket;
        tile = tile_of(next, windows, samples, offsets, lengths);
        fetch(ahead, tile);
        const int lifted = ticket - lag, lifted_window = lifted / TILES, lifted_tile = lifted % TILES;
        if (lifted >= 0 && thread_in_block() == 0) {
            const int sounding = tiles_with_sound(__ldg(&lengths[lifted_window]));
            while (load_relaxed(&progress.done[lifted_window]) < sounding) __nanosleep(100);
            const float greatest = __int_as_float(load_relaxed(&progress.greatest[lifted_window])) + (SILENCE - 1.0f);
            const int low = load_relaxed(reinterpret_cast<const int*>(&least[lifted_window * TILES + lifted_tile]));
            const float floor = fmaxf(greatest, SILENCE) - RANGE;
            shared_lift->floor = floor;
            shared_lift->what = lifted_tile >= sounding ? Lift::SILENT : __int_as_float(low) < floor ? Lift::LOW : Lift::NO;
        }
        const int window = ticket / TILES, index = ticket % TILES;
        if (sounds)
            bands(out, rows, warp_ranges, reinterpret_cast<const float*>(power), steps, window, index, n_mels, part_steps);
        __syncthreads();

        to_announce = -1;
        if (sounds) {
#if FRAMES_FIRST
            const int words = n_mels / 2, frames = min(TILE_FRAMES, FRAMES - index * TILE_FRAMES);
            half2_t* to = reinterpret_cast<half2_t*>(out) + (size_t(window) * FRAMES + index * TILE_FRAMES) * words;
            for (int i = thread_in_block(); i < frames * words; i += THREADS)
                to[i] = reinterpret_cast<const half2_t*>(rows)[i + i / words];  // a row is a word longer in shared memory
#endif
            if (thread_in_block() == 0) {
                float2 range = warp_ranges[0];
#pragma unroll
                for (int i = 1; i < WARPS; ++i)
                    range = make_float2(fminf(range.x, warp_ranges[i].x), fmaxf(range.y, warp_ranges[i].y));
                least[window * TILES + index] = range.x;
                atomicMax(&progress.greatest[window], __float_as_int(range.y - (SILENCE - 1.0f)));
            }
            to_announce = window;
        }
        if (lifted >= 0 && shared_lift->what != Lift::NO)
            lift(out, lifted_window, lifted_tile, n_mels, shared_lift->floor, shared_lift->what == Lift::SILENT);
        ticket = next;
    }
    __syncthreads();
    if (to_announce >= 0 && thread_in_block() == 0) announce(progress, to_announce);
}
