// Attention to a cache, scores and sums in float32. Keys and values are laid out once a head for products in registers,
// and the scores of a block of queries are kept whole.
#pragma once

#include "attention_one.h"
#include "multiply.h"

namespace ddfast::cpu {
namespace {

constexpr int64_t kQueries = 4 * kTileRows;  // a block

// Sizes of what a head's product works on. A unit is a float, or a pair of bfloat16.
struct Plan {
    bool pairs;
    int64_t units;      // of a query's or key's width
    int64_t panels;     // of kTileColumns keys
    int64_t span;       // panels * kTileColumns
    int64_t key_units;  // of the keys, as the depth of the second product
    int64_t columns;    // of the width, a multiple of kTileColumns
};

DDFAST_INLINE Plan plan(const AttentionJob& job) {
    Plan p;
    p.pairs = kPairs && job.half && job.width % 2 == 0;
    p.units = p.pairs ? job.width / 2 : job.width;
    p.panels = (job.keys + kTileColumns - 1) / kTileColumns;
    p.span = p.panels * kTileColumns;
    p.key_units = p.pairs ? (job.keys + 1) / 2 : job.keys;
    p.columns = (job.width + kTileColumns - 1) / kTileColumns * kTileColumns;
    return p;
}

int64_t attend_floats(const AttentionJob& job) {
    if (one_query(job)) return attend_one_floats(job);
    const Plan p = plan(job);
    return p.units * p.span + p.key_units * p.columns + kQueries * (p.units + 2 * p.span);
}

// The units of one row of a model's numbers: to[j].
template <bool pairs, class T>
DDFAST_INLINE void units_of(const T* from, float* to, int64_t units) {
    if constexpr (pairs)
        __builtin_memcpy(to, from, units * 4);
    else
        for_lanes(units, [&](int64_t j, const auto& get, const auto& put) { put(to + j, get(from + j)); });
}

// Keys by columns: out[panel][unit][key of the panel], zeros behind the last.
template <bool pairs, class T>
void pack_keys(const AttentionJob& job, const Plan& p, const T* keys, float* out) {
    for (int64_t first = 0; first < p.span; first += kLanes) {
        float* panel = out + first / kTileColumns * p.units * kTileColumns + first % kTileColumns;
        const int64_t there = job.keys - first;
        int64_t u = 0;
        for (; u + kLanes <= p.units && there >= kLanes; u += kLanes) {
            Vec rows[kLanes];
#pragma GCC unroll 16
            for (int k = 0; k < kLanes; ++k) {
                const T* key = keys + (first + k) * job.k_position;
                if constexpr (pairs)
                    rows[k] = load<Vec>(key + 2 * u);
                else
                    rows[k] = read(key + u);
            }
            transpose<kLanes>(rows);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) store(panel + (u + j) * kTileColumns, rows[j]);
        }
        for (; u < p.units; ++u)
            for (int64_t k = 0; k < kLanes; ++k) {
                float unit = 0.0f;
                if (k < there) {
                    const T* key = keys + (first + k) * job.k_position;
                    if constexpr (pairs)
                        __builtin_memcpy(&unit, key + 2 * u, 4);
                    else
                        unit = to_float(key[u]);
                }
                __builtin_memcpy(panel + u * kTileColumns + k, &unit, 4);
            }
    }
}

// Values by rows: out[panel of the width][key or pair of keys][column], zeros behind the last.
template <bool pairs, class T>
void pack_values(const AttentionJob& job, const Plan& p, const T* values, float* out) {
    for (int64_t first = 0; first < p.columns; first += kLanes) {
        float* to = out + first / kTileColumns * p.key_units * kTileColumns + first % kTileColumns;
        const int64_t there = job.width - first;
        for (int64_t j = 0; j < p.key_units; ++j, to += kTileColumns) {
            if (there <= 0) {
                store(to, Vec{});
                continue;
            }
            const T* even = values + (pairs ? 2 * j : j) * job.v_position + first;
            const auto get = [&](const T* from) { return there >= kLanes ? read(from) : read_some(from, there); };
            if constexpr (pairs) {
                const WordVec low = reinterpret_cast<WordVec>(get(even)) >> 16;
                const WordVec high =
                    2 * j + 1 < job.keys ? reinterpret_cast<WordVec>(get(even + job.v_position)) : WordVec{};
                store(to, low | high);
            } else {
                store(to, get(even));
            }
        }
    }
}

// Scores [kTileRows, span] to weights e^(score - largest), as units; gives each row's sum, NaN if a score is NaN or
// infinite, which power_of_two would hide. Behind the last key weights are next to nothing, and values zero.
template <bool pairs>
DDFAST_INLINE void weigh(float* scores, const Plan& p, int64_t keys, float* weights, float* sums) {
    for (int64_t m = 0; m < kTileRows; ++m) {
        float* row = scores + m * p.span;
        for (int64_t i = keys; i < p.span; ++i) row[i] = -1e30f;
        Vec top = load<Vec>(row);
        for (int64_t i = kLanes; i < p.span; i += kLanes) top = larger(load<Vec>(row + i), top);
        const float best = max_lanes(top);
        float* to = weights + m * p.span;
        Vec sum{};
        for (int64_t i = 0; i < p.span; i += kLanes) {
            const Vec below = load<Vec>(row + i) - best;
            const Vec w = power_of_two(below * 1.44269504f);
            sum += w + below * 0.0f;
            if constexpr (pairs)
                write(reinterpret_cast<Bfloat16*>(to) + i, w);
            else
                store(to + i, w);
        }
        sums[m] = sum_lanes(sum);
    }
}

template <bool pairs, class T>
void attend_many(const AttentionJob& job, int64_t row, int64_t kv_head, float* scratch) {
    const Plan p = plan(job);
    float* keys = scratch;
    float* values = keys + p.units * p.span;
    float* queries = values + p.key_units * p.columns;
    float* scores = queries + kQueries * p.units;
    float* weights = scores + kQueries * p.span;
    pack_keys<pairs>(job, p, static_cast<const T*>(job.k) + row * job.k_row + kv_head * job.k_head, keys);
    pack_values<pairs>(job, p, static_cast<const T*>(job.v) + row * job.v_row + kv_head * job.v_head, values);
    const int64_t group = job.heads / job.kv_heads, total = group * job.n;
    const auto at = [&](int64_t i, int64_t& head, int64_t& position) {
        head = kv_head * group + i / job.n;
        position = i % job.n;
    };
    for (int64_t first = 0; first < total; first += kQueries) {
        const int64_t there = total - first < kQueries ? total - first : kQueries;
        const int64_t tiles = (there + kTileRows - 1) / kTileRows;
        for (int64_t i = 0; i < tiles * kTileRows; ++i) {  // the last one again where they end
            int64_t head, position;
            at(first + (i < there ? i : there - 1), head, position);
            const T* q = static_cast<const T*>(job.q) + row * job.q_row + position * job.q_position + head * job.q_head;
            units_of<pairs>(q, queries + i * p.units, p.units);
        }
        for (int64_t panel = 0; panel < p.panels; ++panel) {
            const float* b = keys + panel * p.units * kTileColumns;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                Vec sum[kTileRows][kTileVecs] = {};
                multiply<pairs>(sum, queries + tile * kTileRows * p.units, p.units, b, kTileColumns, p.units);
                float* to = scores + tile * kTileRows * p.span + panel * kTileColumns;
                for (int m = 0; m < kTileRows; ++m)
                    for (int i = 0; i < kTileVecs; ++i) store(to + m * p.span + i * kLanes, sum[m][i] * job.scale);
            }
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
            float sums[kTileRows];
            float* w = weights + tile * kTileRows * p.span;
            weigh<pairs>(scores + tile * kTileRows * p.span, p, job.keys, w, sums);
            for (int64_t column = 0; column < p.columns; column += kTileColumns) {
                Vec sum[kTileRows][kTileVecs] = {};
                multiply<pairs>(sum, w, p.span, values + column * p.key_units, kTileColumns, p.key_units);
                for (int m = 0; m < kTileRows && tile * kTileRows + m < there; ++m) {
                    int64_t head, position;
                    at(first + tile * kTileRows + m, head, position);
                    T* out = static_cast<T*>(job.out) + ((row * job.n + position) * job.heads + head) * job.width;
                    const float by = 1.0f / sums[m];
                    for (int i = 0; i < kTileVecs; ++i) {
                        const int64_t from = column + i * kLanes, left = job.width - from;
                        if (left >= kLanes)
                            write(out + from, sum[m][i] * by);
                        else if (left > 0)
                            write_some(out + from, sum[m][i] * by, left);
                    }
                }
            }
        }
    }
}

template <class T, class Row>
void attend_heads(const AttentionJob& job, int64_t row, int64_t first, int64_t last, float* scratch) {
    if (one_query(job)) {
        if (job.width == 64) return attend_one<Row, 64 / Row::kColumns>(job, row, first, last, scratch);
        return attend_one<Row, 0>(job, row, first, last, scratch);
    }
    for (int64_t kv_head = first; kv_head < last; ++kv_head) {
        if constexpr (kPairs && sizeof(T) == 2) {
            if (plan(job).pairs) {
                attend_many<true, T>(job, row, kv_head, scratch);
                continue;
            }
        }
        attend_many<false, T>(job, row, kv_head, scratch);
    }
}

void attend(const AttentionJob& job, int64_t row, int64_t first, int64_t last, float* scratch) {
    job.half ? attend_heads<Bfloat16, Words>(job, row, first, last, scratch)
             : attend_heads<float, Floats>(job, row, first, last, scratch);
}

}  // namespace
}  // namespace ddfast::cpu
