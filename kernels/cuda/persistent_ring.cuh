#pragma once
// The persistent step's ring of shared memory: weights, keys and values on their way to the warps that compute, brought
// by others in the order in which they are used.
#include "persistent_layout.cuh"

// A warp that brings memory, by one of its threads: every fourth unit. It waits only for shared memory that the block
// itself will leave.
struct Memory {
    Shared& shared;
    const int warp;
    const unsigned long long policy = read_once();
    int at = 0, room = RING;
    unsigned begun = 0, left = 0, barrier, bytes;

    DEVICE Memory(Shared& shared_, int warp_) : shared(shared_), warp(warp_) {}

    DEVICE void make_room() {
        barrier_wait(shared_address(&shared.empty[left % STAGES]), left / STAGES & 1);
        room += shared.sizes[warp][left % STAGES];
        left++;
    }

    DEVICE void begin(int units) {
        if (begun - left == STAGES) make_room();
        shared.sizes[warp][begun % STAGES] = units;
        barrier = shared_address(&shared.full[begun % STAGES]);
        bytes = 0;
        begun++;
    }

    // Some bytes may have come by now: the barrier waits for all that bring some to say how many.
    DEVICE void end() { barrier_expect(barrier, bytes); }

    // ``stride``: from one to the next, in numbers; ``rest``: bytes of the last one
    DEVICE void units(const half_t* from, int count, int stride, int rest = UNIT) {
#pragma unroll 1
        while (count > 0) {
            while (room == 0) make_room();
            const int n = min(min(count, room), RING - at);
            unsigned to = shared_address(&shared) + RING_AT + (at + warp) * PITCH;
            const half_t* own = from + (long long)warp * stride;
#pragma unroll 1
            for (int i = warp; i < n; i += MEMORY_WARPS) {
                const int size = i + 1 < count ? UNIT : rest;
                copy_bytes(to, own, size, barrier, policy);
                bytes += size;
                to += MEMORY_WARPS * PITCH;
                own += (long long)MEMORY_WARPS * stride;
            }
            from += (long long)n * stride;
            count -= n;
            room -= n;
            at = at + n == RING ? 0 : at + n;
        }
    }

    // Rows from the first on; a row's segments lie apart, so that those of neighbouring rows are neighbours.
    template <typename P>
    DEVICE void rows(const half_t* first, int rows) {
        begin(rows * P::SEGMENTS);
#pragma unroll 1
        for (int segment = 0; segment < P::SEGMENTS; segment++) units(first + segment * WIDTH, rows, P::K);
        end();
    }

    template <typename P>
    DEVICE void product(const half_t* matrix) {
        const int first = P::first(blockIdx.x);
        rows<P>(matrix + (long long)first * P::K, P::first(blockIdx.x + 1) - first);
    }

    DEVICE void positions(const half_t* keys, const half_t* values, int count) {
        const int n = (count + UNIT_POSITIONS - 1) / UNIT_POSITIONS, rest = count * 128 - (n - 1) * UNIT;
        begin(n * 2);
        units(keys, n, WIDTH, rest);
        units(values, n, WIDTH, rest);
        end();
    }
};

// The same for a warp that uses it.
struct Stream {
    Shared& shared;
    int at = 0;
    unsigned begun = 0;

    DEVICE explicit Stream(Shared& shared_) : shared(shared_) {}

    DEVICE void wait() { barrier_wait(shared_address(&shared.full[begun % STAGES]), begun / STAGES & 1); }

    DEVICE unsigned unit(int i) {
        i += at;
        return shared_address(&shared) + RING_AT + (i < RING ? i : i - RING) * PITCH;
    }

    DEVICE void leave(int units) {
        barrier_arrive(shared_address(&shared.empty[begun % STAGES]));
        begun++;
        at += units;
        if (at >= RING) at -= RING;
    }
};
