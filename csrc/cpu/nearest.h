// The nearest code of each row: the v with the largest x.c_v - |c_v|^2 / 2, a matrix product whose result stays in
// registers: a tile of rows meets a few vectors of codes at a time.
#pragma once

#include "fast.h"
#include "simd.h"

namespace ddfast::cpu {
namespace {

constexpr int kTileRows = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;  // of codes; kTileRows * kVectors sums fill the registers
constexpr int kStep = kVectors * kLanes;        // codes met at a time
static_assert(kPanel % kStep == 0 && kRowBlock % kTileRows == 0, "whole steps, whole tiles");

// Panels [first, last) of the codebook.
void pack_panels(const NearestJob& job, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
        float* panel = job.panels + p * panel_floats(job);
        for (int64_t lane = 0; lane < kPanel; ++lane) {
            const int64_t code = p * kPanel + lane;
            const float* from = job.codebook + code * job.channels;
            float square = 0.0f;
            for (int64_t k = 0; k < job.channels; ++k) {
                const float value = code < job.vocab ? from[k] : 0.0f;
                panel[(k + 1) * kPanel + lane] = value;
                square += value * value;
            }
            panel[lane] = code < job.vocab ? -0.5f * square : -__builtin_inff();
        }
    }
}

// The best score that each lane has met, and the number of the vector it came in.
struct Best {
    Vec score;
    IntVec vector;
};

// The better of two, lane by lane; the first where they are equal. A NaN in the second loses.
DDFAST_INLINE Best better(Best a, Best b) {
    const IntVec wins = b.score > a.score;
    return {wins ? b.score : a.score, wins ? b.vector : a.vector};
}

// Scores the rows of a tile, x[r] [channels], against the codes of one step.
DDFAST_INLINE void score_step(const float* const* x, int64_t channels, const float* codes, int32_t step, Best* best) {
    Vec sums[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r) {
        for (int i = 0; i < kVectors; ++i) sums[r][i] = load<Vec>(codes + i * kLanes);
    }
    for (int64_t k = 0; k < channels; ++k) {
        codes += kPanel;
        Vec c[kVectors];
        for (int i = 0; i < kVectors; ++i) c[i] = load<Vec>(codes + i * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) sums[r][i] += x[r][k] * c[i];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
        Best row = best[r];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) row = better(row, {sums[r][i], IntVec{} + (step * kVectors + i)});
        best[r] = row;
    }
}

// The lowest index among the codes of the best score; 0 if there was none.
int64_t winner(const Best& best) {
    float top = -__builtin_inff();
    int64_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t code = int64_t{best.vector[lane]} * kLanes + lane;
        if (best.score[lane] > top || (best.score[lane] == top && code < found)) {
            top = best.score[lane];
            found = code;
        }
    }
    return found;
}

// Rows [first, first + kTileRows); those past the last row repeat it and are not written.
void nearest_tile(const NearestJob& job, int64_t first) {
    const float* x[kTileRows];
    Best best[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) {
        x[r] = job.x + (first + r < job.rows ? first + r : job.rows - 1) * job.channels;
        best[r] = {splat(-__builtin_inff()), IntVec{}};
    }
    const int64_t steps = num_panels(job) * (kPanel / kStep);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t code = step * kStep;
        const float* codes = job.panels + code / kPanel * panel_floats(job) + code % kPanel;
        score_step(x, job.channels, codes, static_cast<int32_t>(step), best);
    }
    for (int64_t r = 0; r < kTileRows && first + r < job.rows; ++r) job.out[first + r] = winner(best[r]);
}

// Rows [first, last); first is a multiple of kRowBlock.
void nearest_rows(const NearestJob& job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kTileRows) nearest_tile(job, row);
}

}  // namespace
}  // namespace ddfast::cpu
