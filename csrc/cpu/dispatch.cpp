#include <algorithm>
#include <cmath>
#include <stdexcept>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "fast.h"
#include "layers.h"
#include "scratch.h"

namespace ddfast::cpu {
namespace {

struct Level {
    const char* name;
    const Kernels* kernels;
    const FastKernels* fast;
    const LayerKernels* layers;
};

std::vector<Level> supported_levels() {
    std::vector<Level> found;
#if defined(DDFAST_X86_LEVELS)
    // Feature by feature: not every compiler knows the levels by name here. The other members of v3 came with these.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
#if defined(DDFAST_BF16_LEVEL)
    if (v4 && __builtin_cpu_supports("avx512bf16"))
        found.push_back({"x86-64-v4-bf16", &v4_kernels, &v4_fast_kernels, &v4_bf16_layer_kernels});
#endif
    if (v4) found.push_back({"x86-64-v4", &v4_kernels, &v4_fast_kernels, &v4_layer_kernels});
    if (v3) found.push_back({"x86-64-v3", &v3_kernels, &v3_fast_kernels, &v3_layer_kernels});
#endif
    found.push_back({"baseline", &baseline_kernels, &baseline_fast_kernels, &baseline_layer_kernels});
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

bool& poison() {
    static bool on = false;
    return on;
}

// The calling thread's Scratch for rows of `vocab` entries; without channels, what the filter alone needs.
Scratch scratch_of_thread(int64_t vocab, int64_t channels) {
    thread_local Floats memory;
    const int64_t row = padded(vocab) + kRowPad;
    float* next = memory.reserve((9 + channels) * row + 28 * padded(channels) + 4 * kRowPad);
    const auto take = [&](int64_t count) { return (next += count) - count; };
    Scratch scratch{};
    scratch.logits = take(row);
    scratch.log_p = take(row);
    scratch.log_w = take(row);
    scratch.half = take(row);
    scratch.mass = reinterpret_cast<double*>(take(2 * row));
    scratch.index = reinterpret_cast<int32_t*>(take(row));
    scratch.order = reinterpret_cast<int32_t*>(take(row));
    scratch.few = take(4 * kRowPad);
    scratch.columns = take(channels * row);
    scratch.narrow = take(28 * padded(channels));
    scratch.guess = 4.0f;
    return scratch;
}

// Calls body(row, scratch) for every row, a few rows at a time on each thread.
template <class Body>
void for_rows(int64_t rows, int64_t vocab, int64_t channels, const Body& body) {
#pragma omp parallel if (rows > 4)
    {
        Scratch scratch = scratch_of_thread(vocab, channels);
#pragma omp for schedule(dynamic, 4)
        for (int64_t row = 0; row < rows; ++row) {
            if (poison()) scratch = scratch_of_thread(vocab, channels);
            body(row, scratch);
        }
    }
}

}  // namespace

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (const Level& level : supported()) names.push_back(level.name);
    return names;
}

std::string level() { return current().name; }

void set_poison(bool on) { poison() = on; }

bool poisoned() { return poison(); }

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

void filter_logits(const FilterJob& job) {
    const auto filter_row = current().fast->filter_row;
    for_rows(job.rows, job.vocab, 0, [&](int64_t row, Scratch& scratch) { filter_row(job, row, scratch); });
}

void flow(const FlowJob& given) {
    const int64_t vocab = given.vocab, channels = given.channels;
    const bool in_place = keeps_all(given.filter);
    thread_local Floats memory;
    float* half = memory.reserve(padded(vocab) + (in_place ? channels * padded(vocab) : 0));
    float* columns = half + padded(vocab);
    for (int64_t v = 0; v < vocab; ++v) {
        const float* code = given.codebook + v * channels;
        float square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < channels; ++c) square += code[c] * code[c];
        if (!std::isfinite(square))
            throw std::invalid_argument("codebook row " + std::to_string(v) +
                                        " is not finite, or overflows when squared: check the tokenizer's weights");
        half[v] = 0.5f * square;
        if (!in_place) continue;
        float* column = columns + in_blocks(v, channels);
        for (int64_t c = 0; c < channels; ++c) column[c * kRowPad] = code[c];
    }
    std::fill(half + vocab, half + padded(vocab), 0.0f);
    for (int64_t v = vocab; in_place && v < padded(vocab); ++v)
        for (int64_t c = 0; c < channels; ++c) columns[in_blocks(v, channels) + c * kRowPad] = 0.0f;
    FlowJob job = given;
    job.half = half;
    job.columns = in_place ? columns : nullptr;
    const auto flow_row = current().fast->flow_row;
    for_rows(job.rows, vocab, channels, [&](int64_t row, Scratch& scratch) { flow_row(job, row, scratch); });
}

void nearest_code(const NearestJob& given) {
    const FastKernels& kernels = *current().fast;
    const int64_t panels = num_panels(given), blocks = (given.rows + kRowBlock - 1) / kRowBlock;
    thread_local Floats memory;
    NearestJob job = given;
    job.panels = memory.reserve(panels * panel_floats(given));
#pragma omp parallel if (blocks > 1)
    {
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel) kernels.pack_panels(job, panel, panel + 1);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * kRowBlock;
            kernels.nearest_rows(job, first, std::min(first + kRowBlock, job.rows));
        }
    }
}

