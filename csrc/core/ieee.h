// float32 arithmetic that rounds once per operation on every backend.
//
// The host is compiled with -ffp-contract=off; nvcc may fuse a * b + c unless told otherwise, so device code uses the
// _rn intrinsics, which are never fused. Only operations that IEEE 754 defines to the last bit belong here.
#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage on the host: these functions are compiled once per instruction set, and the linker must not merge
// the copies.
#if defined(__CUDACC__)
#define DDFAST_HD static __host__ __device__ __forceinline__
#define DDFAST_UNROLL _Pragma("unroll")
#else
#define DDFAST_HD static inline __attribute__((always_inline))
#define DDFAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace ddfast {

struct Float {
    float value;
};

#if defined(__CUDA_ARCH__)
DDFAST_HD Float operator+(Float a, Float b) { return {__fadd_rn(a.value, b.value)}; }
DDFAST_HD Float operator-(Float a, Float b) { return {__fsub_rn(a.value, b.value)}; }
DDFAST_HD Float operator*(Float a, Float b) { return {__fmul_rn(a.value, b.value)}; }
DDFAST_HD Float square_root(Float a) { return {__fsqrt_rn(a.value)}; }
DDFAST_HD uint32_t float_bits(Float a) { return __float_as_uint(a.value); }
DDFAST_HD Float bits_float(uint32_t bits) { return {__uint_as_float(bits)}; }
#else
DDFAST_HD Float operator+(Float a, Float b) { return {a.value + b.value}; }
DDFAST_HD Float operator-(Float a, Float b) { return {a.value - b.value}; }
DDFAST_HD Float operator*(Float a, Float b) { return {a.value * b.value}; }
DDFAST_HD Float square_root(Float a) { return {__builtin_sqrtf(a.value)}; }

DDFAST_HD uint32_t float_bits(Float a) {
    uint32_t bits;
    std::memcpy(&bits, &a.value, sizeof bits);
    return bits;
}

DDFAST_HD Float bits_float(uint32_t bits) {
    Float a;
    std::memcpy(&a.value, &bits, sizeof bits);
    return a;
}
#endif

}  // namespace ddfast
