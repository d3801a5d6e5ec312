// The CUDA kernels between a transformer's matrix products, as _C.NAME_cuda; and their bodies run by one thread of the
// host, as _C.NAME_host, for tests. See ddfast/_native_cuda.py.
#include <pybind11/pybind11.h>

#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings.h"
#include "core/layers_dispatch.h"
#if defined(DDFAST_CUDA)
#include "cuda/layers.h"
#endif

namespace py = pybind11;

namespace {

using namespace ddfast;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Jobs from what Python gives

NormJob norm_job(uintptr_t x, uintptr_t branch, uintptr_t gate, int64_t gate_stride, uintptr_t scale,
                 int64_t scale_stride, uintptr_t shift, int64_t shift_stride, float eps, int64_t rows, int64_t n,
                 int width, uintptr_t out, int number) {
    return {at<float>(x), at<void>(branch), at<float>(gate), gate_stride, at<float>(scale), scale_stride,
            at<float>(shift), shift_stride, eps, rows * n, n, width, at<void>(out), static_cast<Number>(number)};
}

AppendJob append_job(uintptr_t qkv, uintptr_t scale, uintptr_t rope, int64_t rows, int64_t n, int heads, int kv_heads,
                     int width, uintptr_t cache, int64_t part_stride, int64_t row_stride, int64_t head_stride,
                     int64_t positions, uintptr_t length, int number) {
    return {at<void>(qkv), at<float>(scale), at<float>(rope), rows, n, heads, kv_heads, width, at<void>(cache),
            part_stride, row_stride, head_stride, positions, at<int32_t>(length), static_cast<Number>(number)};
}

DecodeJob decode_job(uintptr_t q, int64_t q_row_stride, int64_t q_head_stride, uintptr_t cache, int64_t part_stride,
                     int64_t row_stride, int64_t head_stride, int64_t rows, int heads, int kv_heads, int positions,
                     int width, uintptr_t length, float scale, int splits, uintptr_t parts, uintptr_t out, int number) {
    return {at<void>(q), q_row_stride, q_head_stride, at<void>(cache), part_stride, row_stride, head_stride, rows,
            heads, kv_heads, positions, width, at<int32_t>(length), scale, splits, at<float>(parts), at<void>(out),
            static_cast<Number>(number)};
}

SwigluJob swiglu_job(uintptr_t gate_up, int64_t rows, int64_t hidden, uintptr_t out, int number) {
    return {at<void>(gate_up), rows, hidden, at<void>(out), static_cast<Number>(number)};
}

QuantizeJob quantize_job(uintptr_t x, int64_t rows, int width, uintptr_t codes, bool e4m3, uintptr_t scale,
                         int number) {
    return {at<void>(x), rows, width, at<void>(codes), e4m3, at<float>(scale), static_cast<Number>(number)};
}

QuantizerJob quantizer_job(uintptr_t tokens, uintptr_t codebook, uintptr_t up, uintptr_t taps, int kernel,
                           uintptr_t bias, float ratio, int64_t batch, int n, int side, int channels, uintptr_t f_hat,
                           uintptr_t down, int outputs, uintptr_t out) {
    return {at<int64_t>(tokens), at<float>(codebook), at<float>(up), at<float>(taps), kernel, at<float>(bias), ratio,
            batch, n, side, channels, at<float>(f_hat), at<float>(down), outputs, at<float>(out)};
}

// The bodies on the host

template <bool kCentred>
void norm_host(const NormJob& job) {
    with_packs_of(job, [&](auto zero, auto packs) {
        for (int64_t row = 0; row < job.rows; ++row)
            norm_row<decltype(zero), decltype(packs)::value, kCentred>(job, row, Alone{});
    });
}

template <bool kRotated>
void append_host(const AppendJob& job) {
    const int64_t count = job.rows * job.n * heads_of(job);
    with_packs_of<kRotated ? 2 : 1>(job, [&](auto zero, auto packs) {
        for (int64_t i = 0; i < count; ++i)
            append_vector<decltype(zero), decltype(packs)::value, kRotated>(job, static_cast<uint32_t>(i), Alone{});
    });
}

void swiglu_host(const SwigluJob& job) {
    with_packs_of(job, [&](auto zero, auto packs) {
        constexpr int kVector = decltype(packs)::value;
        for (int64_t row = 0; row < job.rows; ++row)
            for (int64_t at = 0; at < job.hidden; at += kVector)
                swiglu_pack<decltype(zero), kVector>(job, row, at);
    });
}

void quantize_host(const QuantizeJob& job) {
    with_packs_of(job, [&](auto zero, auto code, auto packs) {
        for (int64_t row = 0; row < job.rows; ++row)
            quantize_row<decltype(zero), decltype(code), decltype(packs)::value>(job, row, Alone{});
    });
}

// One thread that does the work of several streams, one after another.
struct AloneInStreams : Alone {
    DDFAST_MEMBER int lanes() const { return 1; }
    DDFAST_MEMBER int lane() const { return 0; }
    DDFAST_MEMBER float lane_sum(float x) const { return x; }
    DDFAST_MEMBER int stream() const { return 0; }
    DDFAST_MEMBER int streams() const { return 3; }
    DDFAST_MEMBER int stream_step() const { return 1; }
};

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();  // what scratch holds before it is written

template <int kHeads, class T, int kVector>
void decode_heads(const DecodeJob& job) {
    const int sharing = job.heads / job.kv_heads, streams = AloneInStreams{}.streams();
    for (int64_t row = 0; row < job.rows; ++row)
        for (int kv_head = 0; kv_head < job.kv_heads; ++kv_head)
            for (int head = kv_head * sharing; head < (kv_head + 1) * sharing; head += kHeads)
                for (int split = 0; split < job.splits; ++split) {
                    std::vector<float> shared(streams * kHeads * (job.width + kPartHead), kPoison);
                    decode_split<T, kVector, kMostWidth / kVector, kHeads>(
                        job, row, kv_head, head, (kv_head + 1) * sharing, split, shared.data(), AloneInStreams{});
                }
}

void decode_host(const DecodeJob& job) {
    with_packs_of(job, [&](auto zero, auto packs) {
        using T = decltype(zero);
        constexpr int kVector = decltype(packs)::value;
        job.heads == job.kv_heads ? decode_heads<1, T, kVector>(job) : decode_heads<4, T, kVector>(job);
        for (int64_t query = 0; query < job.rows * job.heads && job.splits > 1; ++query)
            join_splits<T>(job, query, Alone{});
    });
}

void quantizer_host(const QuantizerJob& job) {
    constexpr int kLines = 3;
    with_packs_of(job, [&](auto packs) {
        constexpr int kVector = decltype(packs)::value;
        for (int64_t image = 0; image < job.batch; ++image)
            for (int band = 0; band < num_bands(job, kLines); ++band) {
                const Pack<float, 4> poison{kPoison, kPoison, kPoison, kPoison};
                std::vector<Pack<float, 4>> h((band_numbers(job, kLines) + 3) / 4, poison);
                add_band<kVector>(job, image, band * kLines, kLines, h.data()->at, Alone{});
            }
        for (int64_t item = 0; job.down && item < reduce_items<kVector>(job); ++item) reduce_item<kVector>(job, item);
    });
}

// NAME_host(arguments) and, with a launch(job, stream), NAME_cuda(arguments, stream).
template <class Job, class... Arguments, class Launch>
void define(py::module_& module, const std::string& name, Job (*make)(Arguments...), void (*host)(const Job&),
            Launch launch) {
    const py::call_guard<py::gil_scoped_release> guard;
    module.def((name + "_host").c_str(), [=](Arguments... arguments) { host(make(arguments...)); }, guard);
    if constexpr (!std::is_null_pointer_v<Launch>)
        module.def(
            (name + "_cuda").c_str(),
            [=](Arguments... arguments, uintptr_t stream) { launch(make(arguments...), at<void>(stream)); }, guard);
}

}  // namespace

#if defined(DDFAST_CUDA)
#define DDFAST_ON_CUDA(name) &ddfast::cuda::name
#else
#define DDFAST_ON_CUDA(name) nullptr
#endif

void bind_cuda(py::module_& module) {
    define(module, "add_layer_norm", norm_job, norm_host<true>, DDFAST_ON_CUDA(add_layer_norm));
    define(module, "add_rms_norm", norm_job, norm_host<false>, DDFAST_ON_CUDA(add_rms_norm));
    define(module, "append_normed", append_job, append_host<false>, DDFAST_ON_CUDA(append_normed));
    define(module, "append_rotated", append_job, append_host<true>, DDFAST_ON_CUDA(append_rotated));
    define(module, "decode_attention", decode_job, decode_host, DDFAST_ON_CUDA(decode_attention));
    define(module, "swiglu", swiglu_job, swiglu_host, DDFAST_ON_CUDA(swiglu));
    define(module, "quantize_rows", quantize_job, quantize_host, DDFAST_ON_CUDA(quantize_rows));
    define(module, "quantizer_step", quantizer_job, quantizer_host, DDFAST_ON_CUDA(quantizer_step));
}
