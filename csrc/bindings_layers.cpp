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

void gelu(uintptr_t x, uintptr_t dy, int64_t count, uintptr_t out, bool half) {
    ddfast::cpu::gelu({at<void>(x), at<void>(dy), count, at<void>(out), half});
}

void glu(uintptr_t gate, uintptr_t up, uintptr_t dout, int64_t count, uintptr_t out, uintptr_t dgate, uintptr_t dup,
         bool half) {
    ddfast::cpu::glu(
        {at<void>(gate), at<void>(up), at<void>(dout), count, at<void>(out), at<void>(dgate), at<void>(dup), half});
}

void turn_heads(uintptr_t qkv, uintptr_t rope, int64_t rows, int64_t n, int64_t heads, int64_t kv_heads, int64_t width,
                uintptr_t q, uintptr_t k, uintptr_t v, bool back, bool half) {
    ddfast::cpu::turn_heads({at<void>(qkv), at<float>(rope), rows, n, heads, kv_heads, width, at<void>(q), at<void>(k),
                             at<void>(v), back, half});
}

void norm_gradient(uintptr_t x, uintptr_t dy, uintptr_t scale, uintptr_t weight, int64_t scale_stride, float eps,
                   int64_t rows, int64_t n, int64_t dim, uintptr_t dx, uintptr_t sums, bool half) {
    ddfast::cpu::norm_gradient({at<float>(x), at<void>(dy), at<float>(scale), at<float>(weight), scale_stride, eps,
                                rows, n, dim, at<float>(dx), at<float>(sums), half});
}

void gate(uintptr_t x, uintptr_t branch, uintptr_t gate, int64_t gate_stride, int64_t rows, int64_t n, int64_t dim,
          uintptr_t out, uintptr_t dbranch, uintptr_t sums, bool half) {
    ddfast::cpu::gate({at<float>(x), at<void>(branch), at<float>(gate), gate_stride, rows, n, dim, at<float>(out),
                       at<void>(dbranch), at<float>(sums), half});
}

void split_heads(uintptr_t qkv, uintptr_t scale, int64_t rows, int64_t n, int64_t heads, int64_t width, uintptr_t q,
                 uintptr_t k, uintptr_t v, uintptr_t dqkv, uintptr_t sums, bool half) {
    ddfast::cpu::split_heads({at<void>(qkv), at<float>(scale), rows, n, heads, width, at<float>(q), at<float>(k),
                              at<void>(v), at<void>(dqkv), at<float>(sums), half});
}

void softmax_rows(uintptr_t scores, int64_t batch, int64_t n, int64_t keys, int64_t stride, uintptr_t own_score,
                  uintptr_t own, uintptr_t lse, uintptr_t dp, uintptr_t carried, float factor, uintptr_t p,
                  uintptr_t ds, bool half) {
    ddfast::cpu::softmax_rows({at<float>(scores), batch, n, keys, stride, at<float>(own_score), at<float>(own),
                               at<float>(lse), at<void>(dp), at<float>(carried), factor, at<void>(p), at<void>(ds),
                               half});
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
    module.def("parts_of", &ddfast::cpu::parts_of);
    bind("gelu_cpu", &gelu);
    bind("glu_cpu", &glu);
    bind("turn_heads_cpu", &turn_heads);
    bind("norm_gradient_cpu", &norm_gradient);
    bind("gate_cpu", &gate);
    bind("split_heads_cpu", &split_heads);
    bind("softmax_rows_cpu", &softmax_rows);
}
