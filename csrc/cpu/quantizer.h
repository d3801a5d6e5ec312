// One image's step of VAR's residual quantizer: three small matrix products, the middle one a convolution.
#pragma once

#include "layers.h"
#include "multiply.h"

namespace ddfast::cpu {
namespace {

DDFAST_INLINE int64_t tile_columns(int64_t channels) {
    return (channels + kTileColumns - 1) / kTileColumns * kTileColumns;
}
DDFAST_INLINE int64_t framed(const QuantizerJob& job) { return job.side + job.kernel - 1; }

// Codes, the map within a frame of zeros, and it again as the second product's right side; taps.
int64_t quantize_floats(const QuantizerJob& job) {
    const int64_t wide = tile_columns(job.channels), area = job.side * job.side;
    const int64_t codes = job.n > area ? job.n : area;
    return wide * (codes + framed(job) * framed(job) + job.kernel * job.kernel * job.channels);
}

// Calls put(row, column, vector) for every vector of a [rows, depth] times b [depth, wide].
template <class Put>
DDFAST_INLINE void product(const float* a, int64_t rows, int64_t depth, const float* b, int64_t wide, const Put& put) {
    for (int64_t column = 0; column < wide; column += kTileColumns)
        for (int64_t first = 0; first < rows; first += kTileRows) {
            // The last tile begins early enough to be whole; few rows are one row often.
            const int64_t from = rows < kTileRows ? 0 : first + kTileRows > rows ? rows - kTileRows : first;
            Vec sum[kTileRows][kTileVecs] = {};
            if (rows < kTileRows) {
                for (int64_t m = 0; m < rows; ++m) {
                    Vec line[kTileRows][kTileVecs] = {};
                    multiply<false>(line, a + m * depth, 0, b + column, wide, depth);
                    for (int i = 0; i < kTileVecs; ++i) sum[m][i] = line[0][i];
                }
            } else {
                multiply<false>(sum, a + from * depth, depth, b + column, wide, depth);
            }
            for (int64_t m = first - from; m < kTileRows && from + m < rows; ++m)
                for (int i = 0; i < kTileVecs; ++i) put(from + m, column + i * kLanes, sum[m][i]);
        }
}

void quantize_image(const QuantizerJob& job, int64_t image, float* scratch) {
    const int64_t channels = job.channels, wide = tile_columns(channels), side = job.side, area = side * side;
    const int64_t frame = framed(job), margin = job.kernel / 2, taps_rows = job.kernel * job.kernel * channels;
    float* codes = scratch;
    float* map = codes + wide * (job.n > area ? job.n : area);
    float* taps = map + wide * frame * frame;
    const auto pad = [&](const float* from, float* to) {
        __builtin_memcpy(to, from, channels * sizeof(float));
        __builtin_memset(to + channels, 0, (wide - channels) * sizeof(float));
    };
    for (int64_t i = 0; i < job.n; ++i) pad(job.codebook + job.tokens[image * job.n + i] * channels, codes + i * wide);
    for (int64_t i = 0; i < taps_rows; ++i) pad(job.taps + i * channels, taps + i * wide);
    __builtin_memset(map, 0, wide * frame * frame * sizeof(float));
    const auto spot = [&](int64_t position) {
        return map + ((position / side + margin) * frame + position % side + margin) * wide;
    };
    if (job.up)
        product(job.up, area, job.n, codes, wide,
                [&](int64_t row, int64_t column, Vec v) { store(spot(row) + column, v); });
    else
        for (int64_t i = 0; i < area; ++i) __builtin_memcpy(spot(i), codes + i * wide, wide * sizeof(float));

    float* f_hat = job.f_hat + image * area * channels;
    for (int64_t y = 0; y < side; ++y)
        for (int64_t first = 0; first < side; first += kTileRows) {
            const int64_t from = side < kTileRows ? 0 : first + kTileRows > side ? side - kTileRows : first;
            for (int64_t column = 0; column < wide; column += kTileColumns) {
                Vec sum[kTileRows][kTileVecs] = {};
                for (int64_t tap = 0; tap < job.kernel * job.kernel; ++tap) {
                    const int64_t dy = tap / job.kernel, dx = tap % job.kernel;
                    multiply<false>(sum, map + ((y + dy) * frame + from + dx) * wide, wide,
                                    taps + tap * channels * wide + column, wide, channels);
                }
                for (int64_t m = first - from; m < kTileRows && from + m < side; ++m) {
                    const int64_t position = y * side + from + m;
                    for (int i = 0; i < kTileVecs; ++i) {
                        const int64_t c = column + i * kLanes, left = channels - c;
                        if (left <= 0) break;
                        const Vec h = load<Vec>(spot(position) + c);
                        float* to = f_hat + position * channels + c;
                        const auto mixed = [&](Vec bias) { return h + job.ratio * (sum[m][i] + bias - h); };
                        if (left >= kLanes)
                            store(to, load<Vec>(to) + mixed(load<Vec>(job.bias + c)));
                        else
                            write_some(to, read_some(to, left) + mixed(read_some(job.bias + c, left)), left);
                    }
                }
            }
        }
    if (!job.down) return;
    for (int64_t i = 0; i < area; ++i) pad(f_hat + i * channels, codes + i * wide);
    float* out = job.out + image * job.m * channels;
    product(job.down, job.m, area, codes, wide, [&](int64_t row, int64_t column, Vec v) {
        const int64_t left = channels - column;
        if (left >= kLanes)
            store(out + row * channels + column, v);
        else if (left > 0)
            write_some(out + row * channels + column, v, left);
    });
}

}  // namespace
}  // namespace ddfast::cpu
