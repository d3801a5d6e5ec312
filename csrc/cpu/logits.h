// Reading a row of logits: conversion, guidance, temperature. ddfast/flow/tokens.py (guide) is the twin.
#pragma once

#include "fast.h"
#include "simd.h"

namespace ddfast::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.40282347e38f;  // the least finite float

// Fills [count, padded(count) + kRowPad) with -inf: loops may run past the end.
DDFAST_INLINE void seal(float* row, int64_t count) {
    const int64_t end = padded(count) + kRowPad;
    for (int64_t i = count; i < end; ++i) row[i] = -kInfinity;
}

DDFAST_INLINE WordVec widen(const uint16_t* from) { return __builtin_convertvector(load<ShortVec>(from), WordVec); }

template <LogitType type>
DDFAST_INLINE Vec load_logits(const void* row, int64_t i) {
    if constexpr (type == LogitType::kFloat32) return load<Vec>(static_cast<const float*>(row) + i);
    const WordVec bits = widen(static_cast<const uint16_t*>(row) + i);
    if constexpr (type == LogitType::kBfloat16) return reinterpret_cast<Vec>(bits << 16);
    const Vec scaled = reinterpret_cast<Vec>((bits & 0x7fffu) << 13) * 0x1p112f;  // subnormals included
    const WordVec special = (bits & 0x7c00u) == 0x7c00u ? WordVec{} + 0x7f800000u : WordVec{};
    return reinterpret_cast<Vec>(reinterpret_cast<WordVec>(scaled) | special | (bits & 0x8000u) << 16);
}

// uncond + guidance (cond - uncond) in float64, rounded once; where both are equal, that value.
DDFAST_INLINE HalfVec guided(HalfVec cond, HalfVec uncond, double guidance) {
    const DoubleVec from = to_double(uncond), to = to_double(cond);
    const DoubleVec way = to == from ? DoubleVec{} : to - from;
    return to_float(from + guidance * way);
}

DDFAST_INLINE Vec guided(Vec cond, Vec uncond, double guidance) {
    return join(guided(lower_half(cond), lower_half(uncond), guidance),
                guided(upper_half(cond), upper_half(uncond), guidance));
}

// Guided logits over the temperature, sealed, from one row of each; uncond may be null. Returns the largest, or NaN if
// one is NaN.
template <LogitType type>
float read_row(const void* cond, const void* uncond, int64_t vocab, double guidance, float divisor, float* out) {
    constexpr int64_t kBytes = type == LogitType::kFloat32 ? 4 : 2;
    Vec top = splat(-kInfinity), odd{};
    const auto put = [&](int64_t i, const void* c, const void* u, int64_t from) {
        Vec v = load_logits<type>(c, from);
        if (uncond) v = guided(v, load_logits<type>(u, from), guidance);
        if (divisor != 1.0f) v = v / divisor;
        store(out + i, v);
        odd += v == v ? Vec{} : splat(1.0f);
        top = larger(v, top);
    };
    const int64_t whole = vocab / kLanes * kLanes, left = vocab - whole;
    constexpr int64_t kAhead = 4096;  // bytes: a page, at whose end the processor itself stops looking ahead
    for (int64_t i = 0; i < whole; i += kLanes) {
        __builtin_prefetch(static_cast<const char*>(cond) + i * kBytes + kAhead);
        if (uncond) __builtin_prefetch(static_cast<const char*>(uncond) + i * kBytes + kAhead);
        put(i, cond, uncond, i);
    }
    if (left > 0) {
        char c[4 * kLanes], u[4 * kLanes];  // the last logits, repeated
        for (int64_t k = 0; k < kLanes; ++k) {
            const int64_t from = (whole + k % left) * kBytes;
            __builtin_memcpy(c + k * kBytes, static_cast<const char*>(cond) + from, kBytes);
            if (uncond) __builtin_memcpy(u + k * kBytes, static_cast<const char*>(uncond) + from, kBytes);
        }
        put(whole, c, u, 0);
    }
    seal(out, vocab);
    return sum_lanes(odd) > 0.0f ? __builtin_nanf("") : max_lanes(top);
}

}  // namespace
}  // namespace ddfast::cpu
