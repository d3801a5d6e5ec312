// One token from its logits: guidance, filter, the Adams predictor-corrector on the kept codes, read-out. The maths is
// explained in ddfast/flow/field.py and multistep.py; what is here is how it runs.
//
// The kept codes lie as columns, one a channel, so that a vector holds one channel of kLanes codes. An evaluation takes
// each tile of 4 vectors once: log-weights, exponentials, and their products with the columns while these are in L1.
// Exponentials are taken relative to a guess of the largest log-weight, that of the code which was best so far. After an
// evaluation, codes that no longer matter are marked with log p = -inf, and squeezed out once more than a quarter of them is.
#pragma once

#include "filter.h"
#include "transpose.h"

namespace ddfast::cpu {
namespace {

constexpr int kTile = 4 * kLanes;

// The codes of one row that are still possible.
struct Codes {
    const float* columns;  // [channels, stride]
    const float* half;     // [count], |c|^2 / 2
    const int32_t* index;  // [count], where in the codebook; null: in order
    float* log_p;          // [count], sealed; -inf where a code was let go
    int64_t stride, count;

    int64_t token(int64_t i) const { return index ? index[i] : i; }
};

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

// The two largest values met, lane by lane.
struct TopTwo {
    Vec first = splat(-kInfinity), second = splat(-kInfinity);

    void meet(Vec v) {
        second = larger(second, smaller(first, v));
        first = larger(first, v);
    }

    float largest() const { return max_lanes(first); }

