// One token from its logits: guidance, filter, the Adams predictor-corrector on the kept codes, read-out. The maths is
// explained in ddfast/flow/field.py and multistep.py; what is here is how it runs.
//
// A vector holds one channel of kLanes codes. An evaluation takes each tile of four vectors once: log-weights,
// exponentials, and products with the channels while these are in L1. The log-weights of the next tile are formed before
// the exponentials of this one, so that the processor always has independent work: both are long chains. Logarithms are
// to base 2, which saves the exponential a product. Exponentials are taken relative to a guess of the largest
// log-weight, that of the code which was best so far. Codes that no longer matter are marked with log p = -inf after an
// evaluation; once two thirds are, the others are gathered anew.
#pragma once

#include "codes.h"

namespace ddfast::cpu {
namespace {

// Rows of `channels` floats in scratch.narrow.
struct State {
    int64_t channels;
    float *u, *guess, *mean, *z, *rz, *drift;  // drift: D
    float* slopes[kMostHistory];               // newest first
    float* sums;                               // [channels, kLanes], partial sums of D
    float scale, variance, rest;               // R*, the square of shrink * s, 1 - max p

    State(const FlowJob& job, float* narrow) : channels(job.channels) {
        const int64_t wide = padded(channels);
        float** rows[] = {&u, &guess, &mean, &z, &rz, &drift};
        for (float** row : rows) *row = (narrow += wide) - wide;
        for (float*& slope : slopes) slope = (narrow += wide) - wide;
        sums = narrow;
    }

    // to = from + the sum of weight times slope.
    void combine(const float* from, const float* weights, float* to) const {
        for (int64_t c = 0; c < channels; c += kLanes) {
            Vec sum = load<Vec>(from + c);
            for (int h = 0; h < kMostHistory; ++h) sum += weights[h] * load<Vec>(slopes[h] + c);
            store(to + c, sum);
        }
    }
};

constexpr float kBits = 1.44269504f;   // in a nat
constexpr float kNats = 0.693147181f;  // in a bit

// What one evaluation found.
struct Weights {
    float top;    // the largest log-weight
    float total;  // sum of 2^(log-weight - top)
};

// For each channel, the sum of weights times it, as a vector of partial sums. AVX-512 keeps eight in registers.
template <int kChannels>
struct Sums {
    static constexpr bool kHeld = kChannels == 8 && kLanes == 16;
    int64_t channels;
    float* memory;  // [channels, kLanes], if not held
    Vec held[kHeld ? kChannels : 1]{};

    explicit Sums(const State& at) : channels(kChannels ? kChannels : at.channels), memory(at.sums) {
        if (!kHeld) __builtin_memset(memory, 0, sizeof(float) * channels * kLanes);
    }

    // A tile of codes from the i-th on.
    __attribute__((always_inline)) inline void add(const Codes& codes, int64_t i, const Vec* weights) {
        const float* column = codes.columns + in_blocks(i, channels);
        if constexpr (kHeld) {
#pragma GCC unroll 8
            for (int c = 0; c < kChannels; ++c)
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) held[c] += weights[k] * load<Vec>(column + c * kRowPad + k * kLanes);
        } else {
            for (int64_t c = 0; c < channels; ++c, column += kRowPad) {
                const Vec even = load<Vec>(memory + c * kLanes) + weights[0] * load<Vec>(column) +
                                 weights[2] * load<Vec>(column + 2 * kLanes);
                const Vec odd = weights[1] * load<Vec>(column + kLanes) + weights[3] * load<Vec>(column + 3 * kLanes);
                store(memory + c * kLanes, even + odd);
            }
        }
    }

    float total(int64_t c) const {
        if constexpr (kHeld) return sum_lanes(held[c]);
        return sum_lanes(load<Vec>(memory + c * kLanes));
    }
};

DDFAST_INLINE float log_weight(const Codes& codes, int64_t i, const State& at, float r) {
    float dot = codes.log_p[i] - kBits * r * r * codes.half[i];
    for (int64_t c = 0; c < at.channels; ++c) dot += at.rz[c] * codes.columns[in_blocks(i, at.channels) + c * kRowPad];
    return dot;
}

// Log-weights of a tile of codes from the i-th on.
template <int kChannels>
DDFAST_INLINE void weigh(const Codes& codes, int64_t i, const State& at, Vec minus_r2, Vec* w) {
    const int64_t channels = kChannels ? kChannels : at.channels;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
        w[k] = load<Vec>(codes.log_p + i + k * kLanes) + minus_r2 * load<Vec>(codes.half + i + k * kLanes);
    const float* column = codes.columns + in_blocks(i, channels);
    for (int64_t c = 0; c < channels; ++c, column += kRowPad) {
        const Vec rz = splat(at.rz[c]);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) w[k] += rz * load<Vec>(column + k * kLanes);
    }
}

