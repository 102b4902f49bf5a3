// Choosing the next token of each slot in one pass over the logits: suppressed tokens, timestamp rules, arg-max or a
// sample, its log-probability, and the slot's state for the step that follows.
//
// Compiled with the field numbers of a slot's state (kernels/next_token.py), which the rules' source describes.
// Grid: slots × parts; the part of a slot that ends last puts the parts together.
//
// NOTES: the decision "a timestamp, if all timestamps together are likelier than any one text token" needs both kinds'
// sums before it knows what to choose from, so each thread keeps both kinds' results apart until the end.
#include "common.cuh"

constexpr int THREADS = 256;

struct Rules {  // an array of integers, in the order of kernels/next_token.py
    int n_vocab, end, no_speech, no_timestamps, timestamp_begin, blank_first, blank_second, language_begin, language_end,
        most_initial_timestamp, most_sampled, n_ctx;
};

// Of some tokens: the sum of their probabilities, relative to the largest; the best score and whose it is.
struct Choice {
    float maximum, sum, score;
    int token;
};

DEVICE Choice nothing() { return {-infinity(), 0.0f, -infinity(), 0x7fffffff}; }

DEVICE Choice merge(const Choice& a, const Choice& b) {
    Choice c;
    c.maximum = fmaxf(a.maximum, b.maximum);
    c.sum = 0.0f;
    if (a.sum > 0.0f) c.sum += a.sum * exp2_approximate((a.maximum - c.maximum) * LOG2_E);
    if (b.sum > 0.0f) c.sum += b.sum * exp2_approximate((b.maximum - c.maximum) * LOG2_E);
    const bool first = a.score > b.score || (a.score == b.score && a.token < b.token);  // ties go to the lower token
    c.score = first ? a.score : b.score;
    c.token = first ? a.token : b.token;
    return c;
}

DEVICE Choice warp_merge(Choice a) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        a = merge(a, {__shfl_xor_sync(ALL_LANES, a.maximum, offset), __shfl_xor_sync(ALL_LANES, a.sum, offset),
                      __shfl_xor_sync(ALL_LANES, a.score, offset), __shfl_xor_sync(ALL_LANES, a.token, offset)});
    return a;
}

// Of all threads; the result is right in the first warp.
DEVICE Choice reduce(Choice a, Choice* shared) {
    a = warp_merge(a);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = a;
    __syncthreads();
    return warp_merge(threadIdx.x < THREADS / 32 ? shared[threadIdx.x] : nothing());
}

// What another block wrote: past L1
DEVICE Choice load(const Choice* from) {
    const float4 a = __ldcg(reinterpret_cast<const float4*>(from));
    return {a.x, a.y, a.z, __float_as_int(a.w)};
}

DEVICE float log_sum(const Choice& a) { return a.sum > 0.0f ? a.maximum + logf(a.sum) : -infinity(); }

