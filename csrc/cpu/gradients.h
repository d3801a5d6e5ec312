// The loops of training.h.
#pragma once

#include "int8.h"
#include "norms.h"
#include "training.h"

namespace ddfast::cpu {
namespace {

constexpr float kLog2E = 1.44269504f;

// The derivative of gelu: with s = 1 / (1 + e^-2u), x s is gelu(x).
DDFAST_INLINE Vec gelu_slope(Vec x) {
    const Vec square = x * x;
    const Vec power = x * (square * (-2.30220819f * 0.044715f) - 2.30220819f);  // -2u / ln 2
    const Vec s = 1.0f / (1.0f + power_of_two(smaller(power, splat(126.0f))));
    return s + x * s * (1.0f - s) * (square * (3 * 1.59576912f * 0.044715f) + 1.59576912f);
}

template <class T>
void gelu_part(const GeluJob& job, int64_t first, int64_t last) {
    const T* x = static_cast<const T*>(job.x) + first;
    const T* dy = static_cast<const T*>(job.dy) + first;
    T* out = static_cast<T*>(job.out) + first;
    if (job.dy)
        for_lanes(last - first, [&](int64_t i, const auto& get, const auto& put) {
            put(out + i, get(dy + i) * gelu_slope(get(x + i)));
        });
    else
        for_lanes(last - first, [&](int64_t i, const auto& get, const auto& put) { put(out + i, gelu(get(x + i))); });
}

void gelu_part(const GeluJob& job, int64_t first, int64_t last) {
    job.half ? gelu_part<Bfloat16>(job, first, last) : gelu_part<float>(job, first, last);
}

template <class T>
void glu_part(const GluJob& job, int64_t first, int64_t last) {
    const T* gate = static_cast<const T*>(job.gate) + first;
    const T* up = static_cast<const T*>(job.up) + first;
    const T* dout = static_cast<const T*>(job.dout) + first;
    T* out = static_cast<T*>(job.out) + first;
    T* dgate = static_cast<T*>(job.dgate) + first;
    T* dup = static_cast<T*>(job.dup) + first;
    for_lanes(last - first, [&](int64_t i, const auto& get, const auto& put) {
        const Vec g = get(gate + i), u = get(up + i);
        const Vec s = 1.0f / (1.0f + power_of_two(smaller(g * -kLog2E, splat(126.0f))));
        if (!job.dout) return put(out + i, g * s * u);
        const Vec d = get(dout + i);
        put(dgate + i, d * u * s * (1.0f + g * (1.0f - s)));
        put(dup + i, d * g * s);
    });
}

void glu_part(const GluJob& job, int64_t first, int64_t last) {
    job.half ? glu_part<Bfloat16>(job, first, last) : glu_part<float>(job, first, last);
}

template <class T>
void norm_gradient(const NormGradientJob& job, int64_t row, int64_t part) {
    const int64_t dim = job.dim, first = part * kPart, last = first + kPart < job.n ? first + kPart : job.n;
    const float* scale = job.scale ? job.scale + row * job.scale_stride : nullptr;
    const auto by = [&](int64_t i, const auto& get) { return scale ? 1.0f + get(scale + i) : get(job.weight + i); };
    float* dscale = job.sums + (row * parts_of(job.n) + part) * 2 * dim;
    float* dshift = dscale + dim;
    for (int64_t i = 0; i < 2 * dim; ++i) dscale[i] = 0.0f;
    for (int64_t position = row * job.n + first; position < row * job.n + last; ++position) {
        const float* x = job.x + position * dim;
        const T* dy = static_cast<const T*>(job.dy) + position * dim;
        float* dx = job.dx + position * dim;
        Vec sum{};
        for_lanes(dim, [&](int64_t i, const auto& get, const auto&) { sum += get(x + i); });
        const float mean = job.scale ? sum_lanes(sum) / dim : 0.0f;
        const float factor = inverse_deviation(x, dim, mean, job.eps);
        Vec plain{}, turned{};  // sums of a = dy by and of a xhat
        for_lanes(dim, [&](int64_t i, const auto& get, const auto& put) {
            const Vec d = get(dy + i), hat = (get(x + i) - mean) * factor, a = d * by(i, get);
            plain += a;
            turned += a * hat;
            put(dscale + i, get(dscale + i) + d * hat);
            put(dshift + i, get(dshift + i) + d);
        });
        const float m1 = job.scale ? sum_lanes(plain) / dim : 0.0f, m2 = sum_lanes(turned) / dim;
        for_lanes(dim, [&](int64_t i, const auto& get, const auto& put) {
            const Vec hat = (get(x + i) - mean) * factor;
            put(dx + i, factor * (get(dy + i) * by(i, get) - m1 - hat * m2));
        });
    }
}

void norm_gradient_part(const NormGradientJob& job, int64_t row, int64_t part) {
    job.half ? norm_gradient<Bfloat16>(job, row, part) : norm_gradient<float>(job, row, part);
}

template <class T>
void gate(const GateJob& job, int64_t row, int64_t part) {
    const int64_t dim = job.dim, first = part * kPart, last = first + kPart < job.n ? first + kPart : job.n;
    const float* by = job.gate + row * job.gate_stride;
    float* sums = job.sums + (row * parts_of(job.n) + part) * dim;
    if (!job.out)
        for (int64_t i = 0; i < dim; ++i) sums[i] = 0.0f;
    for (int64_t position = row * job.n + first; position < row * job.n + last; ++position) {
        const float* x = job.x + position * dim;
        const T* branch = static_cast<const T*>(job.branch) + position * dim;
        if (job.out) {
            float* out = job.out + position * dim;
            for_lanes(dim, [&](int64_t i, const auto& get, const auto& put) {
                put(out + i, get(x + i) + get(by + i) * get(branch + i));
            });
        } else {
            T* dbranch = static_cast<T*>(job.dbranch) + position * dim;
            for_lanes(dim, [&](int64_t i, const auto& get, const auto& put) {
                const Vec d = get(x + i);
                put(dbranch + i, d * get(by + i));
                put(sums + i, get(sums + i) + d * get(branch + i));
            });
        }
    }
}

void gate_part(const GateJob& job, int64_t row, int64_t part) {
    job.half ? gate<Bfloat16>(job, row, part) : gate<float>(job, row, part);
}

// The gradient of to = from * factor / |from|, from that of to; returns that of factor.
template <class T>
DDFAST_INLINE float normed_gradient(const T* from, const float* dto, T* dfrom, int64_t width, float factor) {
    Vec squares{}, product{};
    for_lanes(width, [&](int64_t i, const auto& get, const auto&) {
        const Vec v = get(from + i);
        squares += v * v;
        product += v * get(dto + i);
    });
    const float square = sum_lanes(squares), length = __builtin_sqrtf(square);
    const float by = 1.0f / (length > 1e-12f ? length : 1e-12f), along = sum_lanes(product) * by;
    const float back = length > 1e-12f ? along * by : 0.0f;
    for_lanes(width, [&](int64_t i, const auto& get, const auto& put) {
        put(dfrom + i, factor * by * (get(dto + i) - get(from + i) * back));
    });
    return along;
}

template <class T>
void split_heads(const HeadsJob& job, int64_t row, int64_t part) {
    const int64_t width = job.width, heads = job.heads, first = part * kPart;
    const int64_t last = first + kPart < job.n ? first + kPart : job.n;
    float* sums = job.sums + (row * parts_of(job.n) + part) * heads;
    for (int64_t h = 0; h < heads; ++h) {
        float sum = 0.0f;
        for (int64_t position = first; position < last; ++position) {
            const int64_t in = ((row * job.n + position) * 3 * heads + h) * width, next = heads * width;
            const int64_t out = ((row * heads + h) * job.n + position) * width;
            const T* q = static_cast<const T*>(job.qkv) + in;
            T* v = static_cast<T*>(job.v) + out;
            if (!job.dqkv) {
                normed(q, job.q + out, width, job.scale[h]);
                normed(q + next, job.k + out, width, 1.0f);
                __builtin_memcpy(v, q + 2 * next, width * sizeof(T));
                continue;
            }
            T* dq = static_cast<T*>(job.dqkv) + in;
            sum += normed_gradient(q, job.q + out, dq, width, job.scale[h]);
            normed_gradient(q + next, job.k + out, dq + next, width, 1.0f);
            __builtin_memcpy(dq + 2 * next, v, width * sizeof(T));
        }
        if (job.dqkv) sums[h] = sum;
    }
}

void split_heads_part(const HeadsJob& job, int64_t row, int64_t part) {
    job.half ? split_heads<Bfloat16>(job, row, part) : split_heads<float>(job, row, part);
}

template <class T>
void turn_heads(const TurnJob& job, int64_t row, int64_t part) {
    const int64_t width = job.width, pairs = width / 2, per = job.heads + 2 * job.kv_heads;
    void* const sides[] = {job.q, job.k, job.v};
    const int64_t firsts[] = {0, job.heads, job.heads + job.kv_heads};
    const int64_t first = part * kPart, last = first + kPart < job.n ? first + kPart : job.n;
    for (int64_t position = first; position < last; ++position) {
        const float* cos = job.rope + position * pairs;
        const float* sin = cos + job.n * pairs;
        for (int64_t h = 0; h < per; ++h) {
            T* there = static_cast<T*>(job.qkv) + ((row * job.n + position) * per + h) * width;
            const int side = h < job.heads ? 0 : h < job.heads + job.kv_heads ? 1 : 2;
            const int64_t heads = side == 0 ? job.heads : job.kv_heads, head = h - firsts[side];
            T* here = static_cast<T*>(sides[side]) + ((row * heads + head) * job.n + position) * width;
            const T* from = job.back ? here : there;
            T* to = job.back ? there : here;
            if (side < 2)
                turned(from, to, pairs, cos, sin);
            else
                __builtin_memcpy(to, from, width * sizeof(T));
        }
    }
}

void turn_heads_part(const TurnJob& job, int64_t row, int64_t part) {
    job.half ? turn_heads<Bfloat16>(job, row, part) : turn_heads<float>(job, row, part);
}

template <class T>
void softmax(const SoftmaxJob& job, const float* scores, int64_t at, T* p) {
    const int64_t keys = job.keys, whole = keys / kLanes * kLanes;
    const float self = job.own_score[at];
    Vec top = splat(self), strange{};  // power_of_two hides NaN
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec v = read(scores + i);
        top = larger(v, top);
        strange += v * 0.0f;
    }
    float best = max_lanes(top), odd = sum_lanes(strange) + self * 0.0f;
    for (int64_t i = whole; i < keys; ++i) {
        best = scores[i] > best ? scores[i] : best;
        odd += scores[i] * 0.0f;
    }
    const auto weight = [&](Vec score) { return power_of_two((score - best) * kLog2E); };
    Vec sum{};
    for (int64_t i = 0; i < whole; i += kLanes) sum += weight(read(scores + i));
    const float mine = weight(splat(self))[0];
    float total = sum_lanes(sum) + mine + odd;
    for (int64_t i = whole; i < keys; ++i) total += weight(splat(scores[i]))[0];
    job.own[at] = mine / total;
    job.lse[at] = best + __builtin_logf(total);
    const float by = 1.0f / total;
    for_lanes(keys, [&](int64_t i, const auto& get, const auto& put) { put(p + i, weight(get(scores + i)) * by); });
}

template <class T>
void softmax_gradient(const SoftmaxJob& job, const float* scores, int64_t at, T* p, int64_t row) {
    const float lse = job.lse[at], carried = job.carried[at], factor = job.factor;
    const T* dp = static_cast<const T*>(job.dp) + row * job.keys;
    T* ds = static_cast<T*>(job.ds) + row * job.keys;
    for_lanes(job.keys, [&](int64_t i, const auto& get, const auto& put) {
        const Vec weight = power_of_two((get(scores + i) - lse) * kLog2E), d = get(dp + i);
        put(p + i, weight);
        put(ds + i, weight * (d - carried) * factor);
    });
}

template <class T>
void softmax_row(const SoftmaxJob& job, int64_t row) {
    const int64_t at = row / job.n * job.stride + row % job.n;
    const float* scores = job.scores + row * job.keys;
    T* p = static_cast<T*>(job.p) + row * job.keys;
    job.own ? softmax(job, scores, at, p) : softmax_gradient(job, scores, at, p, row);
}

void softmax_row(const SoftmaxJob& job, int64_t row) {
    job.half ? softmax_row<Bfloat16>(job, row) : softmax_row<float>(job, row);
}

}  // namespace
}  // namespace ddfast::cpu