// All log-weights at (z, r) to log_w, sealed; D to at.drift, unless `relative` is over 80 below the largest of them.
template <int kChannels>
Weights evaluate_near(const Codes& codes, State& at, float r, float relative, float* log_w) {
    const Vec offset = splat(relative), minus_r2 = splat(-kBits * r * r);
    Vec best = splat(-kInfinity), total{}, next[4];
    Sums<kChannels> sums(at);
    weigh<kChannels>(codes, 0, at, minus_r2, next);
    for (int64_t i = 0; i < codes.count; i += kTile) {
        Vec w[4] = {next[0], next[1], next[2], next[3]};
        if (i + kTile < codes.count) weigh<kChannels>(codes, i + kTile, at, minus_r2, next);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            store(log_w + i + k * kLanes, w[k]);
            best = larger(w[k], best);
            w[k] = power_of_two(w[k] - offset);
            total += w[k];
        }
        sums.add(codes, i, w);
    }
    Weights found{max_lanes(best), sum_lanes(total)};
    const float share = 1.0f / found.total;
    for (int64_t c = 0; c < at.channels; ++c) at.drift[c] = sums.total(c) * share;
    found.total *= __builtin_exp2f(relative - found.top);
    return found;
}

template <int kChannels>
Weights evaluate(const Codes& codes, State& at, float r, int64_t best, float* log_w) {
    for (int64_t c = 0; c < at.channels; ++c) at.rz[c] = kBits * r * at.z[c];
    const float guess = log_weight(codes, best, at, r);
    const Weights found = evaluate_near<kChannels>(codes, at, r, guess, log_w);
    return found.top - guess < 80.0f ? found : evaluate_near<kChannels>(codes, at, r, found.top, log_w);
}

// How far below the largest log-weight codes go: those of less than an equal share of the weight that is spared. Together
// they have less. total: of all weights, in largest ones.
float prune_below(const Adams& solver, float rest, float total, int64_t alive) {
    const float weight = solver.prune * rest * total / static_cast<float>(alive);
    return weight > 0.0f ? __builtin_log2f(weight) : kLowest;
}

// log p, less its largest, from logits, and the moments of the codes under p; lets go of the codes that do not matter at
// r = 0 and returns how many are left. `best` is where the first largest logit stands.
template <int kChannels>
int64_t start(const FlowJob& job, const Codes& codes, float max, int64_t best, int64_t row, State& at) {
    const int64_t channels = at.channels;
    codes.log_p[best] = -kInfinity;  // the sums leave the most probable code out, or it would swallow the others
    Vec total{};
    int64_t alive = 1;
    for (int64_t i = 0; i < codes.count; i += kTile) {
        for (int k = 0; k < 4; ++k) {
            const Vec l = (load<Vec>(codes.log_p + i + k * kLanes) - max) * kBits;
            store(codes.log_p + i + k * kLanes, l);
            total += power_of_two(l);
            alive += __builtin_popcount(at_least(l, splat(kLowest)));
        }
    }
    const float others = sum_lanes(total), log_total = kBits * __builtin_log1pf(others), share = 1.0f / (1.0f + others);
    at.rest = others * share;
    const Vec cut = splat(prune_below(job.solver, at.rest, 1.0f + others, alive));
    Vec logs{}, square{};
    Sums<kChannels> sums(at);
    alive = 1;
    for (int64_t i = 0; i < codes.count; i += kTile) {
        Vec e[4];
        for (int k = 0; k < 4; ++k) {
            const Vec l = load<Vec>(codes.log_p + i + k * kLanes);
            e[k] = power_of_two(l);
            logs += e[k] * larger(l, splat(-100.0f));  // 0 log 0 = 0
            square += e[k] * load<Vec>(codes.half + i + k * kLanes);
            store(codes.log_p + i + k * kLanes, l >= cut ? l : splat(-kInfinity));
            alive += __builtin_popcount(at_least(l, cut));
        }
        sums.add(codes, i, e);
    }
    codes.log_p[best] = 0.0f;
    const float* centre = job.codebook + codes.token(best) * channels;
    float along = 0.0f, size = 0.0f;
    for (int64_t c = 0; c < channels; ++c) {
        const float first = share * sums.total(c);
        const float shift = first - at.rest * centre[c];
        along += (first + shift) * centre[c];
        size += shift * shift;
        at.mean[c] = centre[c] + shift;
    }
    const float spread = (2.0f * share * sum_lanes(square) - along - size) / static_cast<float>(channels);
    const float bits = log_total - share * sum_lanes(logs);
    const float told = __builtin_expm1f(2.0f * kNats * bits / static_cast<float>(channels));
    at.scale = spread > 0.0f && told > 0.0f ? __builtin_sqrtf(told / spread) : 1.0f;
    at.variance = spread > 0.0f ? job.solver.shrink * job.solver.shrink * spread : 0.0f;
    __builtin_memset(at.u, 0, sizeof(float) * padded(channels));
    __builtin_memcpy(at.u, job.noise + row * channels, sizeof(float) * channels);
    for (float* slope : at.slopes) __builtin_memset(slope, 0, sizeof(float) * padded(channels));
    return alive;
}

