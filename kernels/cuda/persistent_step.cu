// One decoding step of a few slots as one kernel: the whole loop over the layers, by blocks that stay.
//
// A step of one window is bound by reading the weights once; as some five hundred launches it takes three times that,
// because each begins with nothing on its way. Here each block, one a multiprocessor, has its share of every product's
// rows, and the step is a sequence of eight phases a layer, each of which needs numbers that other blocks have computed
// in the one before.
//
// Memory does not wait for them: some warps do nothing but bring the block's weights, in the order in which they will
// be used and as far ahead as shared memory holds them (half a layer), and before a phase's input arrives its weights
// lie in registers. So the step takes the longer of the two times, that of memory and that of the waits, not their sum.
//
// A wait is for the numbers themselves: no barriers, no counters, no fences. Each word that blocks exchange tells by
// its last bit whether it is this layer's or still that of the layer before: the bit turns with each use. Who needs a
// word reads it until the bit is right, so that a wait costs a write to the L2 cache and a read of it. A place is
// written again a layer later. By then all have read it. For each block has some rows of every product, and gives their
// results after it has read what came before; and no block goes on without all of some products' results:
//   qkv, mixed, residual[0]: read before the block gives to residual[1], for all of which each waits
//   query, parts, residual[1], inner: read before the block gives to residual[2], for all of which each waits
//   residual[2]: read before the block gives to residual[0], for all of which each waits
// and the next layer's words come after that. Between steps stands the kernel's end.
//
// Cross-attention reads ready keys and values: for few windows they are fewer bytes than the encoder state with the two
// products that latent cross-attention needs instead.
//
// Compiled with WIDTH, BLOCKS (the grid), SLOTS and EXCHANGE (bytes of the memory for what they exchange).
#include "persistent_attention.cuh"
#include "persistent_products.cuh"

DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }

DEVICE void bring(Shared& shared, int warp, int n_layer, const half_t* tokens_table, int n_vocab) {
    Memory memory(shared, warp);
    const int unit = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
#pragma unroll 1
    for (int l = 0; l < n_layer; l++) {
        const Layer& layer = shared.layers[l];
        memory.product<Qkv>(layer.qkv_weight);
        memory.product<Square>(layer.self_out_weight);
        memory.product<Square>(layer.query_weight);
        if (unit < UNITS) {
            const int end = min((split + 1) * SPLIT, ENCODED);
#pragma unroll 1
            for (int at = split * SPLIT; at < end; at += ROUND) {
                const long long from = ((long long)unit * ENCODED + at) * 64;
                memory.positions(layer.cross_keys + from, layer.cross_values + from, min(ROUND, end - at));
            }
        }
        memory.product<Square>(layer.cross_out_weight);
        memory.product<Up>(layer.up_weight);
        memory.product<Down>(layer.down_weight);
    }
    const int end = (long long)(blockIdx.x + 1) * n_vocab / BLOCKS;
#pragma unroll 1
    for (int at = (long long)blockIdx.x * n_vocab / BLOCKS; at < end; at += 16)
        memory.rows<Vocabulary>(tokens_table + (long long)at * WIDTH, min(16, end - at));
}

// What a block that computes keeps from phase to phase
struct Step {
    Shared& shared;
    Stream stream;
    Exchange* exchange_;
    unsigned bit;
    float means[SLOTS] = {};

    DEVICE Step(Shared& shared_, Exchange* exchange) : shared(shared_), stream(shared_), exchange_(exchange) {}

    // Its places are found anew each time, as ``Place`` is.
    DEVICE Exchange* exchange() const {
        Exchange* to = exchange_;
        asm volatile("" : "+l"(to));
        return to;
    }

