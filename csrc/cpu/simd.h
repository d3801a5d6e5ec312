// Vectors as wide as the instruction set this file is compiled for, by the compiler's vector extensions, and the few
// things these lack. Everything has internal linkage: each instruction set gets its own copy.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define DDFAST_INLINE static inline __attribute__((always_inline))

namespace ddfast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float HalfVec __attribute__((vector_size(2 * kLanes)));
typedef double DoubleVec __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 of them
typedef int64_t LongVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t ShortVec __attribute__((vector_size(2 * kLanes)));
typedef uint32_t WordVec __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
DDFAST_INLINE V load(const T* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
DDFAST_INLINE void store(T* to, V v) {
    __builtin_memcpy(to, &v, sizeof v);
}

DDFAST_INLINE Vec splat(float x) { return x - Vec{}; }
DDFAST_INLINE DoubleVec splat_double(double x) { return x - DoubleVec{}; }
DDFAST_INLINE HalfVec lower_half(Vec v) {
#if defined(__AVX512F__)
    return reinterpret_cast<HalfVec>(_mm512_castps512_ps256(reinterpret_cast<__m512>(v)));
#else
    return load<HalfVec>(&v);
#endif
}

DDFAST_INLINE HalfVec upper_half(Vec v) {
#if defined(__AVX512F__)
    return reinterpret_cast<HalfVec>(_mm512_extractf32x8_ps(reinterpret_cast<__m512>(v), 1));
#else
    return load<HalfVec>(reinterpret_cast<const float*>(&v) + kLanes / 2);
#endif
}

DDFAST_INLINE Vec join(HalfVec lower, HalfVec upper) {
#if defined(__AVX512F__)
    const __m512 low = _mm512_castps256_ps512(reinterpret_cast<__m256>(lower));
    return reinterpret_cast<Vec>(_mm512_insertf32x8(low, reinterpret_cast<__m256>(upper), 1));
#elif defined(__AVX2__)
    const __m256 low = _mm256_castps128_ps256(reinterpret_cast<__m128>(lower));
    return reinterpret_cast<Vec>(_mm256_insertf128_ps(low, reinterpret_cast<__m128>(upper), 1));
#else
    Vec both;
    store(&both, lower);
    store(reinterpret_cast<float*>(&both) + kLanes / 2, upper);
    return both;
#endif
}

// Conversions that GCC takes apart into narrower ones.
DDFAST_INLINE DoubleVec to_double(HalfVec v) {
#if defined(__AVX512F__)
    return reinterpret_cast<DoubleVec>(_mm512_cvtps_pd(reinterpret_cast<__m256>(v)));
#elif defined(__AVX2__)
    return reinterpret_cast<DoubleVec>(_mm256_cvtps_pd(reinterpret_cast<__m128>(v)));
#else
    return __builtin_convertvector(v, DoubleVec);
#endif
}

DDFAST_INLINE HalfVec to_float(DoubleVec v) {
#if defined(__AVX512F__)
    return reinterpret_cast<HalfVec>(_mm512_cvtpd_ps(reinterpret_cast<__m512d>(v)));
#elif defined(__AVX2__)
    return reinterpret_cast<HalfVec>(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(v)));
#else
    return __builtin_convertvector(v, HalfVec);
#endif
}

// a > b ? a : b, and a < b ? a : b, in one instruction: compilers do not find it, for the sake of NaN and -0.
DDFAST_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<Vec>(_mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
    return a > b ? a : b;
#endif
}

DDFAST_INLINE Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<Vec>(_mm_min_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
    return a < b ? a : b;
#endif
}

// Bit i is set where lane i of a is at least that of b.
DDFAST_INLINE uint32_t at_least(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(a >= b));
#elif defined(__SSE2__)
    return _mm_movemask_ps(reinterpret_cast<__m128>(a >= b));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
    return bits;
#endif
}

// Writes the lanes whose bit is set, in order, and up to kLanes values in all; returns how many were set.
template <class V, class T>
DDFAST_INLINE int compress(T* to, V v, uint32_t bits) {
    static_assert(sizeof(T) == 4 && sizeof(V) == 4 * kLanes, "32-bit lanes");
#if defined(__AVX512F__)
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), reinterpret_cast<__m512i>(v)));
    return __builtin_popcount(bits);
#else
    T lanes[kLanes];
    store(lanes, v);
    int count = 0;
    for (int i = 0; i < kLanes; ++i) {
        to[count] = lanes[i];
        count += bits >> i & 1;
    }
    return count;
#endif
}

DDFAST_INLINE float sum_lanes(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
    float sum = v[0];
    for (int i = 1; i < kLanes; ++i) sum += v[i];
    return sum;
#endif
}

DDFAST_INLINE double sum_lanes(DoubleVec v) {
    double sum = v[0];
    for (int i = 1; i < kLanes / 2; ++i) sum += v[i];
    return sum;
}

DDFAST_INLINE float max_lanes(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    float top = v[0];
    for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

// 2^x for -86 <= x < 128, to 2e-7. Below it stays at 2^-86, 1e-26: nothing beside 1, and far from the subnormal numbers
// that slow down what is done with them.
DDFAST_INLINE Vec power_of_two(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const Vec clamped = larger(x, splat(-86.0f));
    const Vec shifted = clamped + magic;
    const Vec r = clamped - (shifted - magic);  // |r| <= 1/2
    Vec p = splat(1.326472731e-3f);
    p = p * r + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
    return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
}

// e^x for x <= 0 in float64, to about 1 ulp; 0 below -700.
DDFAST_INLINE DoubleVec exponential(DoubleVec x) {
    const DoubleVec magic = splat_double(6755399441055744.0);  // 1.5 * 2^52
    const DoubleVec clamped = x > -700.0 ? x : splat_double(-700.0);
    const DoubleVec shifted = clamped * 1.4426950408889634 + magic;
    const DoubleVec n = shifted - magic;
    const DoubleVec r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    DoubleVec p = splat_double(1.0 / 6227020800.0);  // the Taylor series to r^13
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const LongVec power = reinterpret_cast<LongVec>(p) + (reinterpret_cast<LongVec>(shifted) << 52);
    return x > -700.0 ? reinterpret_cast<DoubleVec>(power) : DoubleVec{};
}

}  // namespace
}  // namespace ddfast::cpu