// log of the standard normal's distribution function.
double log_phi(double x) {
    if (x > -20.0) return __builtin_log(0.5 * __builtin_erfc(-0.70710678118654752 * x));
    const double y = 1.0 / (x * x);
    return -0.5 * x * x - 0.91893853320467274 - __builtin_log(-x) +
           __builtin_log1p(-y * (1.0 - y * (3.0 - y * (15.0 - 105.0 * y))));
}

// The position that wins if only the code at i and the one of the second largest log-weight are left at (z, r):
// CodebookFlow.settle.
int64_t settle(const FlowJob& job, const Codes& codes, const State& at, float r, int64_t i, const float* log_w) {
    const float second = second_largest(log_w, codes.count);
    if (second == -kInfinity) return i;
    const int64_t j = position(log_w, codes.count, second == log_w[i] ? i + 1 : 0, second);
    const float* a = job.codebook + codes.token(i) * job.channels;
    const float* b = job.codebook + codes.token(j) * job.channels;
    double gap = 0.0, along = 0.0;
    for (int64_t c = 0; c < job.channels; ++c) {
        const double way = static_cast<double>(a[c]) - b[c];
        gap += way * way;
        along += (at.z[c] - 0.5 * r * (static_cast<double>(a[c]) + b[c])) * way;
    }
    gap = __builtin_sqrt(gap);
    const double q = gap > 0.0 ? along / gap : 0.0, half = 0.5 * r * gap;
    constexpr double kNat = 0.69314718055994531;
    return kNat * codes.log_p[i] + log_phi(q - half) >= kNat * codes.log_p[j] + log_phi(-q - half) ? i : j;
}

// z = g u + r mean.
void place(State& at, const float* u, float g, float r) {
    for (int64_t c = 0; c < at.channels; ++c) at.z[c] = g * u[c] + r * at.mean[c];
}

// Predicts, evaluates and corrects at one knot; at.z is the corrected state.
template <int kChannels>
Weights step(const Adams& solver, int knot, const Codes& codes, int64_t best, float r, State& at, float* log_w) {
    const float g = __builtin_sqrtf(1.0f + r * r * at.variance);
    at.combine(at.u, solver.predict + knot * kMostHistory, at.guess);
    place(at, at.guess, g, r);
    const Weights found = evaluate<kChannels>(codes, at, r, best, log_w);
    float* newest = at.slopes[kMostHistory - 1];
    for (int h = kMostHistory - 1; h > 0; --h) at.slopes[h] = at.slopes[h - 1];
    at.slopes[0] = newest;
    const float speed = (solver.offset + solver.rho[knot]) * at.scale / g, pull = at.variance * r / g;
    for (int64_t c = 0; c < at.channels; ++c) newest[c] = speed * (at.drift[c] - at.mean[c] - pull * at.guess[c]);
    at.combine(at.u, solver.correct + knot * kMostHistory, at.u);
    place(at, at.u, g, r);
    return found;
}

