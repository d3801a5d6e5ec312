#pragma once

#include "../core/noise_job.h"

namespace ddfast::cuda {

// Fills job.out on the current device; job.pairs and job.out are device pointers and stream is a cudaStream_t. Does not
// wait for the result. Throws std::runtime_error when the launch fails.
void normal_noise(const NoiseJob& job, void* stream);

}  // namespace ddfast::cuda
