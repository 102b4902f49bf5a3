// Self-attention of Whisper's encoder on Hopper, in the manner of FlashAttention-3 (Shah et al., 2024): one warp only
// copies (by tensor maps, through rings of buffers), CONSUMERS warpgroups of 64 query rows each multiply and take
// exponentials. qkv [batch, positions, 3, heads, 64] and out [batch, positions, heads, 64], FP16, are known through the
// maps alone.
//
// A block is persistent: it goes through its tiles (64 · CONSUMERS queries of one head) as if they were one long row of
// key blocks, so that the products of the next tile's first scores are under way before this tile is finished, and no
// tile begins or ends with idle matrix units.
#include "hopper.cuh"

constexpr int WIDTH = 64;  // of a head
constexpr int KEYS = 128;  // and values, at a time
constexpr int STAGES = 4;  // of the ring that they come through
constexpr int ROWS = 64 * CONSUMERS;
constexpr int ROW_BYTES = WIDTH * 2;
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr unsigned Q_BYTES = ROWS * ROW_BYTES, KEYS_BYTES = KEYS * ROW_BYTES, SLICE_BYTES = 64 * ROW_BYTES;
constexpr float SCALE = 0.125f * LOG2_E;  // of scores, for powers of two

// What the producer does not need goes to the consumers, whose threads hold 64 scores, 32 words of weights and 32 sums.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 24, CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 240;

// Barriers, in bytes from the first.
constexpr unsigned Q_FULL = 0, Q_EMPTY = Q_FULL + 2 * 8, KV_FULL = Q_EMPTY + 2 * 8, KV_EMPTY = KV_FULL + STAGES * 8,
                   TURN = KV_EMPTY + STAGES * 8;

// A warp lets the next one begin its exponentials when it has so many words of two weights to go: about as many as it
// takes until the next one has noticed.
constexpr int WORDS_LEFT = 6;

DEVICE void load_tile(unsigned shared, const TensorMap* map, unsigned barrier, int slot, int position, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(shared), "l"(map), "r"(barrier), "r"(0), "r"(slot), "r"(position), "r"(batch)
        : "memory");
}

DEVICE void store_tile(const TensorMap* map, unsigned shared, int slot, int position, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(shared), "r"(0), "r"(slot), "r"(position), "r"(batch)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

DEVICE void stores_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void stores_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Of one warpgroup; 0 is the block's.
DEVICE void named_wait(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

DEVICE void store_shared(unsigned address, half2_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A matrix operand of 128-byte rows with the 128-byte swizzle; 1024 bytes from one group of 8 rows to the next. This
// describes both rows along the inner dimension (Q and K) and across it (V, where the instruction transposes).
DEVICE unsigned long long operand(unsigned shared) {
    return (unsigned long long)((shared & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// scores [64 × 128] (+)= q [64 × 16] · k [128 × 16]ᵀ
template <bool ADD>
DEVICE void multiply_keys(float (&s)[64], unsigned long long q, unsigned long long k) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, 0;\n}\n"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
          "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
          "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
          "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]),
          "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]), "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63])
        : "l"(q), "l"(k), "n"(ADD));
}

// o [64 × 64] += p [64 × 16, registers] · v [16 × 64]
DEVICE void multiply_values(float (&o)[32], const unsigned* p, unsigned long long v) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}\n"
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]), "+f"(o[7]), "+f"(o[8]),
          "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]), "+f"(o[14]), "+f"(o[15]), "+f"(o[16]),
          "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]), "+f"(o[21]), "+f"(o[22]), "+f"(o[23]), "+f"(o[24]),
          "+f"(o[25]), "+f"(o[26]), "+f"(o[27]), "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31])
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

// Keeps the compiler from using an accumulator before the wait in front of this has come back.
template <int N>
DEVICE void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// The largest score of each of the two rows that a thread sees.
DEVICE void maxima(float (&found)[2], const float (&s)[KEYS / 2]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float high[2] = {s[2 * row], s[2 * row + 1]};
#pragma unroll
        for (int i = 1; i < KEYS / 8; i++) {
            high[0] = fmaxf(high[0], s[4 * i + 2 * row]);
            high[1] = fmaxf(high[1], s[4 * i + 2 * row + 1]);
        }
        found[row] = warp_max<4>(fmaxf(high[0], high[1]));
    }
}

// Scores to weights 2^(SCALE · (s - top)), added to this thread's part of the rows' sums and packed in the order in
// which the products take them from registers. ``pass`` is called near the end, with a word of weights.
template <typename Pass>
DEVICE void to_weights(unsigned (&p)[KEYS / 4], const float (&s)[KEYS / 2], const float (&top)[2], float (&sum)[2],
                       Pass pass) {
    const float shift[2] = {-top[0] * SCALE, -top[1] * SCALE};
    float part[2][2] = {};
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const float x = exp2_approximate(fmaf(s[2 * i], SCALE, shift[i % 2]));
        const float y = exp2_approximate(fmaf(s[2 * i + 1], SCALE, shift[i % 2]));
        part[i % 2][0] += x;
        part[i % 2][1] += y;
        p[i] = to_half2(x, y);
        if (i == KEYS / 4 - 1 - WORDS_LEFT) pass(p[i]);
    }
    sum[0] += part[0][0] + part[0][1];
    sum[1] += part[1][0] + part[1][1];
}

