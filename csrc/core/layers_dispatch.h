// From what a job holds to the types and sizes its body is compiled for. Used on the host, before a launch.
#pragma once

#include "layers.h"
#include "layers_attention.h"

namespace ddfast {

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// run(T{}) with the type of a model's numbers.
template <class Run>
void with_type(Number number, const Run& run) {
    if (number == Number::kFloat) return run(float{});
    if (number == Number::kBf16) return run(Bf16{});
    run(Half{});
}

// Whether addresses and counts allow packs of some numbers.
class Fit {
public:
    template <class T>
    Fit& at(const T* address) {
        addresses_ |= reinterpret_cast<uintptr_t>(address);
        return *this;
    }
    Fit& by(int64_t count) {
        counts_ |= static_cast<uint64_t>(count);
        return *this;
    }
    template <class T>
    bool packs(int count) const {
        const uint64_t bytes = count * sizeof(T);
        return counts_ % count == 0 && addresses_ % (bytes < 16 ? bytes : 16) == 0;
    }

private:
    uint64_t counts_ = 0, addresses_ = 0;
};

// run(Constant<V>) with the most numbers a pack of at most 16 bytes can have, no fewer than kLeast.
template <class T, int kLeast, class Run>
void with_packs(const Fit& fit, const Run& run) {
    if constexpr (sizeof(T) == 2)
        if (fit.packs<T>(8)) return run(Constant<8>{});
    if (fit.packs<T>(4)) return run(Constant<4>{});
    if (kLeast == 2 || fit.packs<T>(2)) return run(Constant<2>{});
    if constexpr (kLeast == 1) run(Constant<1>{});
}

// Packs of four or one: float32 numbers lead, so that four are 16 bytes.
template <class T, class Run>
void with_four(const Fit& numbers, const Fit& floats, const Run& run) {
    if (numbers.packs<T>(4) && floats.packs<float>(4)) return run(Constant<4>{});
    run(Constant<1>{});
}

template <class Run>
void with_packs_of(const NormJob& job, const Run& run) {
    Fit floats, numbers;
    floats.at(job.x).at(job.gate).at(job.scale).at(job.shift);
    floats.by(job.gate_stride).by(job.scale_stride).by(job.shift_stride);
    numbers.at(job.branch).at(job.out).by(job.width);
    with_type(job.number, [&](auto zero) {
        using T = decltype(zero);
        with_four<T>(numbers, floats, [&](auto packs) { run(zero, packs); });
    });
}

// kLeast: 2 where pairs must stay together.
template <int kLeast, class Run>
void with_packs_of(const AppendJob& job, const Run& run) {
    Fit fit;
    fit.at(job.qkv).at(job.cache).by(job.width).by(job.part_stride).by(job.row_stride).by(job.head_stride);
    with_type(job.number, [&](auto zero) {
        with_packs<decltype(zero), kLeast>(fit, [&](auto packs) { run(zero, packs); });
    });
}

template <class Run>
void with_packs_of(const SwigluJob& job, const Run& run) {
    Fit fit;
    fit.at(job.gate_up).at(job.out).by(job.hidden);
    with_type(job.number, [&](auto zero) {
        with_packs<decltype(zero), 1>(fit, [&](auto packs) { run(zero, packs); });
    });
}

// run(T{}, Code{}, Constant<V>): packs of 16 bytes of x, or of one number.
template <class Run>
void with_packs_of(const QuantizeJob& job, const Run& run) {
    Fit numbers, codes;
    numbers.at(job.x).by(job.width);
    codes.at(job.codes);
    with_type(job.number, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kMost = 16 / sizeof(T);
        const auto with_codes = [&](auto code) {
            using Code = decltype(code);
            if (numbers.packs<T>(kMost) && codes.packs<Code>(kMost)) return run(zero, code, Constant<kMost>{});
            run(zero, code, Constant<1>{});
        };
        job.e4m3 ? with_codes(E4m3{}) : with_codes(Byte{});
    });
}

template <class Run>
void with_packs_of(const DecodeJob& job, const Run& run) {
    Fit fit;
    fit.at(job.q).at(job.cache).by(job.width).by(job.q_row_stride).by(job.q_head_stride);
    fit.by(job.part_stride).by(job.row_stride).by(job.head_stride);
    with_type(job.number, [&](auto zero) {
        with_packs<decltype(zero), 2>(fit, [&](auto packs) { run(zero, packs); });
    });
}

template <class Run>
void with_packs_of(const QuantizerJob& job, const Run& run) {
    Fit fit;
    fit.at(job.codebook).at(job.taps).at(job.bias).at(job.f_hat).at(job.out).by(job.channels);
    with_four<float>(fit, fit, run);
}

}  // namespace ddfast
