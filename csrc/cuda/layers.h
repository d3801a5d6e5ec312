#pragma once

#include "../core/layers.h"
#include "../core/layers_attention.h"

// The operations of core/layers.h and core/layers_attention.h on the current device; every pointer of a job is a
// device's, and stream is a cudaStream_t. None allocates, or waits for a result. Each throws std::runtime_error when
// the launch fails.
namespace ddfast::cuda {

void add_layer_norm(const NormJob& job, void* stream);
void add_rms_norm(const NormJob& job, void* stream);
void append_normed(const AppendJob& job, void* stream);
void append_rotated(const AppendJob& job, void* stream);
void decode_attention(const DecodeJob& job, void* stream);
void swiglu(const SwigluJob& job, void* stream);
void quantizer_step(const QuantizerJob& job, void* stream);
void quantize_rows(const QuantizeJob& job, void* stream);

}  // namespace ddfast::cuda
