// What one call for noise asks for: out[b, i, c] = normal(seed, pairs[b], start + i, c).
#pragma once

#include "ieee.h"

namespace ddfast {

struct NoiseJob {
    uint64_t seed;
    const int64_t* pairs;  // [num_pairs]
    int64_t num_pairs;
    uint32_t start;
    int64_t positions;
    int64_t channels;
    float* out;  // [num_pairs, positions, channels]
};

DDFAST_HD int64_t quads_per_position(const NoiseJob& job) { return (job.channels + 3) / 4; }

DDFAST_HD int64_t num_quads(const NoiseJob& job) { return job.num_pairs * job.positions * quads_per_position(job); }

}  // namespace ddfast
