#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace ddfast::cpu {
namespace {

struct Level {
    const char* name;
    const Kernels* kernels;
};

std::vector<Level> supported_levels() {
    std::vector<Level> found;
#if defined(DDFAST_X86_LEVELS)
    // Feature by feature: not every compiler knows the levels by name here. The other members of v3 came with these.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) found.push_back({"x86-64-v4", &v4_kernels});
    if (v3) found.push_back({"x86-64-v3", &v3_kernels});
#endif
    found.push_back({"baseline", &baseline_kernels});
    return found;
}

const std::vector<Level>& supported() {
    static const std::vector<Level> found = supported_levels();
    return found;
}

Level& current() {
    static Level chosen = supported().front();
    return chosen;
}

}  // namespace

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (const Level& level : supported()) names.push_back(level.name);
    return names;
}

std::string level() { return current().name; }

void set_level(const std::string& name) {
    for (const Level& level : supported()) {
        if (name == level.name) {
            current() = level;
            return;
        }
    }
    throw std::invalid_argument("instruction set '" + name + "' is not one of cpu_levels()");
}

void normal_noise(const NoiseJob& job) {
    constexpr int64_t kQuadsPerTask = 4096;
    const auto normal_quads = current().kernels->normal_quads;
    const int64_t quads = num_quads(job);
    const int64_t tasks = (quads + kQuadsPerTask - 1) / kQuadsPerTask;
#pragma omp parallel for schedule(static) if (tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task * kQuadsPerTask;
        normal_quads(job, first, std::min(first + kQuadsPerTask, quads));
    }
}

}  // namespace ddfast::cpu
