// ddfast._C: tensors cross as addresses (Tensor.data_ptr()), so the extension needs no torch to build or load. Callers
// check shapes, dtypes and contiguity before they come here; see ddfast/_native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled loops of ddfast. Use ddfast.ops.";

    module.def("cpu_levels", &ddfast::cpu::levels);
    module.def("cpu_level", &ddfast::cpu::level);
    module.def("set_cpu_level", &ddfast::cpu::set_level, py::arg("name"));
    module.def(
        "normal_noise_cpu",
        [](uint64_t seed, uintptr_t pairs, int64_t num_pairs, int64_t start, int64_t stop, int64_t channels,
           uintptr_t out) { ddfast::cpu::normal_noise(noise_job(seed, pairs, num_pairs, start, stop, channels, out)); },
        py::arg("seed"), py::arg("pairs"), py::arg("num_pairs"), py::arg("start"), py::arg("stop"), py::arg("channels"),
        py::arg("out"), py::call_guard<py::gil_scoped_release>());

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