// Whether the weights have decided, by more than sums of float32 may be off.
bool decided(const Adams& solver, const Weights& found, float rest, const float* log_w, int64_t count) {
    constexpr float kRounding = 1e-6f;
    const float w1 = 1.0f / found.total, enough = 1.0f - (solver.pair * rest - kRounding);
    if (w1 > 1.0f - (solver.certain * rest - kRounding)) return true;
    if (2.0f * w1 <= enough) return false;  // the second is no larger
    return w1 + __builtin_exp2f(second_largest(log_w, count) - found.top) / found.total > enough;
}

// Follows one token from its start, where `alive` codes are left; returns the position it ends at.
template <int kChannels>
int64_t follow(const FlowJob& job, Codes& codes, int64_t row, int64_t best, int64_t alive, State& at,
               Scratch& scratch) {
    const Adams& solver = job.solver;
    __builtin_memcpy(at.z, at.u, sizeof(float) * at.channels);
    const float* log_w = codes.log_p;  // at r = 0
    float r = 0.0f;
    bool done = false;
    int knots = 0;
    for (; !done && alive > 2 && knots < solver.knots; ++knots) {
        if (3 * alive < codes.count && codes.count > kTile) best = squeeze(job, codes, scratch, best);
        log_w = scratch.log_w;
        r = solver.rho[knots] * at.scale;
        const Weights found = step<kChannels>(solver, knots, codes, best, r, at, scratch.log_w);
        done = decided(solver, found, at.rest, log_w, codes.count);
        const float cut = found.top + prune_below(solver, at.rest, found.total, alive);
        const Left left = prune(codes, log_w, cut, found.top);
        alive = left.alive;
        best = left.best;
    }
    job.evaluations[row] = knots;
    for (int64_t c = 0; c < job.channels; ++c) job.x[row * job.channels + c] = at.z[c] / (1.0f + r);
    return alive == 1 ? best : settle(job, codes, at, r, best, log_w);
}

template <int kChannels>
void solve_row(const FlowJob& job, int64_t row, float max, Scratch& scratch) {
    State at(job, scratch.narrow);
    Codes codes;
    if (keeps_all(job.filter)) {
        codes = {job.columns, job.half, nullptr, scratch.logits, job.vocab};
    } else {
        const Kept kept = kept_set(scratch.logits, job.vocab, max, job.filter, scratch);
        codes = gathered(job, kept, scratch);
    }
    const int64_t best = position(codes.log_p, codes.count, 0, max);
    const int64_t alive = start<kChannels>(job, codes, max, best, row, at);
    const int64_t end = follow<kChannels>(job, codes, row, best, alive, at, scratch);
    job.tokens[row] = codes.token(end);
}

// Why a row of this largest logit, NaN if it holds one, cannot be solved, or 0.
int32_t refusal(const FlowJob& job, int64_t row, float max) {
    if (!(max > -kInfinity && max < kInfinity)) return kBadLogits;
    for (int64_t c = 0; c < job.channels; ++c)
        if (!(__builtin_fabsf(job.noise[row * job.channels + c]) < kInfinity)) return kBadNoise;
    return 0;
}

template <LogitType type>
float read_guided(const FlowJob& job, int64_t row, float* out) {
    const int64_t at = row * job.vocab * (type == LogitType::kFloat32 ? 4 : 2);
    const char* uncond = job.uncond ? static_cast<const char*>(job.uncond) + at : nullptr;
    return read_row<type>(static_cast<const char*>(job.cond) + at, uncond, job.vocab, job.guidance, job.filter.divisor,
                          out);
}

float read_guided(const FlowJob& job, int64_t row, float* out) {
    if (job.type == LogitType::kFloat32) return read_guided<LogitType::kFloat32>(job, row, out);
    if (job.type == LogitType::kBfloat16) return read_guided<LogitType::kBfloat16>(job, row, out);
    return read_guided<LogitType::kFloat16>(job, row, out);
}

void flow_row(const FlowJob& job, int64_t row, Scratch& scratch) {
    const float max = read_guided(job, row, scratch.logits);
    job.evaluations[row] = refusal(job, row, max);
    if (job.evaluations[row] < 0) {
        job.tokens[row] = 0;
        for (int64_t c = 0; c < job.channels; ++c) job.x[row * job.channels + c] = __builtin_nanf("");
        return;
    }
    if (job.channels == 8) return solve_row<8>(job, row, max, scratch);
    if (job.channels == 32) return solve_row<32>(job, row, max, scratch);
    solve_row<0>(job, row, max, scratch);
}

}  // namespace
}  // namespace ddfast::cpu
