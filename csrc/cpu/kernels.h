// The CPU loops. kernels.cpp is compiled once per instruction set; dispatch.cpp picks the best one the machine runs.
#pragma once

#include <string>
#include <vector>

#include "../core/noise_job.h"

namespace ddfast::cpu {

// One instruction set's loops.
struct Kernels {
    // Quads [first, last) of the job, numbered row-major over (pair, position, quad of channels).
    void (*normal_quads)(const NoiseJob& job, int64_t first, int64_t last);
};

extern const Kernels baseline_kernels;
#if defined(DDFAST_X86_LEVELS)
extern const Kernels v3_kernels;
extern const Kernels v4_kernels;
#endif

// Names of the instruction sets this machine can run, best first; the last is "baseline".
std::vector<std::string> levels();
// The one in use: the best, until set_level chooses another of levels().
std::string level();
// From now on, whether scratch is filled with NaN (-1 as an integer) before each row. Tests see so what is read before it
// is written.
void set_poison(bool on);
bool poisoned();

// Throws std::invalid_argument for a name that is not in levels().
void set_level(const std::string& name);

// Fills job.out, on as many threads as OpenMP has been given.
void normal_noise(const NoiseJob& job);

}  // namespace ddfast::cpu
