#include "bindings.h"
#include "cpu/layers.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void add_layer_norm(uintptr_t x, uintptr_t branch, uintptr_t gate, int64_t gate_stride, uintptr_t scale,
                    int64_t scale_stride, uintptr_t shift, int64_t shift_stride, float eps, int64_t rows, int64_t n,
                    int64_t dim, uintptr_t out, bool half) {
    ddfast::cpu::NormJob job{};
    job.x = at<float>(x);
    job.branch = at<void>(branch);
    job.gate = at<float>(gate);
    job.scale = at<float>(scale);
    job.shift = at<float>(shift);
    job.gate_stride = gate_stride;
    job.scale_stride = scale_stride;
    job.shift_stride = shift_stride;
    job.eps = eps;
    job.rows = rows * n;
    job.per = n;
    job.dim = dim;
    job.out = at<void>(out);
    job.half = half;
    ddfast::cpu::norm(job);
}

void add_rms_norm(uintptr_t x, uintptr_t branch, uintptr_t weight, float eps, int64_t rows, int64_t dim, uintptr_t out,
                  bool half) {
    ddfast::cpu::NormJob job{};
    job.x = at<float>(x);
    job.branch = at<void>(branch);
    job.weight = at<float>(weight);
    job.eps = eps;
    job.rows = rows;
    job.per = 1;
    job.dim = dim;
    job.out = at<void>(out);
    job.half = half;
    ddfast::cpu::norm(job);
}

void append_normed(uintptr_t qkv, uintptr_t scale, int64_t rows, int64_t n, int64_t heads, int64_t width,
                   uintptr_t cache, int64_t side_stride, int64_t row_stride, int64_t head_stride,
                   int64_t position_stride, uintptr_t length, bool half) {
    ddfast::cpu::append({at<void>(qkv), at<float>(scale), nullptr, rows, n, heads, heads, width, at<void>(cache),
                         side_stride, row_stride, head_stride, position_stride, *at<int32_t>(length), half});
}

void append_rotated(uintptr_t qkv, uintptr_t rope, int64_t rows, int64_t n, int64_t heads, int64_t kv_heads,
                    int64_t width, uintptr_t cache, int64_t side_stride, int64_t row_stride, int64_t head_stride,
                    int64_t position_stride, uintptr_t length, bool half) {
    ddfast::cpu::append({at<void>(qkv), nullptr, at<float>(rope), rows, n, heads, kv_heads, width, at<void>(cache),
                         side_stride, row_stride, head_stride, position_stride, *at<int32_t>(length), half});
}

void attention(uintptr_t q, int64_t q_row, int64_t q_position, int64_t q_head, uintptr_t k, int64_t k_row,
               int64_t k_head, int64_t k_position, uintptr_t v, int64_t v_row, int64_t v_head, int64_t v_position,
               int64_t rows, int64_t n, int64_t heads, int64_t kv_heads, int64_t keys, int64_t width, float scale,
               uintptr_t out, bool half) {
    ddfast::cpu::attention({at<void>(q), q_row,       q_position, q_head, at<void>(k), k_row,         k_head,
                            k_position,  at<void>(v), v_row,      v_head, v_position,  rows,          n,
                            heads,       kv_heads,    keys,       width,  scale,       at<void>(out), half});
}

void swiglu(uintptr_t gate_up, int64_t rows, int64_t hidden, uintptr_t out, bool half) {
    ddfast::cpu::swiglu({at<void>(gate_up), rows, hidden, at<void>(out), half});
}

void quantizer_step(uintptr_t tokens, uintptr_t codebook, uintptr_t up, uintptr_t taps, int64_t num_taps,
                    uintptr_t bias, float ratio, int64_t batch, int64_t n, int64_t size, int64_t channels,
                    uintptr_t f_hat, uintptr_t down, int64_t m, uintptr_t out) {
    const auto root = [](int64_t square) {
        int64_t side = 0;
        while ((side + 1) * (side + 1) <= square) ++side;
        return side;
    };
    ddfast::cpu::quantizer_step({at<int64_t>(tokens), at<float>(codebook), at<float>(up), at<float>(taps),
                                 at<float>(bias), ratio, batch, n, root(size), channels, root(num_taps),
                                 at<float>(f_hat), at<float>(down), m, at<float>(out)});
}

void quantize_rows(uintptr_t x, int64_t rows, int64_t width, uintptr_t codes, uintptr_t scale, bool half) {
    ddfast::cpu::quantize_rows({at<void>(x), rows, width, at<uint8_t>(codes), at<float>(scale), half});
}

void scale_rows(uintptr_t product, uintptr_t scale, uintptr_t bias, bool gelu, int64_t rows, int64_t width,
                uintptr_t out, bool half) {
    ddfast::cpu::scale_rows(
        {at<float>(product), at<float>(scale), at<float>(bias), gelu, rows, width, at<void>(out), half});
}

}  // namespace

void bind_layers(py::module_& module) {
    const auto bind = [&](const char* name, auto function) {
        module.def(name, function, py::call_guard<py::gil_scoped_release>());
    };
    bind("add_layer_norm_cpu", &add_layer_norm);
    bind("add_rms_norm_cpu", &add_rms_norm);
    bind("append_normed_cpu", &append_normed);
    bind("append_rotated_cpu", &append_rotated);
    bind("attention_cpu", &attention);
    bind("swiglu_cpu", &swiglu);
    bind("quantizer_step_cpu", &quantizer_step);
    bind("quantize_rows_cpu", &quantize_rows);
    bind("scale_rows_cpu", &scale_rows);
}
