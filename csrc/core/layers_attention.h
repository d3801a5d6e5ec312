// Attention of one query a row to the filled positions of a cache: the bodies of its kernels in cuda/layers.cu.
//
// The keys are split over blocks, within a block over streams, and in a stream each vector lies over a few lanes. Of a
// part of the keys are kept its largest score, the sum of 2^(score - largest) and of 2^(score - largest) value; parts
// are joined exactly, first a block's streams and then the splits.
#pragma once

#include "layers_numbers.h"

namespace ddfast {

struct DecodeJob {
    const void* q;  // [rows, heads, width]
    int64_t q_row_stride, q_head_stride;
    const void* cache;  // [2, rows, kv_heads, positions, width], its first three strides given
    int64_t part_stride, row_stride, head_stride;
    int64_t rows;
    int heads, kv_heads, positions, width;
    const int32_t* length;  // the filled positions are 0..*length
    float scale;
    int splits;
    float* parts;  // [rows, heads, splits, width + kPartHead]; not used where splits is 1
    void* out;     // [rows, heads, width]
    Number number;
};

constexpr int kMostWidth = 256;
constexpr int kPartHead = 2;    // the largest score and the sum, before the weighted values
constexpr int kSplitStep = 16;  // a split's keys are a multiple of it
constexpr int kAhead = 2;       // keys that a stream reads at once: more spill, and other streams hide the wait

DDFAST_HD int filled(const DecodeJob& job) {
    const int64_t count = static_cast<int64_t>(*job.length) + 1;
    return count < job.positions ? static_cast<int>(count) : job.positions;
}

// Keys of a split, for as even a share as there can be at any length; the last splits may have none.
DDFAST_HD int split_span(const DecodeJob& job, int count) {
    const int share = (count + job.splits - 1) / job.splits;
    return (share + kSplitStep - 1) / kSplitStep * kSplitStep;
}

struct Joined {
    float most, total, value;
};

// One element of what count parts, stride numbers apart, add up to.
DDFAST_HD Joined join(const float* parts, int count, int64_t stride, int element) {
    Joined sum{parts[0], 0, 0};
    for (int i = 1; i < count; ++i) sum.most = fmaxf(sum.most, parts[i * stride]);
    for (int i = 0; i < count; ++i) {
        const float weight = exp2f(parts[i * stride] - sum.most);
        sum.total += weight * parts[i * stride + 1];
        sum.value += weight * parts[i * stride + kPartHead + element];
    }
    return sum;
}

// Queries first_head .. first_head + kHeads - 1, which share a head of keys, against one split of these; those from
// head stop_head on are left out. streams: memory that the group shares, [streams, kHeads, width + kPartHead].
//
// The group also has lanes() of one stream, lane() of the thread, lane_sum(x), streams(), and stream() and
// stream_step() for a thread's own ones. A lane holds kPacks packs of a vector, lanes() packs apart.
template <class T, int kVector, int kPacks, int kHeads, class Group>
DDFAST_HD void decode_split(const DecodeJob& job, int64_t row, int kv_head, int first_head, int stop_head, int split,
                            float* streams, const Group& group) {
    const int count = filled(job), span = split_span(job, count), width = job.width;
    const int begin = split * span, end = count - begin < span ? count : begin + span;
    if (begin >= end) return;
    const T* keys = static_cast<const T*>(job.cache) + row * job.row_stride + kv_head * job.head_stride;
    const T* values = keys + job.part_stride;
    const int first = group.lane() * kVector, step = group.lanes() * kVector;
    const int64_t stride = width + kPartHead;

    float q[kHeads][kPacks][kVector];
    DDFAST_UNROLL
    for (int h = 0; h < kHeads; ++h) {
        const T* from = static_cast<const T*>(job.q) + row * job.q_row_stride + (first_head + h) * job.q_head_stride;
        DDFAST_UNROLL
        for (int p = 0; p < kPacks; ++p) {
            if (first_head + h < stop_head && first + p * step < width) load(from + first + p * step, q[h][p]);
            DDFAST_UNROLL
            for (int j = 0; j < kVector; ++j) {
                const bool there = first_head + h < stop_head && first + p * step < width;
                q[h][p][j] = there ? q[h][p][j] * (job.scale * 1.44269504f) : 0;  // 2^x serves for e^x
            }
        }
    }

    for (int stream = group.stream(); stream < group.streams(); stream += group.stream_step()) {
        float most[kHeads], total[kHeads], sums[kHeads][kPacks][kVector];
        DDFAST_UNROLL
        for (int h = 0; h < kHeads; ++h) {
            most[h] = -INFINITY;
            total[h] = 0;
            DDFAST_UNROLL
            for (int p = 0; p < kPacks; ++p) {
                DDFAST_UNROLL
                for (int j = 0; j < kVector; ++j) sums[h][p][j] = 0;
            }
        }
        for (int at = begin + stream; at < end; at += kAhead * group.streams()) {
            Pack<T, kVector> k[kAhead][kPacks], v[kAhead][kPacks];
            DDFAST_UNROLL
            for (int a = 0; a < kAhead; ++a) {
                DDFAST_UNROLL
                for (int p = 0; p < kPacks; ++p) {
                    const int64_t from = static_cast<int64_t>(at + a * group.streams()) * width + first + p * step;
                    k[a][p] = v[a][p] = Pack<T, kVector>{};
                    if (at + a * group.streams() < end && first + p * step < width) {
                        k[a][p] = load_pack<kVector>(keys + from);
                        v[a][p] = load_pack<kVector>(values + from);
                    }
                }
            }
            DDFAST_UNROLL
            for (int h = 0; h < kHeads; ++h) {
                float score[kAhead], largest = most[h];
                DDFAST_UNROLL
                for (int a = 0; a < kAhead; ++a) {
                    float product = 0;
                    DDFAST_UNROLL
                    for (int p = 0; p < kPacks; ++p) {
                        DDFAST_UNROLL
                        for (int j = 0; j < kVector; ++j) product += q[h][p][j] * to_float(k[a][p].at[j]);
                    }
                    score[a] = group.lane_sum(product);
                    if (at + a * group.streams() >= end) score[a] = -INFINITY;
                    largest = fmaxf(largest, score[a]);
                }
                const float shrink = exp2f(most[h] - largest);
                most[h] = largest;
                total[h] *= shrink;
                DDFAST_UNROLL
                for (int p = 0; p < kPacks; ++p) {
                    DDFAST_UNROLL
                    for (int j = 0; j < kVector; ++j) sums[h][p][j] *= shrink;
                }
                DDFAST_UNROLL
                for (int a = 0; a < kAhead; ++a) {
                    const float weight = exp2f(score[a] - largest);
                    total[h] += weight;
                    DDFAST_UNROLL
                    for (int p = 0; p < kPacks; ++p) {
                        DDFAST_UNROLL
                        for (int j = 0; j < kVector; ++j) sums[h][p][j] += weight * to_float(v[a][p].at[j]);
                    }
                }
            }
        }
        DDFAST_UNROLL
        for (int h = 0; h < kHeads; ++h) {
            float* part = streams + (stream * kHeads + h) * stride;
            if (group.lane() == 0) part[0] = most[h], part[1] = total[h];
            DDFAST_UNROLL
            for (int p = 0; p < kPacks; ++p) {
                DDFAST_UNROLL
                for (int j = 0; j < kVector; ++j)
                    if (first + p * step < width) part[kPartHead + first + p * step + j] = sums[h][p][j];
            }
        }
    }
    group.sync();

    for (int h = 0; h < kHeads && first_head + h < stop_head; ++h) {
        const int64_t query = row * job.heads + first_head + h;
        float* part = job.splits > 1 ? job.parts + (query * job.splits + split) * stride : nullptr;
        for (int e = group.rank(); e < width; e += group.size()) {
            const Joined sum = join(streams + h * stride, group.streams(), kHeads * stride, e);
            if (part) {
                part[kPartHead + e] = sum.value;
                if (e == 0) part[0] = sum.most, part[1] = sum.total;
            } else {
                set(static_cast<T*>(job.out)[query * width + e], sum.value / sum.total);
            }
        }
    }
}

// out of one query from what its splits left; those without keys are not looked at.
template <class T, class Group>
DDFAST_HD void join_splits(const DecodeJob& job, int64_t query, const Group& group) {
    const int count = filled(job), span = split_span(job, count), width = job.width;
    const float* parts = job.parts + query * job.splits * (width + kPartHead);
    for (int e = group.rank(); e < width; e += group.size()) {
        const Joined sum = join(parts, (count + span - 1) / span, width + kPartHead, e);
        set(static_cast<T*>(job.out)[query * width + e], sum.value / sum.total);
    }
}

}  // namespace ddfast
