// What each bindings_*.cpp adds to ddfast._C.
#pragma once

#include <pybind11/pybind11.h>

void bind_layers(pybind11::module_& module);  // the CPU loops between a transformer's matrix products
void bind_cuda(pybind11::module_& module);    // their CUDA kernels, and the kernels' bodies on the host for tests
