// Residual sums, norms, the gated unit, and what is done to queries and keys before they meet.
#pragma once

#include "layers.h"
#include "model_types.h"

namespace ddfast::cpu {
namespace {

// 1 / sqrt(variance + eps)
DDFAST_INLINE float inverse_deviation(const float* x, int64_t dim, float mean, float eps) {
    Vec squares{};
    const int64_t whole = dim / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec off = read(x + i) - mean;
        squares += off * off;
    }
    float square = sum_lanes(squares);
    for (int64_t i = whole; i < dim; ++i) square += (x[i] - mean) * (x[i] - mean);
    return 1.0f / __builtin_sqrtf(square / dim + eps);
}

template <class T>
void norm_row(const NormJob& job, int64_t row) {
    const int64_t dim = job.dim, group = row / job.per;
    float* x = job.x + row * dim;
    T* out = static_cast<T*>(job.out) + row * dim;
    Vec sum{};
    if (job.branch) {
        const T* branch = static_cast<const T*>(job.branch) + row * dim;
        const float* gate = job.gate ? job.gate + group * job.gate_stride : nullptr;
        for_lanes(dim, [&](int64_t i, const auto& get, const auto& put) {
            const Vec more = get(branch + i);
            const Vec v = get(x + i) + (gate ? get(gate + i) * more : more);
            put(x + i, v);
            sum += v;
        });
    } else if (job.scale) {
        for_lanes(dim, [&](int64_t i, const auto& get, const auto&) { sum += get(x + i); });
    }
    const float mean = job.scale ? sum_lanes(sum) / dim : 0.0f;
    const float factor = inverse_deviation(x, dim, mean, job.eps);
    if (job.scale) {
        const float* scale = job.scale + group * job.scale_stride;
        const float* shift = job.shift + group * job.shift_stride;
        for_lanes(dim, [&](int64_t i, const auto& get, const auto& put) {
            put(out + i, (get(x + i) - mean) * factor * (1.0f + get(scale + i)) + get(shift + i));
        });
    } else {
        const float* weight = job.weight;
        for_lanes(dim, [&](int64_t i, const auto& get, const auto& put) {
            put(out + i, get(x + i) * factor * get(weight + i));
        });
    }
}

void norm_rows(const NormJob& job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) job.half ? norm_row<Bfloat16>(job, row) : norm_row<float>(job, row);
}

template <class T>
void swiglu(const SwigluJob& job, int64_t row) {
    const T* gate = static_cast<const T*>(job.gate_up) + 2 * row * job.hidden;
    const T* up = gate + job.hidden;
    T* out = static_cast<T*>(job.out) + row * job.hidden;
    for_lanes(job.hidden, [&](int64_t i, const auto& get, const auto& put) {
        const Vec g = get(gate + i);
        const Vec below = power_of_two(smaller(g * -1.44269504f, splat(126.0f)));  // e^-g
        put(out + i, g / (1.0f + below) * get(up + i));
    });
}

void swiglu_row(const SwigluJob& job, int64_t row) { job.half ? swiglu<Bfloat16>(job, row) : swiglu<float>(job, row); }

// to = from * factor / |from|
template <class T, class U>
DDFAST_INLINE void normed(const T* from, U* to, int64_t width, float factor) {
    Vec squares{};
    for_lanes(width, [&](int64_t i, const auto& get, const auto&) {
        const Vec v = get(from + i);
        squares += v * v;
    });
    const float length = __builtin_sqrtf(sum_lanes(squares));
    const float by = factor / (length > 1e-12f ? length : 1e-12f);
    for_lanes(width, [&](int64_t i, const auto& get, const auto& put) { put(to + i, get(from + i) * by); });
}

// Turns the pairs (2j, 2j + 1) by cos[j], sin[j].
DDFAST_INLINE void turned(const float* from, float* to, int64_t pairs, const float* cos, const float* sin) {
    for (int64_t j = 0; j < pairs; ++j) {
        const float even = from[2 * j], odd = from[2 * j + 1];
        to[2 * j] = even * cos[j] - odd * sin[j];
        to[2 * j + 1] = odd * cos[j] + even * sin[j];
    }
}

// A pair of bfloat16 is one word, so that its halves need not be parted.
DDFAST_INLINE void turned(const Bfloat16* from, Bfloat16* to, int64_t pairs, const float* cos, const float* sin) {
    int64_t j = 0;
    for (; j + kLanes <= pairs; j += kLanes) {
        const WordVec both = load<WordVec>(from + 2 * j);
        const Vec even = reinterpret_cast<Vec>(both << 16), odd = reinterpret_cast<Vec>(both & 0xffff0000u);
        const Vec c = load<Vec>(cos + j), s = load<Vec>(sin + j);
        store(to + 2 * j, round_bits(even * c - odd * s) | round_bits(odd * c + even * s) << 16);
    }
    for (; j < pairs; ++j) {
        const float even = to_float(from[2 * j]), odd = to_float(from[2 * j + 1]);
        const Vec two = {even * cos[j] - odd * sin[j], odd * cos[j] + even * sin[j]};
        write_some(to + 2 * j, two, 2);
    }
}

template <class T>
void append_at(const AppendJob& job, int64_t row, int64_t position, float* scratch) {
    const int64_t width = job.width, per = job.heads + 2 * job.kv_heads;
    T* q = static_cast<T*>(job.qkv) + (row * job.n + position) * per * width;
    const T* k = q + job.heads * width;
    const T* v = k + job.kv_heads * width;
    T* keys = static_cast<T*>(job.cache) + row * job.row_stride + (job.start + position) * job.position_stride;
    T* values = keys + job.side_stride;
    float* cos = scratch;
    float* sin = scratch + whole_lanes(width);
    if (job.rope) {
        const float* rope = job.rope + (job.start + position) * width;
        for (int64_t j = 0; j < width / 2; ++j) {
            cos[j] = rope[2 * j];
            sin[j] = rope[2 * j + 1];
        }
    }
    for (int64_t h = 0; h < job.heads; ++h) {
        if (job.scale) normed(q + h * width, q + h * width, width, job.scale[h]);
        if (job.rope) turned(q + h * width, q + h * width, width / 2, cos, sin);
    }
    for (int64_t h = 0; h < job.kv_heads; ++h) {
        T* key = keys + h * job.head_stride;
        if (job.scale)
            normed(k + h * width, key, width, 1.0f);
        else if (job.rope)
            turned(k + h * width, key, width / 2, cos, sin);
        else
            __builtin_memcpy(key, k + h * width, width * sizeof(T));
        __builtin_memcpy(values + h * job.head_stride, v + h * width, width * sizeof(T));
    }
}

void append_row(const AppendJob& job, int64_t row, int64_t position, float* scratch) {
    job.half ? append_at<Bfloat16>(job, row, position, scratch) : append_at<float>(job, row, position, scratch);
}

}  // namespace
}  // namespace ddfast::cpu
