// ddfast._C: tensors cross as addresses (Tensor.data_ptr()), so the extension needs no torch to build or load. Callers
// check shapes, dtypes and contiguity before they come here; see ddfast/_native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/fast.h"
#include "cpu/kernels.h"
#if defined(DDFAST_CUDA)
#include "cuda/noise.h"
#endif

namespace py = pybind11;

namespace {

ddfast::NoiseJob noise_job(uint64_t seed, uintptr_t pairs, int64_t num_pairs, int64_t start, int64_t stop,
                           int64_t channels, uintptr_t out) {
    return {seed,
            reinterpret_cast<const int64_t*>(pairs),
            num_pairs,
            static_cast<uint32_t>(start),
            stop - start,
            channels,
            reinterpret_cast<float*>(out)};
}

using Table = std::vector<std::vector<float>>;

// Rows of weights, filled up with zeros to the longest history.
std::vector<float> flat_table(const Table& table) {
    std::vector<float> flat;
    for (std::vector<float> row : table) {
        if (row.size() > ddfast::cpu::kMostHistory) throw std::invalid_argument("the history is too long");
        row.resize(ddfast::cpu::kMostHistory);
        flat.insert(flat.end(), row.begin(), row.end());
    }
    return flat;
}

ddfast::cpu::Filter filter_of(float temperature, int64_t top_k, double top_p, int rule) {
    return {temperature, top_k, top_p, static_cast<ddfast::cpu::Rule>(rule)};
}

void filter_cpu(uintptr_t logits, int64_t rows, int64_t vocab, float temperature, int64_t top_k, double top_p, int rule,
                uintptr_t out) {
    ddfast::cpu::filter_logits({reinterpret_cast<const float*>(logits), rows, vocab,
                                filter_of(temperature, top_k, top_p, rule), reinterpret_cast<float*>(out)});
}

void flow_cpu(uintptr_t cond, uintptr_t uncond, int dtype, uintptr_t noise, uintptr_t codebook, int64_t rows,
              int64_t vocab, int64_t channels, double guidance, float temperature, int64_t top_k, double top_p,
              int rule, const std::vector<float>& knots, const Table& predict, const Table& correct, float offset,
              float shrink, float certain, float pair, float prune, uintptr_t tokens, uintptr_t x,
              uintptr_t evaluations) {
    const std::vector<float> predictor = flat_table(predict), corrector = flat_table(correct);
    ddfast::cpu::FlowJob job{};
    job.cond = reinterpret_cast<const void*>(cond);
    job.uncond = reinterpret_cast<const void*>(uncond);
    job.type = static_cast<ddfast::cpu::LogitType>(dtype);
    job.noise = reinterpret_cast<const float*>(noise);
    job.codebook = reinterpret_cast<const float*>(codebook);
    job.rows = rows;
    job.vocab = vocab;
    job.channels = channels;
    job.guidance = guidance;
    job.filter = filter_of(temperature, top_k, top_p, rule);
    job.solver = {static_cast<int>(knots.size()), knots.data(), predictor.data(), corrector.data(), offset, shrink,
                  certain, pair, prune};
    job.tokens = reinterpret_cast<int64_t*>(tokens);
    job.x = reinterpret_cast<float*>(x);
    job.evaluations = reinterpret_cast<int32_t*>(evaluations);
    ddfast::cpu::flow(job);
}

void nearest_cpu(uintptr_t x, int64_t rows, uintptr_t codebook, int64_t vocab, int64_t channels, uintptr_t out) {
    ddfast::cpu::nearest_code({reinterpret_cast<const float*>(x), rows, reinterpret_cast<const float*>(codebook), vocab,
                               channels, reinterpret_cast<int64_t*>(out), nullptr});
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled loops of ddfast. Use ddfast.ops.";

    module.def("cpu_levels", &ddfast::cpu::levels);
    module.def("cpu_level", &ddfast::cpu::level);
    module.def("set_cpu_level", &ddfast::cpu::set_level, py::arg("name"));
    module.def("set_poison", &ddfast::cpu::set_poison, py::arg("on"));
    module.def(
        "normal_noise_cpu",
        [](uint64_t seed, uintptr_t pairs, int64_t num_pairs, int64_t start, int64_t stop, int64_t channels,
           uintptr_t out) { ddfast::cpu::normal_noise(noise_job(seed, pairs, num_pairs, start, stop, channels, out)); },
        py::arg("seed"), py::arg("pairs"), py::arg("num_pairs"), py::arg("start"), py::arg("stop"), py::arg("channels"),
        py::arg("out"), py::call_guard<py::gil_scoped_release>());
    module.def("filter_cpu", &filter_cpu, py::arg("logits"), py::arg("rows"), py::arg("vocab"), py::arg("temperature"),
               py::arg("top_k"), py::arg("top_p"), py::arg("rule"), py::arg("out"),
               py::call_guard<py::gil_scoped_release>());
    module.def("flow_cpu", &flow_cpu, py::arg("cond"), py::arg("uncond"), py::arg("dtype"), py::arg("noise"),
               py::arg("codebook"), py::arg("rows"), py::arg("vocab"), py::arg("channels"), py::arg("guidance"),
               py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("rule"), py::arg("knots"),
               py::arg("predict"), py::arg("correct"), py::arg("offset"), py::arg("shrink"), py::arg("certain"),
               py::arg("pair"), py::arg("prune"), py::arg("tokens"), py::arg("x"), py::arg("evaluations"),
               py::call_guard<py::gil_scoped_release>());
    module.def("nearest_cpu", &nearest_cpu, py::arg("x"), py::arg("rows"), py::arg("codebook"), py::arg("vocab"),
               py::arg("channels"), py::arg("out"), py::call_guard<py::gil_scoped_release>());

    bind_layers(module);
    bind_cuda(module);

#if defined(DDFAST_CUDA)
    module.attr("cuda_built") = true;
    module.def(
        "normal_noise_cuda",
        [](uint64_t seed, uintptr_t pairs, int64_t num_pairs, int64_t start, int64_t stop, int64_t channels,
           uintptr_t out, uintptr_t stream) {
            ddfast::cuda::normal_noise(noise_job(seed, pairs, num_pairs, start, stop, channels, out),
                                       reinterpret_cast<void*>(stream));
        },
        py::arg("seed"), py::arg("pairs"), py::arg("num_pairs"), py::arg("start"), py::arg("stop"), py::arg("channels"),
        py::arg("out"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#else
    module.attr("cuda_built") = false;
#endif
}
