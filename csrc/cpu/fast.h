// From logits to tokens on the CPU: what one call asks for, and the table of loops that answer it. ddfast/flow is the
// readable twin: filters.py of the filter, multistep.py of the solver.
#pragma once

#include <cstdint>

namespace ddfast::cpu {

constexpr int kMostHistory = 6;
constexpr int kRowPad = 64;  // entries; rows in scratch are padded to a multiple of it

// Internal linkage, as all that is compiled once per instruction set.
static inline int64_t padded(int64_t count) { return (count + kRowPad - 1) / kRowPad * kRowPad; }

// Codes lie in blocks of kRowPad: the first channel of all of them, the second, and so on.
static inline int64_t in_blocks(int64_t code, int64_t channels) {
    return code / kRowPad * kRowPad * channels + code % kRowPad;
}

enum class LogitType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum class Rule : int { kVar = 0, kLlamaGen = 1 };

struct Filter {
    float divisor;  // the temperature
    int64_t top_k;  // 0: off
    double top_p;   // below 0: off
    Rule rule;
};

struct FilterJob {
    const float* logits;  // [rows, vocab]
    int64_t rows, vocab;
    Filter filter;
    float* out;  // [rows, vocab]
};

// AdamsSolver's fields and tables.
struct Adams {
    int knots;
    const float* rho;      // [knots]
    const float* predict;  // [knots, kMostHistory]
    const float* correct;  // [knots, kMostHistory]
    float offset, shrink, certain, pair, prune;
};

struct FlowJob {
    const void* cond;    // [rows, vocab]
    const void* uncond;  // [rows, vocab] or null
    LogitType type;
    const float* noise;     // [rows, channels]
    const float* codebook;  // [vocab, channels]
    const float* half;      // [padded(vocab)], |c|^2 / 2 with zeros behind
    const float* columns;   // the codebook in blocks, with zeros behind; null unless keeps_all
    int64_t rows, vocab, channels;
    double guidance;
    Filter filter;
    Adams solver;
    int64_t* tokens;       // [rows]
    float* x;              // [rows, channels]
    int32_t* evaluations;  // [rows]; kBadLogits or kBadNoise for rows that cannot be solved
};

constexpr int32_t kBadLogits = -1;
constexpr int32_t kBadNoise = -2;

// Whether every entry of a row stays, so that the codebook is read in place.
static inline bool keeps_all(const Filter& filter) { return filter.top_k == 0 && filter.top_p < 0; }

// One thread's memory. Rows of `wide` entries, wide = padded(vocab) + kRowPad.
struct Scratch {
    float* logits;   // [wide]
    float* log_p;    // [wide]
    float* log_w;    // [wide]
    float* half;     // [wide]
    double* mass;    // [wide]
    int32_t* index;  // [wide]
    int32_t* order;  // [wide]
    float* columns;  // [wide * channels]
    float* narrow;   // [28, padded(channels)], the solver's state
    float* few;      // [4 * kRowPad]
    float guess;     // how far below the largest the last top-k cut was: where to look first
};

// out[n] = argmin_v |x[n] - codebook[v]|^2, the lowest v of equals.
struct NearestJob {
    const float* x;  // [rows, channels]
    int64_t rows;
    const float* codebook;  // [vocab, channels]
    int64_t vocab, channels;
    int64_t* out;   // [rows]
    float* panels;  // [num_panels, channels + 1, kPanel], the codebook by columns, under -|c|^2 / 2
};

constexpr int64_t kPanel = 64;     // codes; the last panel is filled up with ones that never win
constexpr int64_t kRowBlock = 48;  // rows a task

static inline int64_t num_panels(const NearestJob& job) { return (job.vocab + kPanel - 1) / kPanel; }
static inline int64_t panel_floats(const NearestJob& job) { return (job.channels + 1) * kPanel; }

struct FastKernels {
    void (*filter_row)(const FilterJob& job, int64_t row, Scratch& scratch);
    void (*flow_row)(const FlowJob& job, int64_t row, Scratch& scratch);
    void (*pack_panels)(const NearestJob& job, int64_t first, int64_t last);
    void (*nearest_rows)(const NearestJob& job, int64_t first, int64_t last);
};

extern const FastKernels baseline_fast_kernels;
#if defined(DDFAST_X86_LEVELS)
extern const FastKernels v3_fast_kernels;
extern const FastKernels v4_fast_kernels;
#endif

// Filters every row, on as many threads as OpenMP has been given.
void filter_logits(const FilterJob& job);

// Solves every row, likewise; job.half and job.columns are set here. Throws std::invalid_argument for a codebook that
// is not finite.
void flow(const FlowJob& job);

// Finds every row's nearest code, likewise; job.panels is set here.
void nearest_code(const NearestJob& job);

}  // namespace ddfast::cpu