struct Tile {
    int batch, head, row;

    // NOTES: a head's tiles lie one after the other, so that the blocks at work share its keys and values in L2.
    DEVICE Tile(int index, int row_tiles, int heads) {
        row = index % row_tiles * ROWS;
        index /= row_tiles;
        head = index % heads;
        batch = index / heads;
    }
};

// Place in a ring of buffers, and the parity of its barriers there.
struct Place {
    int stage = 0, parity = 0;

    template <int COUNT>
    DEVICE void next() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    encoder_attention_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map,
                           const __grid_constant__ TensorMap out_map, int positions, int heads, int row_tiles,
                           int tiles, unsigned zero /* 0, which the compiler must not know */) {
    extern __shared__ char memory[];
    const unsigned q_at = (shared_address(memory) + 1023) & ~1023u;  // the swizzle counts from multiples of 1024
    const unsigned k_at = q_at + 2 * Q_BYTES, v_at = k_at + STAGES * KEYS_BYTES, out_at = v_at + STAGES * KEYS_BYTES;
    const unsigned barriers = out_at + Q_BYTES;
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);  // known to be the same for all of a warp
    const int blocks = ceil_div(positions, KEYS);

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(barriers + Q_FULL + 8 * i, 1);
            barrier_init(barriers + Q_EMPTY + 8 * i, 4 * CONSUMERS);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + KV_FULL + 8 * i, 1);
            barrier_init(barriers + KV_EMPTY + 8 * i, 4 * CONSUMERS);
        }
        for (int i = 0; i < 4 * CONSUMERS; i++) barrier_init(barriers + TURN + 8 * i, 1);
        barrier_init_fence();
    }
    __syncthreads();

    if (group == 0) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            Place q, kv;
            for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
                const Tile tile(index, row_tiles, heads);
                barrier_wait(barriers + Q_EMPTY + 8 * q.stage, q.parity ^ 1);
                barrier_expect(barriers + Q_FULL + 8 * q.stage, Q_BYTES);
                load_tile(q_at + q.stage * Q_BYTES, &q_map, barriers + Q_FULL + 8 * q.stage, tile.head, tile.row,
                          tile.batch);
                q.next<2>();
                for (int block = blocks - 1; block >= 0; block--) {  // the last first: it alone has keys to mask
                    const unsigned full = barriers + KV_FULL + 8 * kv.stage, offset = kv.stage * KEYS_BYTES;
                    barrier_wait(barriers + KV_EMPTY + 8 * kv.stage, kv.parity ^ 1);
                    barrier_expect(full, 2 * KEYS_BYTES);
                    load_tile(k_at + offset, &kv_map, full, heads + tile.head, block * KEYS, tile.batch);
                    load_tile(v_at + offset, &kv_map, full, 2 * heads + tile.head, block * KEYS, tile.batch);
                    kv.next<STAGES>();
                }
            }
        }
    } else {
        registers_take<CONSUMER_REGISTERS>();
        const int consumer = group - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = threadIdx.x % 32;
        const unsigned slice = consumer * SLICE_BYTES;
        const int last_keys = positions - (blocks - 1) * KEYS;
        const int steps = ceil_div(tiles - int(blockIdx.x), int(gridDim.x)) * blocks;  // of one block of keys each
        float s[KEYS / 2], o[32], top[2], sum[2], found[2] = {};
        unsigned p[KEYS / 4];
        Place q, kv;
        int v_stage = 0;

        // NOTES: a score costs the exponential units as much time as the matrix units: neither may wait for the other.
        // The warps of one scheduler (one of each consumer) take their exponentials in turn; while one does, the others
        // have products, maxima and results to see to.
        const unsigned turn = barriers + TURN + 8 * (4 * consumer + warp);
        const unsigned next_turn = barriers + TURN + 8 * (4 * ((consumer + 1) % CONSUMERS) + warp);
        unsigned turn_parity = consumer == 0;  // the first to begin waits for nobody
        auto wait_turn = [&] {
            barrier_wait(turn, turn_parity);
            turn_parity ^= 1;
        };
        auto pass_turn = [&](unsigned weights) {  // needing them keeps the compiler from moving this up
            if (lane == 0) barrier_arrive(next_turn + (weights & zero));
        };

        auto multiply_next_keys = [&] {
            const unsigned long long a = operand(q_at + q.stage * Q_BYTES + slice);
            const unsigned long long b = operand(k_at + kv.stage * KEYS_BYTES);
            multiply_keys<false>(s, a, b);
            multiply_keys<true>(s, a + 2, b + 2);  // 16 elements on: 32 bytes, in units of 16
            multiply_keys<true>(s, a + 4, b + 4);
            multiply_keys<true>(s, a + 6, b + 6);
            products_commit();
        };
        auto multiply_next_values = [&] {
            const unsigned long long b = operand(v_at + v_stage * KEYS_BYTES);
#pragma unroll
            for (int i = 0; i < KEYS / 16; i++) multiply_values(o, p + 4 * i, b + 128 * i);  // 16 rows on: 2048 bytes
            products_commit();
        };
        auto mask = [&] {  // of a tile's first block, which holds the last keys
            if (last_keys < KEYS) {
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++)
                    if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= last_keys) s[i] = -infinity();
            }
        };
        auto begin_tile = [&] {
            top[0] = found[0];
            top[1] = found[1];
            sum[0] = sum[1] = 0.f;
#pragma unroll
            for (int i = 0; i < 32; i++) o[i] = 0.f;
        };
        auto finish_tile = [&](int index) {
            const Tile tile(index, row_tiles, heads);
            const unsigned staged = out_at + slice;
            float inverse[2];
#pragma unroll
            for (int row = 0; row < 2; row++) inverse[row] = reciprocal(warp_sum<4>(sum[row]));
            if (thread == 0) stores_wait_read();  // the store before this one has left the buffer
            named_wait(1 + consumer);
            const unsigned at = staged + warp * 16 * ROW_BYTES + lane / 4 * ROW_BYTES + lane % 4 * 4;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const unsigned chunk = (i ^ lane / 4) * 16;
                store_shared(at + chunk, to_half2(o[4 * i] * inverse[0], o[4 * i + 1] * inverse[0]));
                store_shared(at + chunk + 8 * ROW_BYTES,
                             to_half2(o[4 * i + 2] * inverse[1], o[4 * i + 3] * inverse[1]));
            }
            shared_stores_fence();
            named_wait(1 + consumer);
            const int row = tile.row + 64 * consumer;
            if (thread == 0 && row < positions) store_tile(&out_map, staged, tile.head, row, tile.batch);
        };

        barrier_wait(barriers + Q_FULL, 0);
        barrier_wait(barriers + KV_FULL, 0);
        hold(s);
        products_fence();
        multiply_next_keys();
        products_wait<0>();
        hold(s);
        mask();
        maxima(found, s);
        begin_tile();
        to_weights(p, s, top, sum, [](unsigned) {});

        // NOTES: in each step the scores of one block are multiplied and the values of the block before, so that the
        // matrix units have work during the maxima, and what waits for the values finds them.
        int index = blockIdx.x, block = blocks - 1;  // of the weights in p
