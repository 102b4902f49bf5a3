// y [rows, n] = x [rows, k] · weightᵀ [n, k] + bias, FP16 with sums in FP32, on Hopper, with what follows a linear
// layer of Whisper's encoder done on the way out.
//
// A block is persistent. One of its warps only copies (by tensor maps, through a ring of STAGES buffers, each of 64
// columns of a tile's x and weight), two warpgroups only multiply. Together they make one tile after another (PINGPONG
// 0), or each its own (PINGPONG 1), so that one is on its way out while the other is multiplied: CUTLASS's cooperative
// and ping-pong schedules. The blocks of a cluster make tiles one below the other, and each brings a part of the
// weight's tile, which they share, to all of them.
#include "hopper.cuh"

#define OUT_HALF 0      // out [rows, n] FP16 = y
#define OUT_GELU 1      // out [rows, n] FP16 = GELU(y)
#define OUT_RESIDUAL 2  // out [rows, n] FP32 += y

#ifndef OUT
#define OUT OUT_HALF
#endif
#ifndef PINGPONG
#define PINGPONG 1
#endif
#ifndef GROUP_ROWS  // of a tile, that one warpgroup makes
#define GROUP_ROWS 128
#endif
#ifndef TILE_N
#define TILE_N 128
#endif
#ifndef STAGES
#define STAGES 6
#endif
#ifndef SLABS  // of shared memory that a warp has to send from
#define SLABS 2
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif

// NOTES: clusters' tiles down x that are made next to each other, before the next columns of y. The order decides what
// blocks that run together read together; measured, 2 to 8 are alike to 5 %, 1 and from 13 on cost up to a third.
constexpr int BAND = 2;
constexpr int TILE_M = PINGPONG ? GROUP_ROWS : 2 * GROUP_ROWS;
constexpr int TILE_K = 64, ROW_BYTES = 128;
constexpr int PARTS = GROUP_ROWS / 64;
constexpr int THREADS = 3 * 128;
constexpr unsigned X_BYTES = TILE_M * ROW_BYTES, W_BYTES = TILE_N * ROW_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr unsigned SLAB_BYTES = 16 * ROW_BYTES;  // what a warp sends at once
constexpr unsigned FULL = 0, EMPTY = 8 * STAGES, TURN = 16 * STAGES;  // barriers, from the first one's address
constexpr int CONSUMERS = PINGPONG ? 1 : 2;  // warpgroups that read a stage
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

// d [64 × 128] (+)= a [64 × 16] · b [128 × 16]ᵀ
DEVICE void multiply(float (&d)[64], unsigned long long a, unsigned long long b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
}

// d [64 × 256] (+)= a [64 × 16] · b [256 × 16]ᵀ
DEVICE void multiply(float (&d)[128], unsigned long long a, unsigned long long b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
        "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "
        "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, "
        "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "
        "%123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),
          "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),
          "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),
          "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),
          "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]),
          "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]),
          "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]),
          "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]),
          "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(add));
}

