// What a student's blocks do between their matrix products, forwards where layers.h lacks it, and backwards.
// ddfast/models/fused.py has the readable twins. Values are float32 or bfloat16 (`half`); sums are float32.
//
// Axes: R images, n positions of an image, D width, H heads, d head width, N heads of all images, s keys.
#pragma once

#include <cstdint>

namespace ddfast::cpu {

constexpr int64_t kPart = 32;  // positions whose sums one task adds up

static inline int64_t parts_of(int64_t positions) { return (positions + kPart - 1) / kPart; }

// out = gelu(x), or dy gelu'(x) where dy is given
struct GeluJob {
    const void* x;   // [count]
    const void* dy;  // [count] or null
    int64_t count;
    void* out;  // [count]
    bool half;
};

// out = silu(gate) * up; or, where dout is given, dgate and dup.
struct GluJob {
    const void *gate, *up;  // [count]
    const void* dout;       // [count] or null
    int64_t count;
    void* out;          // [count]
    void *dgate, *dup;  // [count]
    bool half;
};

// Of y = layer_norm(x) * (1 + scale) + shift or y = rms_norm(x) * weight: dx, and sums of dy xhat and of dy over the
// positions of each part.
struct NormGradientJob {
    const float* x;       // [R, n, D]
    const void* dy;       // [R, n, D]
    const float* scale;   // [R, D] at scale_stride; null: rms_norm
    const float* weight;  // [D], for rms_norm
    int64_t scale_stride;
    float eps;
    int64_t rows, n, dim;
    float* dx;    // [R, n, D]
    float* sums;  // [R, parts, 2, D]: of scale or weight, and of shift
    bool half;    // dy is bfloat16
};

// out = x + gate * branch; or, from dout, dbranch = gate * dout and sums of branch * dout over the positions of each
// part
struct GateJob {
    const float* x;      // [R, n, D]; backwards dout
    const void* branch;  // [R, n, D]
    const float* gate;   // [R, D] at gate_stride
    int64_t gate_stride;
    int64_t rows, n, dim;
    float* out;     // [R, n, D]; null: backwards
    void* dbranch;  // [R, n, D]
    float* sums;    // [R, parts, D]
    bool half;      // branch and dbranch are bfloat16
};

// q = scale q / |q|, k = k / |k|, with heads before positions; or, from their gradients, that of qkv.
struct HeadsJob {
    const void* qkv;     // [R, n, 3, H, d]
    const float* scale;  // [H]
    int64_t rows, n, heads, width;
    float *q, *k;  // [R, H, n, d]; backwards dq, dk
    void* v;       // [R, H, n, d]; backwards dv
    void* dqkv;    // [R, n, 3, H, d]; null: forwards
    float* sums;   // [R, parts, H] of scale's gradient
    bool half;     // qkv, v and dqkv are bfloat16
};

// q and k turned by position, with heads before positions; or, from the gradients of q, k and v, that of qkv.
struct TurnJob {
    void* qkv;          // [R, n, H + 2 Hk, d]
    const float* rope;  // [2, n, d / 2], cos and sin
    int64_t rows, n, heads, kv_heads, width;
    void *q, *k, *v;  // [R, H or Hk, n, d]
    bool back;        // qkv is written, not read
    bool half;
};

// Forwards: p = softmax over the row and its own score, which gets `own`, and lse the logarithm of the sum. Backwards:
// p = e^(scores - lse), ds = p (dp - carried) factor.
struct SoftmaxJob {
    const float* scores;  // [N, n, s]
    int64_t batch, n, keys;
    int64_t stride;  // between images' heads of own_score, lse and carried, whose positions are dense
    const float* own_score;
    float* own;  // like own_score; null: backwards
    float* lse;
    const void* dp;  // [N, n, s]
    const float* carried;
    float factor;
    void* p;    // [N, n, s]
    void* ds;   // [N, n, s], may be dp
    bool half;  // p, dp and ds are bfloat16
};

// Each on as many threads as OpenMP has been given, with the same sums on any number of them.
void gelu(const GeluJob& job);
void glu(const GluJob& job);
void norm_gradient(const NormGradientJob& job);
void gate(const GateJob& job);
void split_heads(const HeadsJob& job);
void turn_heads(const TurnJob& job);
void softmax_rows(const SoftmaxJob& job);

}  // namespace ddfast::cpu
