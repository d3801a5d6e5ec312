// Attention of one query a row to a cache, scores and sums in float32. Keys and values are read where they lie, once.
#pragma once

#include "layers.h"
#include "model_types.h"
#include "multiply.h"

namespace ddfast::cpu {
namespace {

// One query a row, so that laying out keys and values would be most of the work.
DDFAST_INLINE bool one_query(const AttentionJob& job) { return job.n == 1 && (!job.half || job.width % 2 == 0); }

int64_t attend_one_floats(const AttentionJob& job) {
    const int64_t slices = (job.width + kLanes - 1) / kLanes;  // at most; each has a query and sums of two vectors
    return job.heads * slices * 4 * kLanes + (job.keys + 5) * whole_lanes(job.heads);
}

// Rows of floats: how one query meets keys, and how values are summed, in slices of kLanes columns.
struct Floats {
    typedef float Number;
    static constexpr int kColumns = kLanes;  // of a slice
    struct Query {
        Vec part;
    };
    struct Sum {
        Vec part{};
    };
    DDFAST_INLINE Vec get(const float* from, int64_t count) {
        return count >= kColumns ? read(from) : read_some(from, count);
    }
    DDFAST_INLINE Query query(const float* q, int64_t count) { return {get(q, count)}; }
    DDFAST_INLINE Vec dot(Vec sum, const Query& q, const float* key, int64_t count) {
        return sum + q.part * get(key, count);
    }
    DDFAST_INLINE void add(Sum& sum, float w, const float* value, int64_t count) { sum.part += w * get(value, count); }
    DDFAST_INLINE void put(float* out, const Sum& sum, float by, int64_t count) {
        count >= kColumns ? write(out, sum.part * by) : write_some(out, sum.part * by, count);
    }
};

// Rows of bfloat16, of even length, taken as words of two columns, so that no halves need to be widened apart.
struct Words {
    typedef Bfloat16 Number;
    static constexpr int kColumns = 2 * kLanes;
    struct Query {
        Vec even, odd;  // with kPairs both are in even
    };
    struct Sum {
        Vec even{}, odd{};
    };
    DDFAST_INLINE WordVec get(const Bfloat16* from, int64_t count) {
        if (count >= kColumns) return load<WordVec>(from);
        WordVec words{};
        __builtin_memcpy(&words, from, count * sizeof *from);
        return words;
    }
    DDFAST_INLINE Vec even(WordVec words) { return reinterpret_cast<Vec>(words << 16); }
    DDFAST_INLINE Vec odd(WordVec words) { return reinterpret_cast<Vec>(words & 0xffff0000u); }
    DDFAST_INLINE Query query(const Bfloat16* q, int64_t count) {
        const WordVec words = get(q, count);
        if constexpr (kPairs) return {reinterpret_cast<Vec>(words), Vec{}};
        return {even(words), odd(words)};
    }
    DDFAST_INLINE Vec dot(Vec sum, const Query& q, const Bfloat16* key, int64_t count) {
        const WordVec words = get(key, count);
#if defined(__AVX512BF16__)
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(q.even),
                                                      reinterpret_cast<__m512bh>(words)));
#else
        return sum + q.even * even(words) + q.odd * odd(words);
#endif
    }
    DDFAST_INLINE void add(Sum& sum, float w, const Bfloat16* value, int64_t count) {
        const WordVec words = get(value, count);
        sum.even += w * even(words);
        sum.odd += w * odd(words);
    }
    DDFAST_INLINE void put(Bfloat16* out, const Sum& sum, float by, int64_t count) {
        const WordVec words = round_bits(sum.even * by) | round_bits(sum.odd * by) << 16;
        if (count >= kColumns)
            store(out, words);
        else
            __builtin_memcpy(out, &words, count * sizeof *out);
    }
};

// One query a row: every head of a row at once, key after key, so that a cache whose heads lie side by side is read
// from front to back. Heads first .. last - 1 of the keys. Scores have a head a lane.
template <class Row, int kSlices>
void attend_one(const AttentionJob& job, int64_t row, int64_t first, int64_t last, float* scratch) {
    typedef typename Row::Number T;
    const int64_t group = job.heads / job.kv_heads, heads = (last - first) * group, lanes = whole_lanes(heads);
    const int64_t width = kSlices ? kSlices * Row::kColumns : job.width;
    const int64_t slices = kSlices ? kSlices : (width + Row::kColumns - 1) / Row::kColumns;
    const T* k = static_cast<const T*>(job.k) + row * job.k_row + first * job.k_head;
    const T* v = static_cast<const T*>(job.v) + row * job.v_row + first * job.v_head;
    typename Row::Query* query = reinterpret_cast<typename Row::Query*>(scratch);
    typename Row::Sum* sums = reinterpret_cast<typename Row::Sum*>(query + heads * slices);
    float* scores = reinterpret_cast<float*>(sums + heads * slices);
    float* by = scores + job.keys * lanes;
    int64_t* key_of = reinterpret_cast<int64_t*>(by + lanes);  // where each head's keys and values begin
    int64_t* value_of = key_of + heads;
    for (int64_t h = 0; h < heads; ++h) {
        key_of[h] = h / group * job.k_head;
        value_of[h] = h / group * job.v_head;
        const T* q = static_cast<const T*>(job.q) + row * job.q_row + (first * group + h) * job.q_head;
        for (int64_t s = 0; s < slices; ++s) {
            query[h * slices + s] = Row::query(q + s * Row::kColumns, width - s * Row::kColumns);
            sums[h * slices + s] = {};
        }
    }

    for (int64_t j = 0; j < job.keys; ++j)
        for (int64_t block = 0; block < lanes; block += kLanes) {
            Vec dots[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                dots[i] = Vec{};
                const int64_t h = block + i;
                if (h >= heads) continue;
                const T* key = k + j * job.k_position + key_of[h];
                for (int64_t s = 0; s < slices; ++s)
                    dots[i] =
                        Row::dot(dots[i], query[h * slices + s], key + s * Row::kColumns, width - s * Row::kColumns);
            }
            store(scores + j * lanes + block, sums_of<kLanes>(dots) * job.scale);
        }

    // Weights e^(score - largest); their sum is NaN if a score is NaN or infinite, which power_of_two would hide.
    for (int64_t block = 0; block < lanes; block += kLanes) {
        Vec top = load<Vec>(scores + block), total{};
        for (int64_t j = 1; j < job.keys; ++j) top = larger(load<Vec>(scores + j * lanes + block), top);
        for (int64_t j = 0; j < job.keys; ++j) {
            const Vec below = load<Vec>(scores + j * lanes + block) - top;
            const Vec w = power_of_two(below * 1.44269504f);
            store(scores + j * lanes + block, w);
            total += w + below * 0.0f;
        }
        store(by + block, 1.0f / total);
    }

    for (int64_t j = 0; j < job.keys; ++j)
        for (int64_t h = 0; h < heads; ++h) {
            const T* value = v + j * job.v_position + value_of[h];
            for (int64_t s = 0; s < slices; ++s)
                Row::add(sums[h * slices + s], scores[j * lanes + h], value + s * Row::kColumns,
                         width - s * Row::kColumns);
        }
    T* out = static_cast<T*>(job.out) + (row * job.heads + first * group) * width;
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t s = 0; s < slices; ++s)
            Row::put(out + h * width + s * Row::kColumns, sums[h * slices + s], by[h], width - s * Row::kColumns);
}

}  // namespace
}  // namespace ddfast::cpu
