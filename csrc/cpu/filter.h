// The kept set of a row without a sort. A cut is found by narrowing an interval of values until few entries are left in
// it; those are looked at one by one.
#pragma once

#include "logits.h"

namespace ddfast::cpu {
namespace {

// Entries of a row that are still in play, by ascending index: values and where they stand in the row.
struct Kept {
    float* value;    // [count]
    int32_t* index;  // [count]
    int64_t count;
};

int64_t count_at_least(const float* row, int64_t count, float value) {
    const Vec limit = splat(value);
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += 4 * kLanes) {
        found += __builtin_popcount(at_least(load<Vec>(row + i), limit)) +
                 __builtin_popcount(at_least(load<Vec>(row + i + kLanes), limit)) +
                 __builtin_popcount(at_least(load<Vec>(row + i + 2 * kLanes), limit)) +
                 __builtin_popcount(at_least(load<Vec>(row + i + 3 * kLanes), limit));
    }
    return found;
}

// A value strictly between two, about `share` of the way, or the lower one if there is none.
float between(float low, float high, double share) {
    const float way = static_cast<float>(share < 0.1 ? 0.1 : share > 0.9 ? 0.9 : share);
    float middle = low + (high - low) * way;
    if (!(middle > low && middle < high)) middle = 0.5f * low + 0.5f * high;
    return middle > low && middle < high ? middle : low;
}

// A value t such that the entries >= t are the k largest and what is tied with the k-th. The row is sealed, max its
// largest.
float top_k_cut(const float* row, int64_t count, int64_t k, float max, Scratch& scratch) {
    // at_low entries are >= low, at_high are >= high, and at_high < k <= at_low.
    float high = kInfinity, low;
    int64_t at_high = 0, at_low;
    for (float below = scratch.guess;; below *= 1.5f) {
        low = max - below > kLowest ? max - below : kLowest;
        at_low = count_at_least(row, count, low);
        if (at_low >= k) break;
        if (low == kLowest) return low;  // fewer than k are possible: all of them stay
        high = low;
        at_high = at_low;
    }
    if (high == kInfinity) high = __builtin_nextafterf(max, kInfinity);
    bool few = false;
    while (at_low > k) {
        const double share = static_cast<double>(at_low - k) / static_cast<double>(at_low - at_high);
        const float middle = between(low, high, share);
        if (!(middle > low)) break;  // neighbours: the rest is tied
        const int64_t found = count_at_least(row, count, middle);
        if (found >= k) {
            low = middle;
            at_low = found;
        } else {
            high = middle;
            at_high = found;
        }
        if (!few && at_low - at_high <= 2 * kRowPad) {
            int64_t n = 0;
            for (int64_t i = 0; i < count; i += kLanes) {
                const Vec v = load<Vec>(row + i);
                n += compress(scratch.few + n, v, at_least(v, splat(low)) & ~at_least(v, splat(high)));
            }
            seal(scratch.few, n);
            row = scratch.few;
            count = n;
            k -= at_high;
            at_low -= at_high;
            at_high = 0;
            few = true;
        }
    }
    scratch.guess = max - low > 1e-3f ? max - low : 1e-3f;
    return low;
}

IntVec lane_numbers() {
    IntVec numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = i;
    return numbers;
}

// All entries of a sealed row that are >= cut, which is finite.
Kept keep_at_least(const float* row, int64_t count, float cut, float* value, int32_t* index) {
    const Vec limit = splat(cut);
    IntVec at = lane_numbers();
    int64_t n = 0;
    for (int64_t i = 0; i < count; i += kLanes, at += kLanes) {
        const Vec v = load<Vec>(row + i);
        const uint32_t bits = at_least(v, limit);
        compress(value + n, v, bits);
        n += compress(index + n, at, bits);
    }
    seal(value, n);
    return {value, index, n};
}

// Probabilities softmax(value) in float64.
void masses(const Kept& kept, float max, double* mass) {
    DoubleVec total{};
    const int64_t end = padded(kept.count);
    for (int64_t i = 0; i < end; i += kLanes / 2) {
        const DoubleVec v = to_double(load<HalfVec>(kept.value + i));
        const DoubleVec e = exponential(v - static_cast<double>(max));
        store(mass + i, e);
        total += e;
    }
    const double share = 1.0 / sum_lanes(total);
    for (int64_t i = 0; i < end; i += kLanes / 2) store(mass + i, load<DoubleVec>(mass + i) * share);
}

// The mass of the entries >= cut, or of those below it.
template <bool kBelow>
double mass_beside(const Kept& kept, const double* mass, float cut) {
    const DoubleVec limit = splat_double(cut);
    DoubleVec sum{};
    const int64_t end = padded(kept.count);
    for (int64_t i = 0; i < end; i += kLanes / 2) {
        const DoubleVec v = to_double(load<HalfVec>(kept.value + i));
        const DoubleVec m = load<DoubleVec>(mass + i);
        sum += kBelow ? (v < limit ? m : DoubleVec{}) : (v >= limit ? m : DoubleVec{});
    }
    return sum_lanes(sum);
}

float smallest(const Kept& kept, float max) {
    Vec least = splat(max);
    for (int64_t i = 0; i < kept.count; i += kLanes) {
        const Vec v = load<Vec>(kept.value + i);
        least = v > kLowest ? smaller(v, least) : least;
    }
    return -max_lanes(-least);
}

// The interval [low, high) of values in which the top-p cut lies, and the mass of the entries >= high.
struct Interval {
    float low, high;
    double above;
};

Interval narrow(const Kept& kept, const double* mass, float max, double top_p) {
    Interval in{smallest(kept, max), __builtin_nextafterf(max, kInfinity), 0.0};
    double above_low = 1.0;
    int64_t at_low = kept.count, at_high = 0;
    while (at_low - at_high > 32) {
        const float middle = between(in.low, in.high, (above_low - top_p) / (above_low - in.above));
        if (!(middle > in.low)) break;  // neighbours: the rest is tied
        const double above = mass_beside<false>(kept, mass, middle);
        const int64_t at_middle = count_at_least(kept.value, kept.count, middle);
        if (above > top_p) {
            in.low = middle;
            above_low = above;
            at_low = at_middle;
        } else {
            in.high = middle;
            in.above = above;
            at_high = at_middle;
        }
    }
    return in;
}

// Positions in `kept` of the values in the interval, largest first, ties by ascending position; returns how many.
int64_t descending(const Kept& kept, const Interval& in, int32_t* order) {
    const Vec low = splat(in.low), high = splat(in.high);
    IntVec at = lane_numbers();
    int64_t n = 0;
    for (int64_t i = 0; i < kept.count; i += kLanes, at += kLanes) {
        const Vec v = load<Vec>(kept.value + i);
        n += compress(order + n, at, at_least(v, low) & ~at_least(v, high));
    }
    for (int64_t i = 1; i < n; ++i) {
        const int32_t moved = order[i];
        int64_t to = i;
        for (; to > 0 && kept.value[order[to - 1]] < kept.value[moved]; --to) order[to] = order[to - 1];
        order[to] = moved;
    }
    return n;
}

// Leaves the entries > cut, and those equal to it up to position `last`.
void keep_above(Kept& kept, float cut, int64_t last) {
    const Vec limit = splat(cut);
    int64_t n = 0;
    for (int64_t i = 0; i < kept.count; i += kLanes) {
        const Vec v = load<Vec>(kept.value + i);
        const IntVec at = load<IntVec>(kept.index + i);
        const int64_t upto = last - i + 1 < 0 ? 0 : last - i + 1 > kLanes ? kLanes : last - i + 1;
        const uint32_t ties = at_least(v, limit) & static_cast<uint32_t>((1ull << upto) - 1);
        const uint32_t bits = (~at_least(limit, v) & ((1ull << kLanes) - 1)) | ties;
        compress(kept.value + n, v, bits);
        n += compress(kept.index + n, at, bits);
    }
    kept.count = n;
    seal(kept.value, n);
}

// Drops what lies outside the most probable entries of total mass top_p. `order` has room for a row.
void cut_mass(Kept& kept, const Filter& filter, float max, double* mass, int32_t* order) {
    masses(kept, max, mass);
    const Interval in = narrow(kept, mass, max, filter.top_p);
    const int64_t n = descending(kept, in, order);
    int64_t stay = n;  // how many of the interval are kept
    if (filter.rule == Rule::kVar) {
        const int64_t least = in.above > 0.0 ? 0 : 1;  // the largest entry of all stays
        double below = mass_beside<true>(kept, mass, in.low);
        while (stay > least && (below += mass[order[stay - 1]]) <= 1.0 - filter.top_p) --stay;
    } else {
        double before = in.above;
        for (stay = 0; stay < n && before <= filter.top_p; ++stay) before += mass[order[stay]];
    }
    if (stay == 0) return keep_above(kept, in.high, kept.count);
    keep_above(kept, kept.value[order[stay - 1]], order[stay - 1]);
}

// The kept set of a sealed row, in scratch.log_p and scratch.index.
Kept kept_set(const float* row, int64_t vocab, float max, const Filter& filter, Scratch& scratch) {
    const bool cut = filter.top_k > 0 && filter.top_k < vocab;
    const float least = cut ? top_k_cut(row, vocab, filter.top_k, max, scratch) : kLowest;
    Kept kept = keep_at_least(row, vocab, least, scratch.log_p, scratch.index);
    if (filter.top_p >= 0.0) cut_mass(kept, filter, max, scratch.mass, scratch.order);
    return kept;
}

void filter_row(const FilterJob& job, int64_t r, Scratch& scratch) {
    float* out = job.out + r * job.vocab;
    float* row = scratch.logits;
    const float max = read_row<LogitType::kFloat32>(job.logits + r * job.vocab, nullptr, job.vocab, 1.0,
                                                    job.filter.divisor, row);
    const bool finite = max > -kInfinity && max < kInfinity;
    if (!finite || keeps_all(job.filter)) {
        __builtin_memcpy(out, row, sizeof(float) * job.vocab);
        return;
    }
    const Kept kept = kept_set(row, job.vocab, max, job.filter, scratch);
    for (int64_t i = 0; i < job.vocab; ++i) out[i] = -kInfinity;
    for (int64_t i = 0; i < kept.count; ++i) out[kept.index[i]] = kept.value[i];
}

}  // namespace
}  // namespace ddfast::cpu