    // The second largest is the largest once one lane's first has been taken out.
    float second_largest() const {
        const float top = largest();
        Vec others = first;
        int lane = 0;
        while (lane + 1 < kLanes && first[lane] != top) ++lane;
        others[lane] = second[lane];
        return max_lanes(others);
    }
};

// Where a sealed row first holds a value, from `from` on; 0 if it does not, as where log-weights overflowed.
int64_t position(const float* row, int64_t count, int64_t from, float value) {
    for (; from < count; from += kLanes) {
        const Vec v = load<Vec>(row + from), x = splat(value);
        const uint32_t bits = at_least(v, x) & at_least(x, v);
        if (bits) return from + __builtin_ctz(bits);
    }
    return 0;
}

float second_largest(const float* row, int64_t count) {
    TopTwo best;
    for (int64_t i = 0; i < count; i += kLanes) best.meet(load<Vec>(row + i));
    return best.second_largest();
}

// What one evaluation found.
struct Weights {
    float top, second;  // the two largest log-weights
    float total;        // sum of exp(log-weight - top)
};

DDFAST_INLINE WordVec widen(const uint16_t* from) { return __builtin_convertvector(load<ShortVec>(from), WordVec); }

template <LogitType type>
DDFAST_INLINE Vec load_logits(const void* row, int64_t i) {
    if constexpr (type == LogitType::kFloat32) return load<Vec>(static_cast<const float*>(row) + i);
    const WordVec bits = widen(static_cast<const uint16_t*>(row) + i);
    if constexpr (type == LogitType::kBfloat16) return reinterpret_cast<Vec>(bits << 16);
    const Vec scaled = reinterpret_cast<Vec>((bits & 0x7fffu) << 13) * 0x1p112f;  // subnormals included
    const WordVec special = (bits & 0x7c00u) == 0x7c00u ? WordVec{} + 0x7f800000u : WordVec{};
    return reinterpret_cast<Vec>(reinterpret_cast<WordVec>(scaled) | special | (bits & 0x8000u) << 16);
}

// uncond + guidance (cond - uncond) in float64, rounded once; where both are equal, that value.
DDFAST_INLINE HalfVec guided(HalfVec cond, HalfVec uncond, double guidance) {
    const DoubleVec from = __builtin_convertvector(uncond, DoubleVec);
    const DoubleVec to = __builtin_convertvector(cond, DoubleVec);
    const DoubleVec way = to == from ? DoubleVec{} : to - from;
    return __builtin_convertvector(from + guidance * way, HalfVec);
}

DDFAST_INLINE void store_guided(float* out, Vec cond, Vec uncond, double guidance) {
    store(out, guided(lower_half(cond), lower_half(uncond), guidance));
    store(out + kLanes / 2, guided(upper_half(cond), upper_half(uncond), guidance));
}

template <LogitType type>
void guide_row(const FlowJob& job, int64_t r, float* out) {
    const int64_t bytes = type == LogitType::kFloat32 ? 4 : 2;
    const char* cond = static_cast<const char*>(job.cond) + r * job.vocab * bytes;
    const char* uncond = job.uncond ? static_cast<const char*>(job.uncond) + r * job.vocab * bytes : nullptr;
    const int64_t whole = job.vocab / kLanes * kLanes, left = job.vocab - whole;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec c = load_logits<type>(cond, i);
        if (uncond) {
            store_guided(out + i, c, load_logits<type>(uncond, i), job.guidance);
        } else {
            store(out + i, c);
        }
    }
    if (left > 0) {
        char c[4 * kLanes] = {}, u[4 * kLanes] = {};
        __builtin_memcpy(c, cond + whole * bytes, left * bytes);
        if (uncond) __builtin_memcpy(u, uncond + whole * bytes, left * bytes);
        const Vec end = load_logits<type>(c, 0);
        if (uncond) {
            store_guided(out + whole, end, load_logits<type>(u, 0), job.guidance);
        } else {
            store(out + whole, end);
        }
    }
    seal(out, job.vocab);
}

void guide(const FlowJob& job, int64_t r, float* out) {
    if (job.type == LogitType::kFloat32) return guide_row<LogitType::kFloat32>(job, r, out);
    if (job.type == LogitType::kBfloat16) return guide_row<LogitType::kBfloat16>(job, r, out);
    guide_row<LogitType::kFloat16>(job, r, out);
}

// Channels c, c + 1, ... of kLanes codes to the i-th vector of their columns, kSize channels at a time.
template <int kSize>
DDFAST_INLINE void turn(const float* const* rows, int64_t channels, int64_t& c, float* columns, int64_t stride) {
    typedef typename Lane<kSize>::Floats Block;
    for (; c + kSize <= channels; c += kSize) {
        for (int first = 0; first < kLanes; first += kSize) {
            Block block[kSize];
            for (int k = 0; k < kSize; ++k) block[k] = load<Block>(rows[first + k] + c);
            transpose<kSize>(block);
            for (int k = 0; k < kSize; ++k) store(columns + (c + k) * stride + first, block[k]);
        }
    }
}

// The kept rows of the codebook as columns. Padding repeats a code.
void gather_columns(const FlowJob& job, const Kept& kept, int64_t stride, float* columns, float* half) {
    const int64_t end = padded(kept.count);
    for (int64_t i = 0; i < end; i += kLanes) {
        const float* rows[kLanes];
        for (int k = 0; k < kLanes; ++k) {
            const int64_t code = kept.index[i + k < kept.count ? i + k : 0];
            rows[k] = job.codebook + code * job.channels;
            half[i + k] = job.half[code];
        }
        int64_t c = 0;
        if constexpr (kLanes >= 16) turn<16>(rows, job.channels, c, columns + i, stride);
        if constexpr (kLanes >= 8) turn<8>(rows, job.channels, c, columns + i, stride);
        turn<4>(rows, job.channels, c, columns + i, stride);
        for (; c < job.channels; ++c)
            for (int k = 0; k < kLanes; ++k) columns[c * stride + i + k] = rows[k][c];
    }
}

// sums[c] += the weights of kVectors vectors of codes times column c.
template <int kChannels, int kVectors>
DDFAST_INLINE void add_products(const Codes& codes, int64_t i, const Vec* weights, int64_t channels, float* sums) {
    const int64_t end = kChannels ? kChannels : channels;
    const float* column = codes.columns + i;
    for (int64_t c = 0; c < end; ++c, column += codes.stride) {
        Vec even = load<Vec>(sums + c * kLanes), odd{};
        for (int k = 0; k < kVectors; k += 2) {
            even += weights[k] * load<Vec>(column + k * kLanes);
            odd += weights[k + 1] * load<Vec>(column + (k + 1) * kLanes);
            if constexpr (kChannels >= 16) {  // more streams than the hardware follows: ask for the next tile
                __builtin_prefetch(column + (kVectors + k) * kLanes);
                __builtin_prefetch(column + (kVectors + k + 1) * kLanes);
            }
        }
        store(sums + c * kLanes, even + odd);
    }
}

DDFAST_INLINE void clear_sums(State& at) { __builtin_memset(at.sums, 0, sizeof(float) * at.channels * kLanes); }

DDFAST_INLINE float log_weight(const Codes& codes, int64_t i, const State& at, float r) {
    float dot = codes.log_p[i] - r * r * codes.half[i];
    for (int64_t c = 0; c < at.channels; ++c) dot += at.rz[c] * codes.columns[c * codes.stride + i];
    return dot;
}

// kVectors vectors of codes from the i-th on.
template <int kChannels, int kVectors>
DDFAST_INLINE void evaluate_tile(const Codes& codes, int64_t i, State& at, float r, Vec offset, float* log_w,
                                 TopTwo& best, Vec& total) {
    const int64_t channels = kChannels ? kChannels : at.channels;
    const Vec minus_r2 = splat(-r * r);
    Vec w[kVectors];
    for (int k = 0; k < kVectors; ++k)
        w[k] = load<Vec>(codes.log_p + i + k * kLanes) + minus_r2 * load<Vec>(codes.half + i + k * kLanes);
    const float* column = codes.columns + i;
    for (int64_t c = 0; c < channels; ++c, column += codes.stride) {
        const Vec rz = splat(at.rz[c]);
        for (int k = 0; k < kVectors; ++k) w[k] += rz * load<Vec>(column + k * kLanes);
    }
    for (int k = 0; k < kVectors; ++k) {
        store(log_w + i + k * kLanes, w[k]);
        best.meet(w[k]);
        w[k] = exponential(smaller(w[k] - offset, splat(80.0f)));
        total += w[k];
    }
    add_products<kChannels, kVectors>(codes, i, w, channels, at.sums);
}

// All log-weights at (z, r) to log_w, sealed; D to at.drift. `relative` is close to the largest of them.
template <int kChannels>
Weights evaluate_near(const Codes& codes, State& at, float r, float relative, float* log_w) {
    const Vec offset = splat(relative);
    TopTwo best;
    Vec total{};
    clear_sums(at);
    int64_t i = 0;
    for (; i + kTile < codes.count; i += 2 * kTile)
        evaluate_tile<kChannels, 8>(codes, i, at, r, offset, log_w, best, total);
    for (; i < codes.count; i += kTile) evaluate_tile<kChannels, 4>(codes, i, at, r, offset, log_w, best, total);
    Weights found{best.largest(), best.second_largest(), sum_lanes(total)};
    const float share = 1.0f / found.total;
    for (int64_t c = 0; c < at.channels; ++c) at.drift[c] = sum_lanes(load<Vec>(at.sums + c * kLanes)) * share;
    found.total *= __builtin_expf(relative - found.top);
    return found;
}

template <int kChannels>
Weights evaluate(const Codes& codes, State& at, float r, int64_t best, float* log_w) {
    for (int64_t c = 0; c < at.channels; ++c) at.rz[c] = r * at.z[c];
    const float guess = log_weight(codes, best, at, r);
    const Weights found = evaluate_near<kChannels>(codes, at, r, guess, log_w);
    return found.top - guess < 60.0f ? found : evaluate_near<kChannels>(codes, at, r, found.top, log_w);
}

// log p from logits, and the moments of the codes under it. `best` is where the first largest logit stands.
template <int kChannels>
void start(const FlowJob& job, const Codes& codes, float max, int64_t best, int64_t row, State& at) {
    const int64_t channels = at.channels;
    Vec total{};
    for (int64_t i = 0; i < codes.count; i += kLanes) {
        const Vec l = load<Vec>(codes.log_p + i) - max;
        store(codes.log_p + i, l);
        total += exponential(l);
    }
    const float log_total = __builtin_logf(sum_lanes(total));
    codes.log_p[best] = -kInfinity;  // sums below leave the most probable code out
    Vec rest{}, entropy{}, square{};
    clear_sums(at);
    for (int64_t i = 0; i < codes.count; i += kTile) {
        Vec p[4];
        for (int k = 0; k < 4; ++k) {
            const Vec l = load<Vec>(codes.log_p + i + k * kLanes) - log_total;
            store(codes.log_p + i + k * kLanes, l);
            p[k] = exponential(l);
            rest += p[k];
            entropy -= p[k] * larger(l, splat(-1e30f));
            square += p[k] * load<Vec>(codes.half + i + k * kLanes);
        }
        add_products<kChannels, 4>(codes, i, p, channels, at.sums);
    }
    codes.log_p[best] = -log_total;
    at.rest = sum_lanes(rest);
    const float* centre = job.codebook + codes.token(best) * channels;
    float along = 0.0f, size = 0.0f;
    for (int64_t c = 0; c < channels; ++c) {
        const float first = sum_lanes(load<Vec>(at.sums + c * kLanes));
        const float shift = first - at.rest * centre[c];
        along += (first + shift) * centre[c];
        size += shift * shift;
        at.mean[c] = centre[c] + shift;
    }
    const float spread = (2.0f * sum_lanes(square) - along - size) / static_cast<float>(channels);
    const float nats = sum_lanes(entropy) + __builtin_expf(-log_total) * log_total;
    const float told = __builtin_expm1f(2.0f * nats / static_cast<float>(channels));
    at.scale = spread > 0.0f && told > 0.0f ? __builtin_sqrtf(told / spread) : 1.0f;
    at.variance = spread > 0.0f ? job.solver.shrink * job.solver.shrink * spread : 0.0f;
    __builtin_memset(at.u, 0, sizeof(float) * padded(channels));
    __builtin_memcpy(at.u, job.noise + row * channels, sizeof(float) * channels);
    for (float* slope : at.slopes) __builtin_memset(slope, 0, sizeof(float) * padded(channels));
}

// Squeezes out the codes whose log-weight is below the limit. `best` follows the code it points to. log_w may be log_p.
void squeeze(Codes& codes, const float* log_w, Vec limit, int64_t channels, Scratch& scratch, int64_t& best) {
    IntVec at = lane_numbers();
    int64_t moved = 0, n = 0;
    for (int64_t i = 0; i < codes.count; i += kLanes, at += kLanes) {
        const uint32_t bits = at_least(load<Vec>(log_w + i), limit);
        if (bits == 0) continue;
        if (best >= i && best < i + kLanes) moved = n + __builtin_popcount(bits & ((1u << (best - i)) - 1));
        const float* from = codes.columns + i;
        float* to = scratch.columns + n;
        for (int64_t c = 0; c < channels; ++c, from += codes.stride, to += codes.stride)
            compress(to, load<Vec>(from), bits);
        compress(scratch.half + n, load<Vec>(codes.half + i), bits);
        compress(codes.log_p + n, load<Vec>(codes.log_p + i), bits);
        n += compress(scratch.index + n, codes.index ? load<IntVec>(codes.index + i) : at, bits);
    }
    const auto clear_end = [n](float* row) { __builtin_memset(row + n, 0, sizeof(float) * (padded(n) - n)); };
    for (int64_t c = 0; c < channels; ++c) clear_end(scratch.columns + c * codes.stride);  // padding must be finite
    clear_end(scratch.half);
    seal(codes.log_p, n);
    codes = {scratch.columns, scratch.half, scratch.index, codes.log_p, codes.stride, n};
    best = moved;
}

// Lets go of the codes whose log-weight is below the cut; alive: how many then remain.
void prune(Codes& codes, const float* log_w, float cut, int64_t alive, int64_t channels, Scratch& scratch,
           int64_t& best) {
    const Vec limit = splat(cut);
    if (3 * alive < codes.count && codes.count > kTile) return squeeze(codes, log_w, limit, channels, scratch, best);
    for (int64_t i = 0; i < codes.count; i += kLanes) {
        const Vec kept = load<Vec>(codes.log_p + i);
        store(codes.log_p + i, load<Vec>(log_w + i) >= limit ? kept : splat(-kInfinity));
    }
}

// log of the standard normal's distribution function.
double log_phi(double x) {
    if (x > -20.0) return __builtin_log(0.5 * __builtin_erfc(-0.70710678118654752 * x));
    const double y = 1.0 / (x * x);
    return -0.5 * x * x - 0.91893853320467274 - __builtin_log(-x) +
           __builtin_log1p(-y * (1.0 - y * (3.0 - y * (15.0 - 105.0 * y))));
}

// The position that wins if only the codes of the two largest log-weights are left at (z, r): CodebookFlow.settle.
int64_t settle(const FlowJob& job, const Codes& codes, const State& at, float r, float top, float second,
               const float* log_w) {
    const int64_t i = position(log_w, codes.count, 0, top);
    if (second == -kInfinity) return i;
    const int64_t j = position(log_w, codes.count, second == top ? i + 1 : 0, second);
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
    return codes.log_p[i] + log_phi(q - half) >= codes.log_p[j] + log_phi(-q - half) ? i : j;
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
bool decided(const Adams& solver, const Weights& found, float rest) {
    constexpr float kRounding = 1e-6f;
    const float w1 = 1.0f / found.total, w2 = __builtin_expf(found.second - found.top) / found.total;
    return w1 > 1.0f - (solver.certain * rest - kRounding) || w1 + w2 > 1.0f - (solver.pair * rest - kRounding);
}

// Follows one token from its start; returns the position it ends at.
template <int kChannels>
int64_t follow(const FlowJob& job, Codes& codes, int64_t row, int64_t best, State& at, Scratch& scratch) {
    const Adams& solver = job.solver;
    const float* log_w = codes.log_p;  // at r = 0
    Weights found{codes.log_p[best], -kInfinity, 1.0f};
    float r = 0.0f;
    bool done = false;
    int64_t alive = count_at_least(log_w, codes.count, kLowest);
    __builtin_memcpy(at.z, at.u, sizeof(float) * at.channels);
    for (int knots = 0;; ++knots) {
        const float share = static_cast<float>(alive) / solver.prune;
        const float cut = solver.prune > 0.0f ? found.top - __builtin_logf(share) : kLowest;
        alive = count_at_least(log_w, codes.count, cut);
        if (done || alive <= 2 || knots == solver.knots) {
            job.evaluations[row] = knots;
            for (int64_t c = 0; c < at.channels; ++c) job.x[row * at.channels + c] = at.z[c] / (1.0f + r);
            if (knots == 0) found.second = second_largest(log_w, codes.count);
            return settle(job, codes, at, r, found.top, alive == 1 ? -kInfinity : found.second, log_w);
        }
        prune(codes, log_w, cut, alive, at.channels, scratch, best);
        log_w = scratch.log_w;
        r = solver.rho[knots] * at.scale;
        found = step<kChannels>(solver, knots, codes, best, r, at, scratch.log_w);
        best = position(log_w, codes.count, 0, found.top);
        done = decided(solver, found, at.rest);
    }
}

template <int kChannels>
void solve_row(const FlowJob& job, int64_t row, float max, Scratch& scratch) {
    State at(job, scratch.narrow);
    Codes codes;
    if (keeps_all(job.filter)) {
        codes = {job.columns, job.half, nullptr, scratch.logits, column_stride(job.vocab), job.vocab};
    } else {
        const Kept kept = kept_set(scratch.logits, job.vocab, max, job.filter, scratch);
        const int64_t stride = column_stride(kept.count);
        gather_columns(job, kept, stride, scratch.columns, scratch.half);
        codes = {scratch.columns, scratch.half, kept.index, kept.value, stride, kept.count};
    }
    const int64_t best = position(codes.log_p, codes.count, 0, max);
    start<kChannels>(job, codes, max, best, row, at);
    const int64_t end = follow<kChannels>(job, codes, row, best, at, scratch);
    job.tokens[row] = codes.token(end);
}

// Why a row of this largest logit, NaN if it holds one, cannot be solved, or 0.
int32_t refusal(const FlowJob& job, int64_t row, float max) {
    if (!(max > -kInfinity && max < kInfinity)) return kBadLogits;
    for (int64_t c = 0; c < job.channels; ++c)
        if (!(__builtin_fabsf(job.noise[row * job.channels + c]) < kInfinity)) return kBadNoise;
    return 0;
}

void flow_row(const FlowJob& job, int64_t row, Scratch& scratch) {
    guide(job, row, scratch.logits);
    const float max = prepare(scratch.logits, job.vocab, job.filter.divisor);
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