    DEVICE void get_residual(float4 (&x)[SLOTS], int which, unsigned bit) {
        const Columns columns{Place()};
        const float(*from)[WIDTH] = exchange()->residual[which];
        const float* places[SLOTS];
        uint4 seen[SLOTS];
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            places[slot] = from[slot] + columns.first;
            seen[slot] = look(places[slot]);
        }
        get(seen, places, bit);
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) x[slot] = as_floats(seen[slot]);
    }

    // A product's bias, into what is the block's own of the residual stream
    template <typename P>
    DEVICE void add(float bias) {
        const Place at(stream.begun);
        if (Result<P>(at).any) shared.kept[at.thread] += bias;
    }

    // and its result, which the others get too
    template <typename P>
    DEVICE void put_residual(const float (*sums)[WARPS + 4], int which) {
        const Place at(stream.begun);
        const Result<P> result(at);
        if (!result.any) return;
        const float kept = shared.kept[at.thread] += whole<P>(sums, at.thread);
        put(&exchange()->residual[which][result.slot][result.row], kept, bit);
    }

    template <typename P>
    DEVICE float bias(const float* biases) const {
        const Result<P> result{Place(stream.begun)};
        return result.any ? load_early(biases + result.row) : 0.0f;
    }
};

// This block's head of self-attention, if it has one
struct SelfUnit {
    int unit, slot, head;

    DEVICE SelfUnit() : unit(BLOCKS - 1 - blockIdx.x), slot(unit / HEADS), head(unit % HEADS) {}
    DEVICE bool any() const { return unit < UNITS; }

    DEVICE void prefetch_caches(const Layer& layer, int last, int n_ctx) const {
        if (!any()) return;
        const Place at;
        const half_t* from = at.lane() % 2 ? layer.self_values : layer.self_keys;
        for (int row = at.warp() * 16 + at.lane() / 2; row < last; row += ROUND)
            prefetch(from + ((long long)slot * n_ctx + row) * WIDTH + head * 64);
    }

    DEVICE void attend(Step& step, const Layer& layer, int last, int n_ctx) const {
        const long long begin = (long long)slot * n_ctx * WIDTH + head * 64;
        half_t *keys = layer.self_keys + begin, *values = layer.self_values + begin;
        const Place at;
        const int group = at.warp() * 16 + at.group();  // position
        Tile tile[1];
        auto load = [&](int round) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int position = round + group + i * 8;
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    tile[0].keys[i][which] = tile[0].values[i][which] = make_uint4(0, 0, 0, 0);
                    if (position >= last) continue;
                    const int from = position * WIDTH + at.eight(which);
                    tile[0].keys[i][which] = *reinterpret_cast<const uint4*>(keys + from);
                    tile[0].values[i][which] = *reinterpret_cast<const uint4*>(values + from);
                }
            }
        };
        load(0);
        const float* own = step.exchange()->qkv[slot] + head * 64;
        const Query from(own);
        uint2 query[2];
        uint4 made[4] = {};  // this position's key and value, of the warp that looks at it
        if (last / 16 % WARPS == at.warp()) {
            const float *first = own + WIDTH + at.eight(0), *second = own + WIDTH + at.eight(1);
            uint4 all[6];
            get_eights<6>(all, {from.first, from.second, first, second, first + WIDTH, second + WIDTH}, step.bit);
            query[0] = Query::of(all[0]);
            query[1] = Query::of(all[1]);
#pragma unroll
            for (int i = 0; i < 4; i++) made[i] = all[2 + i];
        } else {
            from.get(query, step.bit);
        }
        Attention attention;
#pragma unroll 1
        for (int round = 0; round <= last; round += ROUND) {
            if (round > 0) load(round);
            if (last / 16 == round / 16 + at.warp()) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (round + group + i * 8 != last) continue;
#pragma unroll
                    for (int which = 0; which < 2; which++) {
                        tile[0].keys[i][which] = made[which];
                        tile[0].values[i][which] = made[2 + which];
                        *reinterpret_cast<uint4*>(keys + last * WIDTH + at.eight(which)) = made[which];
                        *reinterpret_cast<uint4*>(values + last * WIDTH + at.eight(which)) = made[2 + which];
                    }
                }
            }
            attention.attend<1>(query, tile, round + group, last + 1);
        }
        float most, total;
        const float mean = attention.merge(step.shared, most, total);
        if (at.thread >= 64) return;
        const Word four = pack(mean);
        if (at.part() == 0) put(&step.exchange()->mixed[slot][head * 16 + at.thread / 4], four, step.bit);
    }
};

