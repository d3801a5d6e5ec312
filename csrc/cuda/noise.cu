#include <algorithm>
#include <stdexcept>
#include <string>

#include "../core/normal.h"
#include "noise.h"

namespace ddfast::cuda {
namespace {

constexpr int kThreads = 256;

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// One thread a quad. count < 2^31, so 32-bit divisions serve.
__global__ void __launch_bounds__(kThreads)
    normal_quads(NoiseJob job, uint32_t quads, uint32_t positions, uint32_t count, bool aligned) {
    const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
    if (index >= count) return;
    const uint32_t cell = index / quads;
    const uint32_t quad = index - cell * quads;
    const uint32_t row = cell / positions;
    const uint32_t position = job.start + (cell - row * positions);
    const Normals n = quad_normals(job.seed, static_cast<uint64_t>(job.pairs[row]), position, quad);
    float* out = job.out + cell * job.channels + 4 * quad;
    if (aligned) {
        *reinterpret_cast<float4*>(out) = make_float4(n.n0.value, n.n1.value, n.n2.value, n.n3.value);
        return;
    }
    const int64_t left = job.channels - 4 * quad;
    out[0] = n.n0.value;
    if (left > 1) out[1] = n.n1.value;
    if (left > 2) out[2] = n.n2.value;
    if (left > 3) out[3] = n.n3.value;
}

}  // namespace

void normal_noise(const NoiseJob& job, void* stream) {
    if (num_quads(job) == 0) return;
    const int64_t quads = quads_per_position(job);
    const int64_t quads_per_pair = quads * job.positions;
    constexpr int64_t kMostQuads = (int64_t{1} << 31) - kThreads;
    const int64_t pairs_per_launch = kMostQuads / quads_per_pair;
    if (pairs_per_launch == 0) throw std::runtime_error("a pair of over 2^33 normals: ask for fewer positions");
    const bool aligned = job.channels % 4 == 0 && reinterpret_cast<uintptr_t>(job.out) % alignof(float4) == 0;
    for (int64_t first = 0; first < job.num_pairs; first += pairs_per_launch) {
        NoiseJob part = job;
        part.pairs += first;
        part.out += first * job.positions * job.channels;
        part.num_pairs = std::min(pairs_per_launch, job.num_pairs - first);
        const auto count = static_cast<uint32_t>(num_quads(part));
        normal_quads<<<(count + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            part, static_cast<uint32_t>(quads), static_cast<uint32_t>(job.positions), count, aligned);
        check(cudaGetLastError());
    }
}

}  // namespace ddfast::cuda