#pragma unroll 1
        for (int step = 1; step < steps; step++) {
            const bool next_tile = block == 0;
            if (next_tile) {  // the scores of block 0 are done, and so is this tile's Q
                if (lane == 0) barrier_arrive(barriers + Q_EMPTY + 8 * q.stage);
                q.next<2>();
                barrier_wait(barriers + Q_FULL + 8 * q.stage, q.parity);
            }
            v_stage = kv.stage;
            kv.next<STAGES>();
            barrier_wait(barriers + KV_FULL + 8 * kv.stage, kv.parity);
            hold(s);
            hold(o);
            products_fence();
            multiply_next_keys();
            multiply_next_values();
            products_wait<1>();
            hold(s);
            if (next_tile) mask();
            maxima(found, s);
            const float old[2] = {top[0], top[1]};
            if (next_tile) {
                products_wait<0>();
                hold(o);
                finish_tile(index);
                begin_tile();
                index += gridDim.x;
                block = blocks;
            } else {
                // NOTES: any top serves, as long as nothing overflows: it follows the true maximum only when that has
                // grown by more than a factor of 2^8, so that the accumulator is hardly ever touched.
#pragma unroll
                for (int row = 0; row < 2; row++)
                    top[row] = (found[row] - top[row]) * SCALE > 8.f ? found[row] : top[row];
            }
            block--;
            wait_turn();
            // NOTES: the values are long since there. Before the turn, the compiler would move this to the wait above.
            products_wait<0>();
            hold(o);
            hold(s);
            if (lane == 0) barrier_arrive(barriers + KV_EMPTY + 8 * v_stage);
            if (!next_tile && __any_sync(ALL_LANES, top[0] != old[0] || top[1] != old[1])) {
                float factor[2];
#pragma unroll
                for (int row = 0; row < 2; row++) {
                    factor[row] = exp2_approximate((old[row] - top[row]) * SCALE);
                    sum[row] *= factor[row];
                }
#pragma unroll
                for (int i = 0; i < 32; i++) o[i] *= factor[i / 2 % 2];
            }
            to_weights(p, s, top, sum, pass_turn);
        }
        v_stage = kv.stage;
        hold(o);
        products_fence();
        multiply_next_values();
        products_wait<0>();
        hold(o);
        finish_tile(index);
        if (thread == 0) stores_wait();
    }
}