// This block's share of cross-attention, if it has one
struct CrossUnit {
    int unit, split, begin, end;

    DEVICE CrossUnit() : unit(blockIdx.x / SPLITS), split(blockIdx.x % SPLITS) {
        begin = split * SPLIT;
        end = min(begin + SPLIT, ENCODED);
    }
    DEVICE bool any() const { return unit < UNITS; }

    DEVICE void take(Tile& tile, Stream& stream, int from) const {
        const int count = min(ROUND, end - from), units = (count + UNIT_POSITIONS - 1) / UNIT_POSITIONS;
        const Place at;
        stream.wait();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int position = min(at.warp() * 16 + at.group() + i * 8, count - 1);
            const int in = position / UNIT_POSITIONS, offset = position % UNIT_POSITIONS * 128;
            const unsigned key = stream.unit(in) + offset, value = stream.unit(units + in) + offset;
#pragma unroll
            for (int which = 0; which < 2; which++) {
                tile.keys[i][which] = load_shared_16(key + at.eight(which) * 2);
                tile.values[i][which] = load_shared_16(value + at.eight(which) * 2);
            }
        }
        stream.leave(units * 2);
    }

    DEVICE void attend(Step& step) const {
        Tile tiles[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            tiles[i] = {};
            if (i == 0 || begin + i * ROUND < end) take(tiles[i], step.stream, begin + i * ROUND);
        }
        const Place at;
        const float* own = step.exchange()->query[unit / HEADS] + unit % HEADS * 64;
        uint2 query[2];
        Query(own).get(query, step.bit);
        Attention attention;
        const int group = begin + at.warp() * 16 + at.group();
        attention.attend<KEPT>(query, tiles, group, end);
#pragma unroll 1
        for (int from = begin + KEPT * ROUND; from < end; from += ROUND) {
            Tile tile[1];
            take(tile[0], step.stream, from);
            attention.attend<1>(query, tile, group + from - begin, end);
        }
        float most, total;
        const float mean = attention.merge(step.shared, most, total);
        if (at.thread >= 64) return;
        const Word four = pack(mean);
        if (at.part() == 0) put(&step.exchange()->parts[unit][split][at.thread / 4], four, step.bit);
        if (at.thread != 0) return;
        const Word share = Word(__float_as_uint(total)) << 32 | __float_as_uint(most);
        put(&step.exchange()->shares[unit][split], share, step.bit);
    }
};

