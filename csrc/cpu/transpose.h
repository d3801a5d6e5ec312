// Square transposes, and sums across lanes, in registers, for any power of two of lanes.
#pragma once

#include <utility>

#include "simd.h"

namespace ddfast::cpu {
namespace {

template <int kSize>
struct Lane {
    typedef float Floats __attribute__((vector_size(4 * kSize)));
    typedef int32_t Ints __attribute__((vector_size(4 * kSize)));
};

template <int kSize, int... kFrom>
DDFAST_INLINE typename Lane<kSize>::Floats shuffle(typename Lane<kSize>::Floats a, typename Lane<kSize>::Floats b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, kFrom...);
#else
    return __builtin_shuffle(a, b, typename Lane<kSize>::Ints{kFrom...});
#endif
}

// Exchanges the odd blocks of kStep lanes of a with the even ones of b.
template <int kSize, int kStep, int... kLane>
DDFAST_INLINE void exchange(typename Lane<kSize>::Floats& a, typename Lane<kSize>::Floats& b,
                            std::integer_sequence<int, kLane...>) {
    const auto low = shuffle<kSize, ((kLane & kStep) ? kSize + kLane - kStep : kLane)...>(a, b);
    const auto high = shuffle<kSize, ((kLane & kStep) ? kSize + kLane : kLane + kStep)...>(a, b);
    a = low;
    b = high;
}

// Transposes kSize rows of kSize lanes.
template <int kSize, int kStep = 1>
DDFAST_INLINE void transpose(typename Lane<kSize>::Floats* rows) {
    if constexpr (kStep < kSize) {
#pragma GCC unroll 16
        for (int i = 0; i < kSize; ++i)
            if (!(i & kStep))
                exchange<kSize, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kSize>{});
        transpose<kSize, 2 * kStep>(rows);
    }
}

// The sums of kSize rows of kSize lanes, one a lane: a transpose that adds as it goes. The rows are lost.
template <int kSize, int kStep = 1>
DDFAST_INLINE typename Lane<kSize>::Floats sums_of(typename Lane<kSize>::Floats* rows) {
    if constexpr (kStep < kSize) {
#pragma GCC unroll 8
        for (int i = 0; i < kSize; i += 2 * kStep) {
            exchange<kSize, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kSize>{});
            rows[i] = rows[i] + rows[i + kStep];
        }
        return sums_of<kSize, 2 * kStep>(rows);
    } else {
        return rows[0];
    }
}

}  // namespace
}  // namespace ddfast::cpu