// murmur3's finaliser: every bit of the input moves every bit of the output
DEVICE unsigned mix(unsigned x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// A standard Gumbel number: the arg-max of logits / temperature + these is a sample of their softmax.
DEVICE float gumbel(unsigned key, unsigned token) {
    const float uniform = (float(mix(key ^ (token * 0x9e3779b1u)) >> 9) + 0.5f) * 1.1920928955078125e-7f;
    return -logf(-logf(uniform));
}

extern "C" __global__ void __launch_bounds__(THREADS)
next_token(const float* logits, const unsigned* suppressed, int* states, Choice* parts, unsigned* arrivals,
           const Rules* rules_array, int row_stride) {
    __shared__ Choice shared[THREADS / 32];
    __shared__ bool last;
    const int slot = blockIdx.x;
    const Rules rules = *rules_array;
    int* state = states + slot * FIELDS;
    if (state[FINISHED]) return;
    const float* row = logits + (long long)slot * row_stride;

    const int forced = state[STEP] + 1;  // of the start sequence, what follows the input token
    const bool sampling = forced >= state[STARTS];
    const bool detecting = !sampling && state[START + forced] < 0;
    const bool first = state[SAMPLED] == 0;
    const bool timed = sampling && state[TIMESTAMPS];
    const bool last_timed = state[LAST_IS_TIMESTAMP], before_timed = state[BEFORE_IS_TIMESTAMP];
    // Timestamps come in pairs, except directly before the end: after a pair text must follow, after a lone one no text
    // may. They never decrease, and a segment has a length above zero.
    const bool unpaired = last_timed && !before_timed, paired = last_timed && before_timed;
    int lowest = rules.timestamp_begin, highest = rules.n_vocab - 1;
    if (state[LAST_TIMESTAMP] >= 0) lowest += state[LAST_TIMESTAMP] + (unpaired ? 0 : 1);
    if (first) highest = rules.timestamp_begin + rules.most_initial_timestamp;
    if (paired) highest = -1;
    const float temperature = __int_as_float(state[TEMPERATURE]);
    const unsigned key = mix(unsigned(state[SEED]) + 0x9e3779b9u * unsigned(state[SAMPLED] + 1));

    // What a token may be chosen as: 0 not at all, 1 text (without timestamps: any token), 2 a timestamp
    auto kind = [&](int token) {
        if (suppressed[token / 32] >> (token % 32) & 1) return 0;
        if (first && (token == rules.blank_first || token == rules.blank_second)) return 0;
        if (!timed) return 1;
        if (token >= rules.timestamp_begin) return token >= lowest && token <= highest ? 2 : 0;
        if (token == rules.no_timestamps || first || (unpaired && token < rules.end)) return 0;
        return 1;
    };

    // ``all``: unfiltered, after <|startoftranscript|>; its choice is the likeliest language
    Choice all = nothing(), text = nothing(), timestamps = nothing();
    const bool begins = forced == 1;
    auto add = [](Choice& choice, float logit, float score, int token) {
        if (logit > choice.maximum) {
            choice.sum = choice.sum > 0.0f ? choice.sum * exp2_approximate((choice.maximum - logit) * LOG2_E) : 0.0f;
            choice.maximum = logit;
        }
        choice.sum += exp2_approximate((logit - choice.maximum) * LOG2_E);
        if (score > choice.score) {  // a thread's tokens ascend, so that ties stay with the lower
            choice.score = score;
            choice.token = token;
        }
    };
    if (sampling || begins) {
        const int chunk = (rules.n_vocab + gridDim.y - 1) / gridDim.y;
        const int begin = blockIdx.y * chunk, end = min(begin + chunk, rules.n_vocab);
        for (int token = begin + threadIdx.x; token < end; token += THREADS) {
            const float logit = row[token];
            if (begins) {
                const bool language = token >= rules.language_begin && token < rules.language_end;
                add(all, logit, language ? logit : -infinity(), token);
            }
            const int counts = sampling ? kind(token) : 0;
            if (counts == 0) continue;
            const float score = temperature > 0.0f ? logit / temperature + gumbel(key, token) : logit;
            add(counts == 1 ? text : timestamps, logit, score, token);
        }
        if (begins) all = reduce(all, shared);
        text = reduce(text, shared);
        timestamps = reduce(timestamps, shared);
    }
    Choice* own = parts + (slot * gridDim.y + blockIdx.y) * 3;
    if (threadIdx.x == 0) {
        own[0] = all;
        own[1] = text;
        own[2] = timestamps;
        __threadfence();
        last = atomicInc(arrivals + slot, gridDim.y - 1) == gridDim.y - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= 32) return;
    __threadfence();
    all = text = timestamps = nothing();
    for (int part = threadIdx.x; part < gridDim.y; part += 32) {
        const Choice* other = parts + (slot * gridDim.y + part) * 3;
        all = merge(all, load(other));
        text = merge(text, load(other + 1));
        timestamps = merge(timestamps, load(other + 2));
    }
    all = warp_merge(all);
    text = warp_merge(text);
    timestamps = warp_merge(timestamps);
    if (threadIdx.x != 0) return;

    if (begins) state[NO_SPEECH] = __float_as_int(exp2_approximate((row[rules.no_speech] - log_sum(all)) * LOG2_E));
    state[POSITION]++;
    state[STEP] = forced;
    if (!sampling) {
        if (detecting) state[START + forced] = all.token;
        state[TOKEN] = state[START + forced];
        return;
    }
    // Where all timestamps together are likelier than any one token of text, take a timestamp.
    Choice chosen = merge(text, timestamps);
    if (timed && log_sum(timestamps) > text.maximum) chosen = timestamps;
    const int token = chosen.token, sampled = state[SAMPLED] + 1;
    state[TOKEN] = token;
    state[SAMPLED] = sampled;
    state[SUM_LOGPROB] = __float_as_int(__int_as_float(state[SUM_LOGPROB]) + row[token] - log_sum(chosen));
    const bool is_timestamp = token >= rules.timestamp_begin;
    state[BEFORE_IS_TIMESTAMP] = first ? 1 : last_timed;
    state[LAST_IS_TIMESTAMP] = is_timestamp;
    if (is_timestamp) state[LAST_TIMESTAMP] = token - rules.timestamp_begin;
    state[FINISHED] = token == rules.end || sampled >= rules.most_sampled || state[POSITION] >= rules.n_ctx;
}
