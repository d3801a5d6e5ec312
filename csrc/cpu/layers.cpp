// The loops of layers.h, compiled once per instruction set with DDFAST_LAYER_KERNELS naming the table; as in
// kernels.cpp, no standard templates.
#include "layers.h"

#include "attention.h"
#include "gradients.h"
#include "int8.h"
#include "norms.h"
#include "quantizer.h"

namespace ddfast::cpu {

extern const LayerKernels DDFAST_LAYER_KERNELS{
    norm_rows, append_row, attend,   attend_floats,      swiglu_row, quantize_image,   quantize_floats, quantize_row,
    scale_row, gelu_part,  glu_part, norm_gradient_part, gate_part,  split_heads_part, turn_heads_part, softmax_row};

}  // namespace ddfast::cpu