// A matrix operand in shared memory: rows of 128 bytes with the 128-byte swizzle, 1024 bytes from 8 rows to the next 8.
DEVICE unsigned long long operand(unsigned shared) {
    return (unsigned long long)((shared & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// x · Φ(x), with Φ the normal distribution's function, as max(x, 0) - |x| · Φ(-|x|): log2 Φ(-a) is so smooth that a
// polynomial of degree 5 gives it (fitted to the least largest error in steps of the rounded result). Off by at most
// 1.4e-5, and by less than 0.17 of FP16's step at the result, where rounding may take 0.5.
DEVICE float gelu(float x) {
    float a = fabsf(x);
    float p = fmaf(a, -0.0003295727f, 0.0059123f);
    p = fmaf(p, a, -0.04851186f);
    p = fmaf(p, a, -0.46376216f);
    p = fmaf(p, a, -1.1493413f);
    p = fmaf(p, a, -1.0001187f);
    return fmaf(-a, exp2_approximate(p), fmaxf(x, 0.f));
}

DEVICE half2_t load_pair(const half_t* address) {
    half2_t pair;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(pair) : "l"(address));
    return pair;
}

// The tiles in the order in which they are made: bands of BAND clusters' tiles down x, all of weight for each.
struct Tiles {
    int down, across;  // in clusters' tiles

    DEVICE Tiles(int rows, int n) : down(ceil_div(rows, TILE_M * CLUSTER)), across(ceil_div(n, TILE_N)) {}
    DEVICE int count() const { return down * across; }
    DEVICE int2 first(int tile, int rank) const {  // row and column of y
        int band = tile / (BAND * across), within = tile - band * BAND * across;
        int height = min(BAND, down - band * BAND);
        int column = within / height, row = band * BAND + within - column * height;
        return make_int2((row * CLUSTER + rank) * TILE_M, column * TILE_N);
    }
};

// Tells the cluster's block ``rank`` that this warp has read the stage of ``step``, which that block's copies fill too.
DEVICE void release(unsigned barriers, unsigned step, unsigned rank) {
    unsigned empty = barriers + EMPTY + 8 * (step % STAGES);
    if (CLUSTER == 1)
        barrier_arrive(empty);
    else
        barrier_arrive_at(empty, rank);
}

// Sends a warp's 16 rows of sums, from column ``first`` of y on, through its slabs of shared memory.
struct Outlet {
    const TensorMap* map;
    unsigned slabs, lane, turn;

    DEVICE unsigned free_slab() {
        if (lane == 0) stores_wait_read<SLABS - 1>();
        __syncwarp();
        return slabs + (turn++ % SLABS) * SLAB_BYTES;
    }

    DEVICE void send(unsigned slab, int row, int column) {
        shared_stores_fence();
        __syncwarp();
        if (lane == 0) {
            if (OUT == OUT_RESIDUAL)
                add_tile_2d(map, slab, column, row);
            else
                store_tile_2d(map, slab, column, row);
            stores_commit();
        }
    }

    DEVICE void halves(const float (&y)[TILE_N / 2], const half2_t (&bias)[TILE_N / 8], int row, int first, int n) {
        unsigned line = lane % 16, unit = lane / 16;
#pragma unroll
        for (int chunk = 0; chunk < TILE_N / 64; ++chunk) {
            if (first + chunk * 64 >= n) break;
            unsigned to = free_slab();
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                half2_t packed[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int block = chunk * 8 + pair * 2 + i / 2;
                    float2 b = to_float2(bias[block]);
                    float low = y[block * 4 + i % 2 * 2] + b.x, high = y[block * 4 + i % 2 * 2 + 1] + b.y;
                    packed[i] = OUT == OUT_GELU ? to_half2(gelu(low), gelu(high)) : to_half2(low, high);
                }
                store_matrices(to + line * ROW_BYTES + ((pair * 2 + unit) ^ line % 8) * 16, packed[0], packed[1],
                               packed[2], packed[3]);
            }
            send(to, row, first + chunk * 64);
        }
    }

    DEVICE void floats(const float (&y)[TILE_N / 2], const half2_t (&bias)[TILE_N / 8], int row, int first, int n) {
        unsigned line = lane / 4, quarter = lane % 4, odd = line % 2 * 2;
#pragma unroll
        for (int chunk = 0; chunk < TILE_N / 32; ++chunk) {
            if (first + chunk * 32 >= n) break;
            unsigned to = free_slab();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // NOTES: odd rows take the blocks in another order, so that the 4 rows a half warp stores lie in
                // different banks; the swizzle alone leaves two in the same ones.
                int even_block = chunk * 4 + i, odd_block = chunk * 4 + (i ^ 2);
                float2 b = to_float2(odd ? bias[odd_block] : bias[even_block]);
                unsigned unit = 2 * (i ^ odd) + quarter / 2;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float low = odd ? y[odd_block * 4 + half * 2] : y[even_block * 4 + half * 2];
                    float high = odd ? y[odd_block * 4 + half * 2 + 1] : y[even_block * 4 + half * 2 + 1];
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                                     to + (line + half * 8) * ROW_BYTES + (unit ^ line) * 16 + quarter % 2 * 8),
                                 "f"(low + b.x), "f"(high + b.y)
                                 : "memory");
                }
            }
            send(to, row, first + chunk * 32);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
           const __grid_constant__ TensorMap out, const half_t* bias, int rows, int n, int k) {
    extern __shared__ char memory[];
    unsigned stages = (shared_address(memory) + 1023) & ~1023u;
    unsigned slabs = stages + STAGES * STAGE_BYTES, barriers = slabs + 8 * SLABS * SLAB_BYTES;
    unsigned warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    unsigned rank = CLUSTER == 1 ? 0 : cluster_rank();
    int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    Tiles tiles(rows, n);
    unsigned blocks = k / TILE_K;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(barriers + FULL + 8 * stage, 1);
            barrier_init(barriers + EMPTY + 8 * stage, CONSUMERS * 4 * CLUSTER);  // a lane of each warp that reads it
        }
        for (int group = 0; group < 2; ++group) barrier_init(barriers + TURN + 8 * group, 4);
        barrier_init_fence();
    }
    if (CLUSTER == 1)
        __syncthreads();
    else
        cluster_sync();

    if (warp < 4) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            unsigned step = 0;
            for (int tile = cluster; tile < tiles.count(); tile += clusters) {
                int2 first = tiles.first(tile, rank);
#pragma unroll 1
                for (unsigned block = 0; block < blocks; ++block, ++step) {
                    unsigned stage = step % STAGES, to = stages + stage * STAGE_BYTES;
                    unsigned full = barriers + FULL + 8 * stage;
                    barrier_wait(barriers + EMPTY + 8 * stage, (step / STAGES & 1) ^ 1);
                    // NOTES: the sums are taken in L2, which without this waits for what it adds to. It pays where one
                    // tile is on its way out while another is multiplied, and costs where they take turns.
                    if (OUT == OUT_RESIDUAL && PINGPONG) {
                        constexpr unsigned DOWN = TILE_M / 16, ACROSS = TILE_N / 32;
                        for (unsigned i = block * DOWN * ACROSS / blocks; i < (block + 1) * DOWN * ACROSS / blocks; ++i)
                            prefetch_tile_2d(&out, first.y + i % ACROSS * 32, first.x + i / ACROSS * 16);
                    }
                    barrier_expect(full, STAGE_BYTES);
                    copy_tile_2d(to, &x, full, block * TILE_K, first.x);
                    if (CLUSTER == 1)
                        copy_tile_2d(to + X_BYTES, &weight, full, block * TILE_K, first.y);
                    else
                        copy_tile_2d_to((1 << CLUSTER) - 1, to + X_BYTES + rank * (W_BYTES / CLUSTER), &weight, full,
                                        block * TILE_K, first.y + rank * (TILE_N / CLUSTER));
                }
            }
        }
    } else {
        registers_take<CONSUMER_REGISTERS>();
        int group = warp / 4 - 1;
        Outlet outlet{&out, slabs + (warp - 4) * SLABS * SLAB_BYTES, lane, 0};
        unsigned step = PINGPONG ? group * blocks : 0, made = 0;
        for (int tile = cluster + (PINGPONG ? group * clusters : 0); tile < tiles.count();
             tile += PINGPONG ? 2 * clusters : clusters) {
            int2 first = tiles.first(tile, rank);
            half2_t pairs[TILE_N / 8];
#pragma unroll
            for (int i = 0; i < TILE_N / 8; ++i) {
                int column = first.y + i * 8 + lane % 4 * 2;
                pairs[i] = bias && column < n ? load_pair(bias + column) : 0;
            }
            float y[PARTS][TILE_N / 2];
            // NOTES: waiting by parity tells a phase from its neighbours only, so no group may wait for its tile's
            // stages before the other is past all of its own.
            if (PINGPONG) barrier_wait(barriers + TURN + 8 * group, (made++ & 1) ^ (group == 0));
            for (unsigned block = 0; block < blocks; ++block, ++step) {
                unsigned stage = step % STAGES, at = stages + stage * STAGE_BYTES;
                barrier_wait(barriers + FULL + 8 * stage, step / STAGES & 1);
                unsigned long long a = operand(at + (PINGPONG ? 0 : group * GROUP_ROWS * ROW_BYTES));
                unsigned long long b = operand(at + X_BYTES);
                products_fence();
#pragma unroll
                for (int i = 0; i < TILE_K / 16; ++i)
#pragma unroll
                    for (int part = 0; part < PARTS; ++part)
                        multiply(y[part], a + i * 2 + part * (64 * ROW_BYTES / 16), b + i * 2, (block | i) != 0);
                products_commit();
                products_wait<1>();  // the block before has been read
                if (block > 0 && lane < CLUSTER) release(barriers, step - 1, lane);
            }
            if (PINGPONG && lane == 0) barrier_arrive(barriers + TURN + 8 * (1 - group));
            products_wait<0>();
            if (lane < CLUSTER) release(barriers, step - 1, lane);
            if (PINGPONG) step += blocks;
            int row = first.x + (PINGPONG ? 0 : group * GROUP_ROWS) + warp % 4 * 16;
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                if (OUT == OUT_RESIDUAL)
                    outlet.floats(y[part], pairs, row + part * 64, first.y, n);
                else
                    outlet.halves(y[part], pairs, row + part * 64, first.y, n);
        }
        if (lane == 0) stores_wait_read<0>();
    }
    if (CLUSTER > 1) cluster_sync();  // no block ends while another may still copy to it or arrive at its barriers
}
