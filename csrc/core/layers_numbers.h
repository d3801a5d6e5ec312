// The numbers that a model's tensors hold, float32, bfloat16 and float16, read and written several at a time.
// Arithmetic is float32; results are rounded to the nearest, ties to even.
#pragma once

#include <cmath>

#include "ieee.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define DDFAST_MEMBER __host__ __device__ __forceinline__
#define DDFAST_UNROLL_4 _Pragma("unroll 4")
#else
#define DDFAST_MEMBER inline __attribute__((always_inline))
#define DDFAST_UNROLL_4
#endif

namespace ddfast {

enum class Number : int { kFloat, kBf16, kHalf };

struct Bf16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

DDFAST_HD float to_float(float x) { return x; }
DDFAST_HD float to_float(Bf16 x) { return bits_float(uint32_t{x.bits} << 16).value; }

DDFAST_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    const uint32_t magnitude = (x.bits & 0x7FFFu) << 13, sign = (x.bits & 0x8000u) << 16;
    const uint32_t finite = float_bits({bits_float(magnitude).value * 0x1p112f});  // exact, subnormal numbers too
    return bits_float(sign | (magnitude < 0x7C00u << 13 ? finite : magnitude | 0x7F800000u)).value;
#endif
}

DDFAST_HD void set(float& to, float x) { to = x; }

DDFAST_HD void set(Bf16& to, float x) {
#if defined(__CUDA_ARCH__)
    to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t bits = float_bits({x});
    to.bits = static_cast<uint16_t>(x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
#endif
}

DDFAST_HD void set(Half& to, float x) {
#if defined(__CUDA_ARCH__)
    to.bits = __half_as_ushort(__float2half_rn(x));
#else
    const uint32_t bits = float_bits({x}), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which the sum rounds to
        half = float_bits({bits_float(magnitude).value + 0.5f}) - 0x3F000000u;
    } else {
        half = (magnitude - 0x38000000u + 0x0FFFu + (magnitude >> 13 & 1)) >> 13;
        if (half > 0x7C00u) half = 0x7C00u;
    }
    to.bits = static_cast<uint16_t>(x != x ? 0x7FFFu : sign | half);
#endif
}

// What rows are quantised to: whole numbers with 128 for 0, and floating ones of 4 bits exponent and 3 mantissa.
struct Byte {
    static constexpr float kLimit = 127;
    uint8_t bits;
};

struct E4m3 {
    static constexpr float kLimit = 448;
    uint8_t bits;
};

// x in [-127, 127]; of NaN, anything. Adding 1.5 * 2^23 rounds, and leaves the whole number in the low bits.
DDFAST_HD void set(Byte& to, float x) { to.bits = static_cast<uint8_t>(float_bits({x + (0x1.8p23f + 128)})); }

// Beyond 448 it stays there.
DDFAST_HD void set(E4m3& to, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    to.bits = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
    const uint32_t bits = float_bits({x}), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t code;
    if (magnitude < 0x3C800000u) {  // below 2^-6: a multiple of 2^-9, which the sum rounds to
        code = float_bits({bits_float(magnitude).value + 16384.0f}) - 0x46800000u;
    } else {
        code = (magnitude - 0x3C000000u + 0x7FFFFu + (magnitude >> 20 & 1)) >> 20;
        if (code > 0x7Eu) code = 0x7Eu;
    }
    to.bits = static_cast<uint8_t>(x != x ? 0x7Fu : sign | code);
#endif
}

// kCount numbers that are read or written at once, at addresses that divide by their size (or by 16).
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
    T at[kCount];
};

template <int kCount, class T>
DDFAST_HD Pack<T, kCount> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

template <class T, int kCount>
DDFAST_HD void unpack(const Pack<T, kCount>& pack, float (&to)[kCount]) {
    DDFAST_UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = to_float(pack.at[i]);
}

template <class T, int kCount>
DDFAST_HD void load(const T* from, float (&to)[kCount]) {
    unpack(load_pack<kCount>(from), to);
}

template <class T, int kCount>
DDFAST_HD void store(T* to, const float (&from)[kCount]) {
    Pack<T, kCount> pack;
    DDFAST_UNROLL
    for (int i = 0; i < kCount; ++i) set(pack.at[i], from[i]);
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

}  // namespace ddfast
