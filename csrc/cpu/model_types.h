// Reading and writing a model's numbers, float or bfloat16 (as uint16_t), as vectors of float, and
// bytes written.
#pragma once

#include "simd.h"
#include "transpose.h"

namespace ddfast::cpu {
namespace {

typedef uint16_t Bfloat16;
typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

DDFAST_INLINE int64_t whole_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

DDFAST_INLINE float to_float(Bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
DDFAST_INLINE float to_float(float x) { return x; }

DDFAST_INLINE Vec read(const float* from) { return load<Vec>(from); }
DDFAST_INLINE Vec read(const Bfloat16* from) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return reinterpret_cast<Vec>(_mm256_slli_epi32(wide, 16));
#else
    return reinterpret_cast<Vec>(__builtin_convertvector(load<ShortVec>(from), WordVec) << 16);
#endif
}

// The first `count` < kLanes values, zeros behind.
template <class T>
DDFAST_INLINE Vec read_some(const T* from, int64_t count) {
    T all[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) all[i] = from[i];
    return read(all);
}

// Rounds to nearest even; NaN stays NaN.
DDFAST_INLINE WordVec round_bits(Vec v) {
    const WordVec bits = reinterpret_cast<WordVec>(v);
    const WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return v == v ? rounded : WordVec{} + 0x7fc0u;
}

DDFAST_INLINE void write(float* to, Vec v) { store(to, v); }
DDFAST_INLINE void write(Bfloat16* to, Vec v) {
#if defined(__AVX512BF16__)
    const __m256bh low = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    __builtin_memcpy(to, &low, sizeof low);
#elif defined(__AVX512F__)
    const __m256i low = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(round_bits(v)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
#else
    store(to, __builtin_convertvector(round_bits(v), ShortVec));
#endif
}

// The lowest eight bits of each lane.
DDFAST_INLINE void write(uint8_t* to, Vec v) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v));
    __builtin_memcpy(to, &bytes, sizeof bytes);
#else
    store(to, __builtin_convertvector(reinterpret_cast<WordVec>(v), ByteVec));
#endif
}

template <class T>
DDFAST_INLINE void write_some(T* to, Vec v, int64_t count) {
    T all[kLanes];
    write(all, v);
    for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

// Calls body(i, read, write) for i = 0, kLanes, ...: whole vectors, then one that reads and writes what is left.
template <class Body>
DDFAST_INLINE void for_lanes(int64_t count, const Body& body) {
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        body(
            i, [](const auto* from) { return read(from); }, [](auto* to, Vec v) { write(to, v); });
    if (const int64_t left = count - whole; left > 0)
        body(
            whole, [left](const auto* from) { return read_some(from, left); },
            [left](auto* to, Vec v) { write_some(to, v, left); });
}

}  // namespace
}  // namespace ddfast::cpu
