// The list of codes that are still possible for a row: their columns, and how it shrinks.
#pragma once

#include "filter.h"
#include "transpose.h"

namespace ddfast::cpu {
namespace {

constexpr int kTile = 4 * kLanes;

// The codes of one row that are still possible.
struct Codes {
    const float* columns;  // their channels, in blocks
    const float* half;     // [count], |c|^2 / 2
    const int32_t* index;  // [count], where in the codebook; null: in order
    float* log_p;          // [count], less the largest, to base 2, sealed; -inf where a code was let go
    int64_t count;

    int64_t token(int64_t i) const { return index ? index[i] : i; }
};

// The two largest values met, lane by lane.
struct TopTwo {
    Vec first = splat(-kInfinity), second = splat(-kInfinity);

    void meet(Vec v) {
        second = larger(second, smaller(first, v));
        first = larger(first, v);
    }

    float largest() const { return max_lanes(first); }

    // The second largest is the largest once one lane's first has been taken out.
    float second_largest() const {
        const float top = largest();
        Vec others = first;
        int lane = 0;
        while (lane + 1 < kLanes && first[lane] != top) ++lane;
        others[lane] = second[lane];
        return max_lanes(others);
    }
};

// Where a sealed row first holds a value, from `from` on; 0 if it does not, as where log-weights overflowed.
int64_t position(const float* row, int64_t count, int64_t from, float value) {
    for (; from < count; from += kLanes) {
        const Vec v = load<Vec>(row + from), x = splat(value);
        const uint32_t bits = at_least(v, x) & at_least(x, v);
        if (bits) return from + __builtin_ctz(bits);
    }
    return 0;
}

float second_largest(const float* row, int64_t count) {
    TopTwo best;
    for (int64_t i = 0; i < count; i += kLanes) best.meet(load<Vec>(row + i));
    return best.second_largest();
}

// Channels c, c + 1, ... of kLanes codes to the i-th vector of their columns, kSize channels at a time.
template <int kSize>
DDFAST_INLINE void turn(const float* const* rows, int64_t channels, int64_t& c, float* columns) {
    typedef typename Lane<kSize>::Floats Block;
    for (; c + kSize <= channels; c += kSize) {
        for (int first = 0; first < kLanes; first += kSize) {
            Block block[kSize];
            for (int k = 0; k < kSize; ++k) block[k] = load<Block>(rows[first + k] + c);
            transpose<kSize>(block);
            for (int k = 0; k < kSize; ++k) store(columns + (c + k) * kRowPad + first, block[k]);
        }
    }
}

// A list of codes with their columns, put in scratch. Padding repeats a code.
Codes gathered(const FlowJob& job, const Kept& kept, Scratch& scratch) {
    const int64_t end = padded(kept.count);
    for (int64_t i = 0; i < end; i += kLanes) {
        const float* rows[kLanes];
        for (int k = 0; k < kLanes; ++k) {
            const int64_t code = kept.index[i + k < kept.count ? i + k : 0];
            rows[k] = job.codebook + code * job.channels;
            scratch.half[i + k] = job.half[code];
        }
        float* columns = scratch.columns + in_blocks(i, job.channels);
        int64_t c = 0;
        if constexpr (kLanes >= 16) turn<16>(rows, job.channels, c, columns);
        if constexpr (kLanes >= 8) turn<8>(rows, job.channels, c, columns);
        turn<4>(rows, job.channels, c, columns);
        for (; c < job.channels; ++c)
            for (int k = 0; k < kLanes; ++k) columns[c * kRowPad + k] = rows[k][c];
    }
    return {scratch.columns, scratch.half, kept.index, kept.value, kept.count};
}

// What is left of a list: how many codes, and where the best one stands.
struct Left {
    int64_t alive, best;
};

// Lets go of the codes whose log-weight is below the cut: their log p becomes -inf. top: the largest log-weight. log_w
// may be log_p.
Left prune(Codes& codes, const float* log_w, float cut, float top) {
    const Vec limit = splat(cut), largest = splat(top);
    Left left{0, -1};
    for (int64_t i = 0; i < codes.count; i += kLanes) {
        const Vec w = load<Vec>(log_w + i), log_p = load<Vec>(codes.log_p + i);
        store(codes.log_p + i, w >= limit ? log_p : splat(-kInfinity));
        left.alive += __builtin_popcount(at_least(w, limit));
        const uint32_t hits = at_least(w, largest);
        if (hits && left.best < 0) left.best = i + __builtin_ctz(hits);
    }
    if (left.best < 0) left.best = 0;  // log-weights have overflowed
    return left;
}

// Takes the codes of log p = -inf off the list. Returns where the one at `best` went.
int64_t squeeze(const FlowJob& job, Codes& codes, Scratch& scratch, int64_t best) {
    const Vec lowest = splat(kLowest);
    IntVec at = lane_numbers();
    int64_t moved = 0, n = 0;
    for (int64_t i = 0; i < codes.count; i += kLanes, at += kLanes) {
        const Vec log_p = load<Vec>(codes.log_p + i);
        const uint32_t bits = at_least(log_p, lowest);
        if (best >= i && best < i + kLanes) moved = n + __builtin_popcount(bits & ((1u << (best - i)) - 1));
        const IntVec index = codes.index ? load<IntVec>(codes.index + i) : at;
        compress(codes.log_p + n, log_p, bits);
        n += compress(scratch.index + n, index, bits);
    }
    seal(codes.log_p, n);
    codes = gathered(job, {codes.log_p, scratch.index, n}, scratch);
    return moved;
}

}  // namespace
}  // namespace ddfast::cpu
