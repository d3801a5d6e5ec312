// Standard normals from Philox words by Box-Muller. ddfast/noise.py defines them and explains each step; the two files
// must give the same bits.
#pragma once

#include "philox.h"

namespace ddfast {

struct NormalPair {
    Float first, second;
};

struct Normals {
    Float n0, n1, n2, n3;
};

// sqrt(-2 ln u) with u = word * 2^-32 + 2^-33 in (0, 1].
DDFAST_HD Float box_muller_radius(uint32_t word) {
    const Float u = Float{static_cast<float>(word)} * Float{0x1p-32f} + Float{0x1p-33f};
    // u = 2^exponent (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
    const uint32_t bits = float_bits(u);
    const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
    const Float e{static_cast<float>(exponent)};
    const Float f = bits_float(bits - (static_cast<uint32_t>(exponent) << 23)) - Float{1.0f};
    const Float f2 = f * f;
    Float p{-0.0801214054f};
    p = p * f + Float{0.130807176f};
    p = p * f + Float{-0.131435588f};
    p = p * f + Float{0.141411915f};
    p = p * f + Float{-0.166195661f};
    p = p * f + Float{0.200050533f};
    p = p * f + Float{-0.250010282f};
    p = p * f + Float{0.333332509f};
    const Float tail = f * f2 * p + e * Float{-2.12194440e-4f};
    const Float minus_log = Float{0.5f} * f2 - tail - f - e * Float{0.693359375f};
    return square_root(minus_log + minus_log);
}

// (cos, sin) of 2 pi word / 2^32.
DDFAST_HD NormalPair box_muller_direction(uint32_t word) {
    const uint32_t quadrant = (word + (1u << 29)) >> 30;
    const Float residual{static_cast<float>(static_cast<int32_t>(word - (quadrant << 30)))};
    const Float a = residual * Float{1.46291811e-9f};
    const Float a2 = a * a;
    Float s{-1.95182918e-4f};
    s = s * a2 + Float{8.33218917e-3f};
    s = s * a2 + Float{-0.166666552f};
    const Float sine = a * a2 * s + a;
    Float c{2.44323273e-5f};
    c = c * a2 + Float{-1.38873095e-3f};
    c = c * a2 + Float{4.16666456e-2f};
    const Float cosine = a2 * a2 * c - Float{0.5f} * a2 + Float{1.0f};
    const bool odd = quadrant & 1;
    const uint32_t cosine_sign = ((quadrant + 1) & 2) << 30;
    const uint32_t sine_sign = (quadrant & 2) << 30;
    return {bits_float(float_bits(odd ? sine : cosine) ^ cosine_sign),
            bits_float(float_bits(odd ? cosine : sine) ^ sine_sign)};
}

DDFAST_HD NormalPair box_muller(uint32_t word0, uint32_t word1) {
    const Float radius = box_muller_radius(word0);
    const NormalPair direction = box_muller_direction(word1);
    return {radius * direction.first, radius * direction.second};
}

// The normals of channels 4 quad .. 4 quad + 3 of one position of one pair.
DDFAST_HD Normals quad_normals(uint64_t seed, uint64_t pair, uint32_t position, uint32_t quad) {
    const Words counter{static_cast<uint32_t>(pair), static_cast<uint32_t>(pair >> 32), position, quad};
    const Words x = philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const NormalPair low = box_muller(x.x0, x.x1);
    const NormalPair high = box_muller(x.x2, x.x3);
    return {low.first, low.second, high.first, high.second};
}

}  // namespace ddfast
