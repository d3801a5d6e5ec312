// What a cached transformer does between its matrix products, on the CPU: what one call asks for, and the table of
// loops that answer it. ddfast/layers.py is the readable twin. Models are float32 or bfloat16; sums are float32.
//
// Axes: R rows of a batch, n positions of a call, H heads, Hk heads of keys and values, d head width, S keys.
#pragma once

#include <cstdint>

#include "training.h"

namespace ddfast::cpu {

// x += gate * branch or x += branch, then out = layer_norm(x) * (1 + scale) + shift or rms_norm(x) * weight.
struct NormJob {
    float* x;            // [rows, dim]
    const void* branch;  // [rows, dim] or null
    const float* gate;   // [rows / per, dim] at gate_stride, or null
    const float* scale;  // likewise; null: rms_norm
    const float* shift;
    const float* weight;  // [dim], for rms_norm
    int64_t gate_stride, scale_stride, shift_stride;
    float eps;
    int64_t rows, per, dim;  // per: consecutive rows that share gate, scale and shift
    void* out;               // [rows, dim]
    bool half;               // branch and out are bfloat16, not float32
};

// Queries are normed or turned in place; keys, likewise, and values go to the cache.
struct AppendJob {
    void* qkv;           // [R, n, 3, H, d], or [R, n, H + 2 Hk, d]
    const float* scale;  // [H]: norm queries and keys, then scale queries; or null
    const float* rope;   // [.., d / 2, 2], cos and sin by position: turn queries and keys; or null
    int64_t rows, n, heads, kv_heads, width;
    void* cache;  // [2, R, Hk, L, d] of these strides, then 1
    int64_t side_stride, row_stride, head_stride, position_stride;
    int64_t start;  // the first position to write
    bool half;
};

// out = softmax(scale q k^T) v
struct AttentionJob {
    const void* q;  // [R, n, H, d]
    int64_t q_row, q_position, q_head;
    const void* k;  // [R, Hk, S, d]
    int64_t k_row, k_head, k_position;
    const void* v;
    int64_t v_row, v_head, v_position;
    int64_t rows, n, heads, kv_heads, keys, width;
    float scale;
    void* out;  // [R, n, H, d]
    bool half;
};

struct SwigluJob {
    const void* gate_up;  // [rows, 2 hidden]
    int64_t rows, hidden;
    void* out;  // [rows, hidden]
    bool half;
};

// h = up codes; f_hat += (1 - ratio) h + ratio (conv(h) + bias); out = down f_hat
struct QuantizerJob {
    const int64_t* tokens;  // [batch, n]
    const float* codebook;  // [V, channels]
    const float* up;        // [side * side, n]; null: h is the codes
    const float* taps;      // [kernel * kernel, channels in, channels out]
    const float* bias;      // [channels]
    float ratio;
    int64_t batch, n, side, channels, kernel;
    float* f_hat;       // [batch, side * side, channels]
    const float* down;  // [m, side * side] or null
    int64_t m;
    float* out;  // [batch, m, channels] or null
};

// scale = max |x| / 127 of each row, codes = x / scale + 128, to the nearest
struct QuantizeJob {
    const void* x;  // [rows, width]
    int64_t rows, width;
    uint8_t* codes;  // [rows, width]
    float* scale;    // [rows]
    bool half;
};

// out = product * scale + bias, or gelu of that
struct ScaleJob {
    const float* product;  // [rows, width]; out may be the same
    const float* scale;    // [rows]
    const float* bias;     // [width]
    bool gelu;
    int64_t rows, width;
    void* out;  // [rows, width]
    bool half;
};

struct LayerKernels {
    void (*norm_rows)(const NormJob& job, int64_t first, int64_t last);
    void (*append_row)(const AppendJob& job, int64_t row, int64_t position, float* scratch);
    // Heads first .. last - 1 of the keys.
    void (*attend)(const AttentionJob& job, int64_t row, int64_t first, int64_t last, float* scratch);
    int64_t (*attend_floats)(const AttentionJob& job);  // of scratch
    void (*swiglu_row)(const SwigluJob& job, int64_t row);
    void (*quantize_image)(const QuantizerJob& job, int64_t image, float* scratch);
    int64_t (*quantize_floats)(const QuantizerJob& job);
    void (*quantize_row)(const QuantizeJob& job, int64_t row);
    void (*scale_row)(const ScaleJob& job, int64_t row);
    // Of training.h. A part is kPart positions of an image.
    void (*gelu_part)(const GeluJob& job, int64_t first, int64_t last);
    void (*glu_part)(const GluJob& job, int64_t first, int64_t last);
    void (*norm_gradient_part)(const NormGradientJob& job, int64_t row, int64_t part);
    void (*gate_part)(const GateJob& job, int64_t row, int64_t part);
    void (*split_heads_part)(const HeadsJob& job, int64_t row, int64_t part);
    void (*turn_heads_part)(const TurnJob& job, int64_t row, int64_t part);
    void (*softmax_row)(const SoftmaxJob& job, int64_t row);
};

extern const LayerKernels baseline_layer_kernels;
#if defined(DDFAST_X86_LEVELS)
extern const LayerKernels v3_layer_kernels;
extern const LayerKernels v4_layer_kernels;
#if defined(DDFAST_BF16_LEVEL)
extern const LayerKernels v4_bf16_layer_kernels;
#endif
#endif

// Each on as many threads as OpenMP has been given, and on one where there is little to do.
void norm(const NormJob& job);
void append(const AppendJob& job);
void attention(const AttentionJob& job);
void swiglu(const SwigluJob& job);
void quantizer_step(const QuantizerJob& job);
void quantize_rows(const QuantizeJob& job);
void scale_rows(const ScaleJob& job);

}  // namespace ddfast::cpu
