// The small matrix product under attention and quantizer, with its accumulators in registers.
#pragma once

#include "model_types.h"

namespace ddfast::cpu {
namespace {

constexpr int kTileRows = 6;                          // rows of a product made at once
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;       // and vectors of columns
constexpr int64_t kTileColumns = kTileVecs * kLanes;  // 64, 16 or 8

// Two bfloat16 numbers in the place of a float: Zen 4, Cooper Lake and later multiply both at once.
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

template <bool pairs>
DDFAST_INLINE Vec multiply_add(Vec sum, const float* a, Vec b) {
#if defined(__AVX512BF16__)
    if constexpr (pairs) {
        const __m512 both = _mm512_set1_ps(*a);
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(both),
                                                      reinterpret_cast<__m512bh>(b)));
    }
#endif
    return sum + *a * b;
}

// sum[m][i] += a[m][j] b[j][i] over j < depth: rows of a at lda, of b at ldb. With pairs, each j stands for two.
template <bool pairs>
DDFAST_INLINE void multiply(Vec (&sum)[kTileRows][kTileVecs], const float* a, int64_t lda, const float* b, int64_t ldb,
                            int64_t depth) {
    for (int64_t j = 0; j < depth; ++j) {
        Vec column[kTileVecs];
#pragma GCC unroll 4
        for (int i = 0; i < kTileVecs; ++i) column[i] = load<Vec>(b + j * ldb + i * kLanes);
#pragma GCC unroll 6
        for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
            for (int i = 0; i < kTileVecs; ++i) sum[m][i] = multiply_add<pairs>(sum[m][i], a + m * lda + j, column[i]);
    }
}

}  // namespace
}  // namespace ddfast::cpu
