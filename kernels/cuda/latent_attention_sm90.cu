// Latent cross-attention on Hopper: attention of one query a head over the encoder state itself, which is keys and
// values at once.
//
//     scores[h, k] = query[h] · x[k]        weights = softmax over k        out[h] = Σ_k weights[h, k] x[k]
//
// with x [1500, WIDTH], read once from memory for all heads. Compiled with
//   WIDTH, HEADS  the model's            KEYS    positions of x in one tile      STAGES  tiles in shared memory
//   BITS          16: x is FP16. 8: x is bytes (128 stands for 0) with one FP16 scale for each 64 columns
//
// A block works off a run of tiles, which may cross windows; what it has of a window that it does not hold whole goes
// into ``partial``. Where few blocks share a window, the last one to finish puts their parts together; else
// latent_attention_combine does.
//
// NOTES: each step of a tile is a chain of waits, so the steps of different tiles run side by side in different warps.
// Four warps turn tiles into weights: each multiplies a quarter of the columns with its part of the queries, which
// stays in registers; the partial scores meet in shared memory. Eight warps sum tiles by these weights, each an eighth
// of the columns, in registers. The copy engine brings tiles into a ring ahead of both. Both kinds of warps make FP16
// of bytes in registers, as they need it: the two products want different neighbours in a register anyway.
#include "latent_scores.cuh"
#include "latent_sums.cuh"

// queries, out: FP16, head h of window w at w · window_stride + h · head_stride, multiples of 8
// arrivals: see join; null where latent_attention_combine follows
extern "C" __global__ void __launch_bounds__(THREADS, 1)
latent_attention_sm90(const __grid_constant__ TensorMap states_map,
#if BITS == 8
                      const __grid_constant__ TensorMap scales_map,
#endif
                      const half_t* queries, half_t* out, half_t* partial_out, float2* partial_sums,
                      unsigned* arrivals, int windows, int window_stride, int head_stride, float scale_log2) {
    extern __shared__ char memory[];
    Run run;
    run.tiles = windows * TILES;
    run.begin = run_begin(blockIdx.x, run.tiles, gridDim.x);
    run.end = run_begin(blockIdx.x + 1, run.tiles, gridDim.x);
    run.shared = memory + (-shared_address(memory) & 1023);
    run.barriers = shared_address(run.shared + BARRIERS_AT);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            // NOTES: each lane arrives by itself. One for its warp would do and is hardly faster, but racecheck does not
            // see that it speaks for the others.
            barrier_init(run.barrier(FULL, i), 1);
            barrier_init(run.barrier(WEIGHED, i), SCORE_WARPS * 32);
            barrier_init(run.barrier(EMPTY, i), SUM_WARPS * 32);
        }
        barrier_init_fence();
    }
    // heads that the model does not have weigh nothing
    for (int i = threadIdx.x; i < STAGES * PADDED_HEADS * WEIGHT_PITCH; i += THREADS) run.weights(0)[i] = 0;
    for (int i = threadIdx.x; i < 2 * STAGES * PADDED_HEADS; i += THREADS) run.rescales(0)[i] = 1.0f;
    __syncthreads();

    auto load = [&](int index, int stage) {
        const Tile tile(index);
        const unsigned full = run.barrier(FULL, stage);
        barrier_expect(full, TILE_BYTES + (BITS == 8 ? SCALES_BYTES : 0));
        copy_tile_4d(shared_address(run.tile(stage)), &states_map, full, 0, tile.first, 0, tile.window);
#if BITS == 8
        copy_tile_3d(shared_address(run.scales(stage)), &scales_map, full, tile.first, 0, tile.window);
#endif
    };
    if (threadIdx.x < SCORE_WARPS * 32) {
        registers_take<SCORE_REGISTERS>();
        weigh(run, queries, partial_sums, window_stride, head_stride, scale_log2);
    } else {
        registers_give<SUM_REGISTERS>();
        if (threadIdx.x == SCORE_WARPS * 32)
            for (int i = 0; i < STAGES && run.begin + i < run.end; i++) load(run.begin + i, i);
        __syncwarp();
        sum(run, out, partial_out, partial_sums, arrivals, window_stride, head_stride, load);
    }
}