static int64_t max_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Whether an amount of work, in vector operations or so, is worth waking threads for.
static bool much(int64_t work) { return work > 5000; }

void norm(const NormJob& job) {
    const auto norm_rows = current().layers->norm_rows;
    constexpr int64_t kRows = 8;  // a task
    const int64_t tasks = (job.rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) if (much(job.rows * job.dim / 4))
    for (int64_t task = 0; task < tasks; ++task) norm_rows(job, task * kRows, std::min((task + 1) * kRows, job.rows));
}

void append(const AppendJob& job) {
    const auto append_row = current().layers->append_row;
    const int64_t tasks = job.rows * job.n, values = (job.heads + 2 * job.kv_heads) * job.width;
#pragma omp parallel if (much(tasks * values / 4))
    {
        thread_local Floats memory;
        float* scratch = memory.reserve(2 * padded(job.width));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) append_row(job, task / job.n, task % job.n, scratch);
    }
}

void attention(const AttentionJob& job) {
    const LayerKernels& kernels = *current().layers;
    // Of one query, a row's heads are read together; with few rows they are parted, so that every thread has some.
    const int64_t wanted =
        job.n > 1 ? job.kv_heads : (2 * max_threads() + job.rows - 1) / std::max<int64_t>(job.rows, 1);
    const int64_t parts = std::min(wanted, job.kv_heads), tasks = job.rows * parts;
    const int64_t floats = kernels.attend_floats(job);
#pragma omp parallel if (much(job.rows * job.heads * job.n * job.keys * job.width / 8))
    {
        thread_local Floats memory;
        float* scratch = memory.reserve(floats);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            if (poison()) scratch = memory.reserve(floats);
            const int64_t part = task % parts;
            kernels.attend(job, task / parts, part * job.kv_heads / parts, (part + 1) * job.kv_heads / parts, scratch);
        }
    }
}

void swiglu(const SwigluJob& job) {
    const auto swiglu_row = current().layers->swiglu_row;
#pragma omp parallel for schedule(static) if (much(job.rows * job.hidden / 2))
    for (int64_t row = 0; row < job.rows; ++row) swiglu_row(job, row);
}

void quantizer_step(const QuantizerJob& job) {
    const LayerKernels& kernels = *current().layers;
    const int64_t floats = kernels.quantize_floats(job);
#pragma omp parallel if (job.batch > 1)
    {
        thread_local Floats memory;
        float* scratch = memory.reserve(floats);
#pragma omp for schedule(dynamic)
        for (int64_t image = 0; image < job.batch; ++image) {
            if (poison()) scratch = memory.reserve(floats);
            kernels.quantize_image(job, image, scratch);
        }
    }
}

void quantize_rows(const QuantizeJob& job) {
    const auto quantize_row = current().layers->quantize_row;
#pragma omp parallel for schedule(static) if (much(job.rows * job.width / 8))
    for (int64_t row = 0; row < job.rows; ++row) quantize_row(job, row);
}

// Calls part(job, first, last) for all of job.count values.
template <class Job>
static void for_values(const Job& job, void (*part)(const Job&, int64_t, int64_t)) {
    constexpr int64_t kValues = 1 << 13;  // a task
    const int64_t tasks = (job.count + kValues - 1) / kValues;
#pragma omp parallel for schedule(static) if (much(job.count / 2))
    for (int64_t task = 0; task < tasks; ++task) part(job, task * kValues, std::min((task + 1) * kValues, job.count));
}

void gelu(const GeluJob& job) { for_values(job, current().layers->gelu_part); }

void glu(const GluJob& job) { for_values(job, current().layers->glu_part); }

// Calls part(job, row, part) for all parts of all rows.
template <class Job>
static void for_parts(const Job& job, void (*part)(const Job&, int64_t, int64_t), int64_t values) {
    const int64_t parts = parts_of(job.n), tasks = job.rows * parts;
#pragma omp parallel for schedule(static) if (much(job.rows * job.n * values / 4))
    for (int64_t task = 0; task < tasks; ++task) part(job, task / parts, task % parts);
}

void norm_gradient(const NormGradientJob& job) { for_parts(job, current().layers->norm_gradient_part, job.dim); }

void gate(const GateJob& job) { for_parts(job, current().layers->gate_part, job.dim); }

void split_heads(const HeadsJob& job) { for_parts(job, current().layers->split_heads_part, 3 * job.heads * job.width); }

void turn_heads(const TurnJob& job) {
    for_parts(job, current().layers->turn_heads_part, (job.heads + 2 * job.kv_heads) * job.width);
}

void softmax_rows(const SoftmaxJob& job) {
    const auto softmax_row = current().layers->softmax_row;
    const int64_t rows = job.batch * job.n;
#pragma omp parallel for schedule(static) if (much(rows * job.keys / 2))
    for (int64_t row = 0; row < rows; ++row) softmax_row(job, row);
}

void scale_rows(const ScaleJob& job) {
    const auto scale_row = current().layers->scale_row;
#pragma omp parallel for schedule(static) if (much(job.rows * job.width / 4))
    for (int64_t row = 0; row < job.rows; ++row) scale_row(job, row);
}

}  // namespace ddfast::cpu