// Puts the splits of cross-attention together, each warp the columns that it multiplies.
DEVICE void gather(Step& step) {
    const Place at;
    const Columns columns(at);
    if (columns.any) {
        const Word* shares = step.exchange()->shares[columns.first / 64];
        const Word* parts = step.exchange()->parts[columns.first / 64][0] + columns.first % 64 / 4;
        constexpr int ALL = SLOTS * SPLITS;
        const Word* places[2 * ALL];  // shares, and then parts
        uint2 seen[2 * ALL];
#pragma unroll
        for (int i = 0; i < ALL; i++) {
            const int at_split = i / SPLITS * HEADS * SPLITS + i % SPLITS;
            places[i] = shares + at_split;
            places[ALL + i] = parts + at_split * 16;
            seen[i] = look_at_one(places[i]);
            seen[ALL + i] = look_at_one(places[ALL + i]);
        }
        get(seen, places, step.bit);
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            const uint2 *share = seen + slot * SPLITS, *part = share + ALL;
            float most = -infinity();
#pragma unroll
            for (int i = 0; i < SPLITS; i++) most = fmaxf(most, __uint_as_float(share[i].x));
            float total = 0.0f;
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int i = 0; i < SPLITS; i++) {
                const float weight = exp2_approximate(__uint_as_float(share[i].x) - most) * __uint_as_float(share[i].y);
                const float2 a = to_float2(part[i].x), b = to_float2(part[i].y);
                total += weight;
                sum.x += weight * a.x;
                sum.y += weight * a.y;
                sum.z += weight * b.x;
                sum.w += weight * b.y;
            }
            const float scale = __fdividef(1.0f, total);
            *reinterpret_cast<uint2*>(&step.shared.input[at.warp()][slot][at.lane() * 4]) =
                make_uint2(to_half2(sum.x * scale, sum.y * scale), to_half2(sum.z * scale, sum.w * scale));
        }
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS + MEMORY_WARPS * 32, 1)
persistent_step(const Layer* layers, const Small* smalls, int n_layer, const half_t* tokens_table,
                const float* positions_table, const float* norm_weight, const float* norm_bias, const int* tokens,
                const int* positions, int state_stride, float* logits, int n_vocab, int n_ctx, Exchange* exchange) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const SelfUnit self;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&shared.full[i]), MEMORY_WARPS);
            barrier_init(shared_address(&shared.empty[i]), THREADS);
        }
        barrier_init_fence();
        shared.uses = exchange->uses[blockIdx.x];
        shared.last = self.any() ? min(positions[self.slot * state_stride], n_ctx - 1) : 0;
    }
    for (int i = threadIdx.x; i < n_layer * int(sizeof(Layer) / sizeof(Word)); i += THREADS + MEMORY_WARPS * 32)
        reinterpret_cast<Word*>(shared.layers)[i] = reinterpret_cast<const Word*>(layers)[i];
    // a layer's small numbers come into the L2 cache a layer ahead, some lines by each block
    auto prefetch_small = [&](int l) {
        constexpr int LINES = int(sizeof(Small) / 128), EACH = (LINES + BLOCKS - 1) / BLOCKS;
        const Place at;
        const int line = blockIdx.x * EACH + at.thread;
        if (at.thread < EACH && line < LINES && l < n_layer)
            prefetch_to_stay(reinterpret_cast<const char*>(smalls + l) + line * 128);
    };
    prefetch_small(0);
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        registers_give<MEMORY_REGISTERS>();
        if (threadIdx.x % 32 == 0) bring(shared, threadIdx.x / 32 - WARPS, n_layer, tokens_table, n_vocab);
        return;
    }
    registers_take<REGISTERS>();

    Step step(shared, exchange);
    step.bit = shared.uses + 1 & 1;
    self.prefetch_caches(shared.layers[0], shared.last, n_ctx);

    auto position_of = [&](int slot) {
        return positions_table + min(positions[slot * state_stride], n_ctx - 1) * WIDTH;
    };
    auto token_of = [&](int slot) { return tokens_table + (long long)tokens[slot * state_stride] * WIDTH; };
    const Result<Square> kept{Place()};
    if (kept.any)
        shared.kept[threadIdx.x] = to_float(token_of(kept.slot)[kept.row]) + position_of(kept.slot)[kept.row];

