// Compiled once per instruction set, with DDFAST_KERNELS naming the table. No standard templates here: their code could
// be merged by the linker with another file's copy and run on a machine without these instructions.
#include "kernels.h"

#include "../core/normal.h"

namespace ddfast::cpu {
namespace {

constexpr int kTile = 128;  // quads: 2 KiB of normals

// The counters of successive quads, in row-major order of (pair, position, quad).
struct Cursor {
    const NoiseJob& job;
    int64_t quads, row, position, quad;

    Cursor(const NoiseJob& job, int64_t first) : job(job), quads(quads_per_position(job)) {
        quad = first % quads;
        position = first / quads % job.positions;
        row = first / quads / job.positions;
    }

    void next() {
        if (++quad < quads) return;
        quad = 0;
        if (++position < job.positions) return;
        position = 0;
        ++row;
    }
};

void store(const NoiseJob& job, int64_t first, int count, const float* normals) {
    const int64_t quads = quads_per_position(job);
    if (job.channels == 4 * quads) {
        std::memcpy(job.out + 4 * first, normals, sizeof(float) * 4 * count);
        return;
    }
    for (int i = 0; i < count; ++i) {
        const int64_t channel = (first + i) % quads * 4;
        const int64_t left = job.channels - channel;
        std::memcpy(job.out + (first + i) / quads * job.channels + channel, normals + 4 * i,
                    sizeof(float) * (left < 4 ? left : 4));
    }
}

void normal_quads(const NoiseJob& job, int64_t first, int64_t last) {
    uint64_t pair[kTile] = {};
    uint32_t position[kTile] = {}, quad[kTile] = {};
    float normals[4 * kTile];
    Cursor cursor(job, first);
    for (int64_t begin = first; begin < last; begin += kTile) {
        const int count = last - begin < kTile ? static_cast<int>(last - begin) : kTile;
        for (int i = 0; i < count; ++i, cursor.next()) {
            pair[i] = static_cast<uint64_t>(job.pairs[cursor.row]);
            position[i] = job.start + static_cast<uint32_t>(cursor.position);
            quad[i] = static_cast<uint32_t>(cursor.quad);
        }
        for (int i = 0; i < kTile; ++i) {
            const Normals n = quad_normals(job.seed, pair[i], position[i], quad[i]);
            normals[4 * i] = n.n0.value;
            normals[4 * i + 1] = n.n1.value;
            normals[4 * i + 2] = n.n2.value;
            normals[4 * i + 3] = n.n3.value;
        }
        store(job, begin, count, normals);
    }
}

}  // namespace

extern const Kernels DDFAST_KERNELS{normal_quads};

}  // namespace ddfast::cpu
