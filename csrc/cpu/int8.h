// Around a product of whole numbers: rows to codes before it, its rows to a model's numbers behind.
#pragma once

#include "layers.h"
#include "model_types.h"

namespace ddfast::cpu {
namespace {

// The largest |x| of a row. Found among the bits, where NaN is above infinity and so is not lost.
template <class T>
DDFAST_INLINE float largest(const T* x, int64_t width) {
    WordVec top{};
    for_lanes(width, [&](int64_t i, const auto& get, const auto&) {
        const WordVec bits = reinterpret_cast<WordVec>(get(x + i)) & 0x7fffffffu;
        top = bits > top ? bits : top;
    });
    uint32_t most = 0;
    for (int i = 0; i < kLanes; ++i) most = top[i] > most ? top[i] : most;
    float value;
    __builtin_memcpy(&value, &most, sizeof value);
    return value;
}

template <class T>
void quantize(const QuantizeJob& job, int64_t row) {
    constexpr float kLimit = 127.0f, kLeast = 0x1p-126f * kLimit;
    constexpr float kZero = 0x1.8p23f + 128.0f;  // adding it rounds, and leaves the code in the low bits
    const T* x = static_cast<const T*>(job.x) + row * job.width;
    uint8_t* codes = job.codes + row * job.width;
    const float most = largest(x, job.width);
    const float scale = (most < kLeast ? kLeast : most) / kLimit, inverse = 1.0f / scale;
    job.scale[row] = scale;
    for_lanes(job.width,
              [&](int64_t i, const auto& get, const auto& put) { put(codes + i, get(x + i) * inverse + kZero); });
}

void quantize_row(const QuantizeJob& job, int64_t row) {
    job.half ? quantize<Bfloat16>(job, row) : quantize<float>(job, row);
}

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2u).
DDFAST_INLINE Vec gelu(Vec x) {
    const Vec power = x * (x * x * (-2.30220819f * 0.044715f) - 2.30220819f);  // -2u / ln 2
    return x / (1.0f + power_of_two(smaller(power, splat(126.0f))));
}

template <class T>
void scale(const ScaleJob& job, int64_t row) {
    const float* product = job.product + row * job.width;
    const float *bias = job.bias, by = job.scale[row];
    T* out = static_cast<T*>(job.out) + row * job.width;
    if (job.gelu)
        for_lanes(job.width, [&](int64_t i, const auto& get, const auto& put) {
            put(out + i, gelu(get(product + i) * by + get(bias + i)));
        });
    else
        for_lanes(job.width, [&](int64_t i, const auto& get, const auto& put) {
            put(out + i, get(product + i) * by + get(bias + i));
        });
}

void scale_row(const ScaleJob& job, int64_t row) { job.half ? scale<Bfloat16>(job, row) : scale<float>(job, row); }

}  // namespace
}  // namespace ddfast::cpu