#pragma unroll 1
    for (int l = 0; l < n_layer; l++) {
        const Layer& layer = shared.layers[l];
        const Small& small = smalls[l];
        prefetch_small(l + 1);

        {  // query, key and value
            const float bias = step.bias<Qkv>(small.qkv_bias);
            const Norm norm(small.self_norm_weight, small.self_norm_bias);
            const Weights<Qkv> weights(step.stream);
            float4 x[SLOTS];
            if (l > 0) {
                step.get_residual(x, 2, step.bit ^ 1);
            } else {  // the input, each block all of it
                const Columns columns{Place()};
#pragma unroll
                for (int slot = 0; slot < SLOTS; slot++) {
                    const uint2 four = *reinterpret_cast<const uint2*>(token_of(slot) + columns.first);
                    const float2 a = to_float2(four.x), b = to_float2(four.y);
                    const float4 y = *reinterpret_cast<const float4*>(position_of(slot) + columns.first);
                    x[slot] = make_float4(a.x + y.x, a.y + y.y, b.x + y.z, b.y + y.w);
                }
            }
            normalise(shared, x, norm, step.means);
            weights.multiply(step.stream, shared.sums[0]);
            const Place at;
            const Result<Qkv> result(at);
            if (result.any) {
                const float sum = whole<Qkv>(shared.sums[0], at.thread) + bias;
                put(&step.exchange()->qkv[result.slot][result.row], sum, step.bit);
            }
        }

        if (self.any()) self.attend(step, layer, shared.last, n_ctx);

        {
            const float bias = step.bias<Square>(small.self_out_bias);
            const Weights<Square> weights(step.stream);
            step.add<Square>(bias);
            fetch<Square>(shared, step.exchange()->mixed, step.bit);
            weights.multiply(step.stream, shared.sums[1]);
            step.put_residual<Square>(shared.sums[1], 0);
        }

        {  // cross-attention's query
            const float bias = step.bias<Square>(small.query_bias);
            const Norm norm(small.cross_norm_weight, small.cross_norm_bias);
            const Weights<Square> weights(step.stream);
            float4 x[SLOTS];
            step.get_residual(x, 0, step.bit);
            normalise(shared, x, norm, step.means);
            weights.multiply(step.stream, shared.sums[0]);
            const Place at;
            const Result<Square> result(at);
            if (result.any) {
                const float sum = whole<Square>(shared.sums[0], at.thread) + bias;
                put(&step.exchange()->query[result.slot][result.row], sum, step.bit);
            }
        }

        const CrossUnit cross;
        if (cross.any()) cross.attend(step);

        {
            const float bias = step.bias<Square>(small.cross_out_bias);
            const Weights<Square> weights(step.stream);
            step.add<Square>(bias);
            gather(step);
            weights.multiply(step.stream, shared.sums[1]);
            step.put_residual<Square>(shared.sums[1], 1);
        }

        {  // the perceptron
            const float bias = step.bias<Up>(small.up_bias);
            const Norm norm(small.mlp_norm_weight, small.mlp_norm_bias);
            if (l + 1 < n_layer) self.prefetch_caches(shared.layers[l + 1], shared.last, n_ctx);
            const Weights<Up> weights(step.stream);
            float4 x[SLOTS];
            step.get_residual(x, 1, step.bit);
            normalise(shared, x, norm, step.means);
            weights.multiply(step.stream, shared.sums[0]);
            const Place at;
            if (at.warp() * 32 < SLOTS * Up::MOST) {
                const Result<Up> result(at);
                const Word four = pack(result.any ? gelu(whole<Up>(shared.sums[0], at.thread) + bias) : 0.0f);
                if (result.any && at.part() == 0)
                    put(&step.exchange()->inner[result.slot][result.row / 4], four, step.bit);
            }
        }

        {
            const float bias = step.bias<Down>(small.down_bias);
            const Weights<Down> weights(step.stream);
            step.add<Down>(bias);
            fetch<Down>(shared, step.exchange()->inner, step.bit);
            weights.multiply(step.stream, shared.sums[1]);
            step.put_residual<Down>(shared.sums[1], 2);
        }
        step.bit ^= 1;
    }

    // the vocabulary
    const Norm norm(norm_weight, norm_bias);
    float4 x[SLOTS];
    step.get_residual(x, 2, step.bit ^ 1);
    normalise(shared, x, norm, step.means);
    const int end = (long long)(blockIdx.x + 1) * n_vocab / BLOCKS;
    int turn = 0;
#pragma unroll 1
    for (int first = (long long)blockIdx.x * n_vocab / BLOCKS; first < end; first += 16) {
        const Weights<Vocabulary> weights(step.stream, min(16, end - first));
        weights.multiply(step.stream, shared.sums[turn]);
        const int slot = threadIdx.x / 16, row = first + threadIdx.x % 16;
        if (slot < SLOTS && row < end)
            logits[(long long)slot * n_vocab + row] = whole<Vocabulary>(shared.sums[turn], threadIdx.x);
        turn ^= 1;
    }
    if (threadIdx.x == 0) exchange->uses[blockIdx.x] = shared.uses + n_layer;
}
