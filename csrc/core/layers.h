// What a cached transformer does between its matrix products: the bodies of the kernels of cuda/layers.cu.
// ddfast/layers.py has the same in readable torch, and ddfast/layer_ops.py says what the arguments are.
//
// A body works on one row, vector or band with a group of threads: rank() of size(), sum(x) and max(x) of all, given to
// all, and sync(). On a GPU that is a few lanes, a warp or a block; on the host one thread, Alone, so that tests run on
// a CPU.
#pragma once

#include "layers_numbers.h"

namespace ddfast {

struct Alone {
    DDFAST_MEMBER int rank() const { return 0; }
    DDFAST_MEMBER int size() const { return 1; }
    DDFAST_MEMBER float sum(float x) const { return x; }
    DDFAST_MEMBER uint32_t max(uint32_t x) const { return x; }
    DDFAST_MEMBER void sync() const {}
};

// add_layer_norm and add_rms_norm

// x += gate * branch, then out = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift of each row; or, not centred,
// out = x / sqrt(mean of squares + eps) * scale.
struct NormJob {
    float* x;            // [rows, width]
    const void* branch;  // [rows, width] of out's type; null for none
    const float* gate;   // one of width every gate_stride numbers for each n rows; null for 1
    int64_t gate_stride;
    const float* scale;
    int64_t scale_stride;
    const float* shift;
    int64_t shift_stride;
    float eps;
    int64_t rows, n;
    int width;
    void* out;  // [rows, width]
    Number number;
};

constexpr int kHeldPacks = 8;  // of a row, each thread keeps as many in registers; what is left is read again

template <class T, int kVector>
DDFAST_HD void add_gated(float (&x)[kVector], const Pack<T, kVector>& branch, const float* gate, float* to) {
    float add[kVector], by[kVector];
    unpack(branch, add);
    if (gate) load(gate, by);
    DDFAST_UNROLL
    for (int i = 0; i < kVector; ++i) x[i] += gate ? by[i] * add[i] : add[i];
    store(to, x);
}

template <class T, int kVector, bool kCentred>
DDFAST_HD void write_normed(const float (&x)[kVector], float mean, float inverse, const float* scale,
                            const float* shift, T* to) {
    float by[kVector], add[kVector], out[kVector];
    load(scale, by);
    if (kCentred) load(shift, add);
    DDFAST_UNROLL
    for (int i = 0; i < kVector; ++i)
        out[i] = kCentred ? (x[i] - mean) * inverse * (1 + by[i]) + add[i] : x[i] * inverse * by[i];
    store(to, out);
}

template <class T, int kVector, bool kCentred, class Group>
DDFAST_HD void norm_row(const NormJob& job, int64_t row, const Group& group) {
    const int width = job.width, step = group.size() * kVector, first = group.rank() * kVector;
    const int rest = first + kHeldPacks * step;
    const int64_t batch = job.n == 1 ? row : row / job.n;
    float* x = job.x + row * width;
    const T* branch = job.branch ? static_cast<const T*>(job.branch) + row * width : nullptr;
    const float* gate = job.gate ? job.gate + batch * job.gate_stride : nullptr;
    T* out = static_cast<T*>(job.out) + row * width;

    float held[kHeldPacks][kVector], more[kVector], sum = 0;
    Pack<T, kVector> addend[kHeldPacks];
    DDFAST_UNROLL
    for (int i = 0; i < kHeldPacks; ++i)
        if (first + i * step < width) load(x + first + i * step, held[i]);
    if (branch) {
        DDFAST_UNROLL
        for (int i = 0; i < kHeldPacks; ++i)
            if (first + i * step < width) addend[i] = load_pack<kVector>(branch + first + i * step);
        DDFAST_UNROLL
        for (int i = 0; i < kHeldPacks; ++i) {
            const int at = first + i * step;
            if (at < width) add_gated(held[i], addend[i], gate ? gate + at : nullptr, x + at);
        }
        for (int at = rest; at < width; at += step) {
            load(x + at, more);
            add_gated(more, load_pack<kVector>(branch + at), gate ? gate + at : nullptr, x + at);
        }
    }

    float mean = 0;
    if (kCentred) {
        DDFAST_UNROLL
        for (int i = 0; i < kHeldPacks; ++i)
            if (first + i * step < width) {
                DDFAST_UNROLL
                for (int j = 0; j < kVector; ++j) sum += held[i][j];
            }
        for (int at = rest; at < width; at += step) {
            load(x + at, more);
            DDFAST_UNROLL
            for (int j = 0; j < kVector; ++j) sum += more[j];
        }
        mean = group.sum(sum) / width;
    }
    float squares = 0;
    DDFAST_UNROLL
    for (int i = 0; i < kHeldPacks; ++i)
        if (first + i * step < width) {
            DDFAST_UNROLL
            for (int j = 0; j < kVector; ++j) squares += (held[i][j] - mean) * (held[i][j] - mean);
        }
    for (int at = rest; at < width; at += step) {
        load(x + at, more);
        DDFAST_UNROLL
        for (int j = 0; j < kVector; ++j) squares += (more[j] - mean) * (more[j] - mean);
    }
    const float inverse = 1 / sqrtf(group.sum(squares) / width + job.eps);

    const float* scale = job.scale + batch * job.scale_stride;
    const float* shift = kCentred ? job.shift + batch * job.shift_stride : nullptr;
    DDFAST_UNROLL
    for (int i = 0; i < kHeldPacks; ++i) {
        const int at = first + i * step;
        const float* add = kCentred ? shift + at : nullptr;
        if (at < width) write_normed<T, kVector, kCentred>(held[i], mean, inverse, scale + at, add, out + at);
    }
    for (int at = rest; at < width; at += step) {
        load(x + at, more);
        const float* add = kCentred ? shift + at : nullptr;
        write_normed<T, kVector, kCentred>(more, mean, inverse, scale + at, add, out + at);
    }
}

// append_normed and append_rotated

// Queries, keys and values of n new positions: keys and values go to the cache from position *length on, those past its
// end nowhere; queries stay.
struct AppendJob {
    void* qkv;           // [rows, n, heads + 2 kv_heads, width]
    const float* scale;  // [heads]; null for no normalisation
    const float* rope;   // [>= positions, width / 2, 2]; null for no turning
    int64_t rows, n;
    int heads, kv_heads, width;
    void* cache;  // [2, rows, kv_heads, positions, width], its first three strides given
    int64_t part_stride, row_stride, head_stride, positions;
    const int32_t* length;
    Number number;
};

DDFAST_HD int heads_of(const AppendJob& job) { return job.heads + 2 * job.kv_heads; }

// A vector as it is; or divided by its l2-norm (no less than 1e-12, as in torch's normalize) and multiplied by scale.
template <class T, int kVector, class Group>
DDFAST_HD void copy_normed(const T* from, T* to, int width, bool normalise, float scale, const Group& group) {
    const int first = group.rank() * kVector, step = group.size() * kVector;
    float head[kVector] = {}, more[kVector], factor = 1, squares = 0;
    if (first < width) load(from + first, head);
    if (normalise) {
        DDFAST_UNROLL
        for (int i = 0; i < kVector; ++i) squares += head[i] * head[i];
        for (int at = first + step; at < width; at += step) {
            load(from + at, more);
            DDFAST_UNROLL
            for (int i = 0; i < kVector; ++i) squares += more[i] * more[i];
        }
        const float norm = sqrtf(group.sum(squares));
        factor = scale / (norm < 1e-12f ? 1e-12f : norm);
    }
    for (int at = first; at < width; at += step) {
        if (at > first) load(from + at, head);
        DDFAST_UNROLL
        for (int i = 0; i < kVector; ++i) head[i] *= factor;
        store(to + at, head);
    }
}

template <class T, int kVector, class Group>
DDFAST_HD void copy_turned(const T* from, T* to, int width, const float* rope, const Group& group) {
    static_assert(kVector % 2 == 0, "pairs are turned");
    for (int at = group.rank() * kVector; at < width; at += group.size() * kVector) {
        float x[kVector], turn[kVector], turned[kVector];
        load(from + at, x);
        load(rope + at, turn);
        DDFAST_UNROLL
        for (int i = 0; i < kVector; i += 2) {
            turned[i] = x[i] * turn[i] - x[i + 1] * turn[i + 1];
            turned[i + 1] = x[i + 1] * turn[i] + x[i] * turn[i + 1];
        }
        store(to + at, turned);
    }
}

// The vector of one head: index counts rows, positions and heads.
template <class T, int kVector, bool kRotated, class Group>
DDFAST_HD void append_vector(const AppendJob& job, uint32_t index, const Group& group) {
    const uint32_t all = heads_of(job), cell = index / all, n = static_cast<uint32_t>(job.n), row = cell / n;
    const int head = index - cell * all, width = job.width;
    const int64_t position = static_cast<int64_t>(*job.length) + (cell - row * n);
    const bool is_query = head < job.heads, is_value = head >= job.heads + job.kv_heads;
    const bool fits = position >= 0 && position < job.positions;
    T* from = static_cast<T*>(job.qkv) + static_cast<int64_t>(index) * width;
    T* to = from;
    if (!is_query) {
        to = static_cast<T*>(job.cache) + row * job.row_stride + position * width +
             (is_value ? job.part_stride + (head - job.heads - job.kv_heads) * job.head_stride
                       : (head - job.heads) * job.head_stride);
    }
    if constexpr (kRotated) {
        if (!fits) return;
        if (is_value)
            copy_normed<T, kVector>(from, to, width, false, 1, group);
        else
            copy_turned<T, kVector>(from, to, width, job.rope + position * width, group);
    } else {
        if (is_query ? !job.scale : !fits) return;
        const float scale = is_query ? job.scale[head] : 1;
        copy_normed<T, kVector>(from, to, width, job.scale && !is_value, scale, group);
    }
}

// swiglu

struct SwigluJob {
    const void* gate_up;  // [rows, 2 hidden]
    int64_t rows;
    int64_t hidden;
    void* out;  // [rows, hidden] = silu(gate) * up
    Number number;
};

template <class T, int kVector>
DDFAST_HD void swiglu_pack(const SwigluJob& job, int64_t row, int64_t at) {
    const T* from = static_cast<const T*>(job.gate_up) + 2 * row * job.hidden + at;
    float gate[kVector], up[kVector], out[kVector];
    load(from, gate);
    load(from + job.hidden, up);
    DDFAST_UNROLL
    for (int i = 0; i < kVector; ++i) out[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    store(static_cast<T*>(job.out) + row * job.hidden + at, out);
}

// quantize_rows

// scale = max |x| / limit of each row, no less than 2^-126; codes = x / scale, rounded.
struct QuantizeJob {
    const void* x;  // [rows, width]
    int64_t rows;
    int width;
    void* codes;  // [rows, width], of E4m3 or Byte
    bool e4m3;
    float* scale;  // [rows]
    Number number;
};

// The largest of some magnitudes' bits, where NaN is above infinity and so is not lost.
template <int kVector>
DDFAST_HD uint32_t largest(const float (&x)[kVector], uint32_t top) {
    DDFAST_UNROLL
    for (int i = 0; i < kVector; ++i) {
        const uint32_t bits = float_bits({x[i]}) & 0x7FFFFFFFu;
        top = bits > top ? bits : top;
    }
    return top;
}

template <class T, class Code, int kVector, class Group>
DDFAST_HD void quantize_row(const QuantizeJob& job, int64_t row, const Group& group) {
    const int width = job.width, step = group.size() * kVector, first = group.rank() * kVector;
    const int rest = first + kHeldPacks * step;
    const T* x = static_cast<const T*>(job.x) + row * width;
    Code* codes = static_cast<Code*>(job.codes) + row * width;
    Pack<T, kVector> held[kHeldPacks];
    float some[kVector];
    uint32_t top = 0;
    DDFAST_UNROLL
    for (int i = 0; i < kHeldPacks; ++i)
        if (first + i * step < width) held[i] = load_pack<kVector>(x + first + i * step);
    DDFAST_UNROLL
    for (int i = 0; i < kHeldPacks; ++i)
        if (first + i * step < width) {
            unpack(held[i], some);
            top = largest(some, top);
        }
    for (int at = rest; at < width; at += step) {
        load(x + at, some);
        top = largest(some, top);
    }

    const float most = bits_float(group.max(top)).value, least = 0x1p-126f * Code::kLimit;
    const float scale = (most < least ? least : most) / Code::kLimit, inverse = 1 / scale;
    if (group.rank() == 0) job.scale[row] = scale;
    const auto write = [&](int at) {
        DDFAST_UNROLL
        for (int j = 0; j < kVector; ++j) some[j] *= inverse;
        store(codes + at, some);
    };
    DDFAST_UNROLL
    for (int i = 0; i < kHeldPacks; ++i)
        if (first + i * step < width) {
            unpack(held[i], some);
            write(first + i * step);
        }
    for (int at = rest; at < width; at += step) {
        load(x + at, some);
        write(at);
    }
}

// quantizer_step

// h = up codebook[tokens]; f_hat += (1 - ratio) h + ratio (conv(h) + bias); out = down f_hat, of each image.
struct QuantizerJob {
    const int64_t* tokens;  // [batch, n]
    const float* codebook;  // [.., channels]
    const float* up;        // [side^2, n]; null where n = side^2
    const float* taps;      // [kernel^2, channels in, channels out]
    int kernel;
    const float* bias;
    float ratio;
    int64_t batch;
    int n, side, channels;
    float* f_hat;       // [batch, side^2, channels]
    const float* down;  // [outputs, side^2]; null for no output
    int outputs;
    float* out;  // [batch, outputs, channels]
};

constexpr int kTile = 4;  // positions that a thread works on at once, side by side

DDFAST_HD int tiles(int count) { return (count + kTile - 1) / kTile; }
DDFAST_HD int padded_side(const QuantizerJob& job) { return tiles(job.side) * kTile + job.kernel - 1; }
DDFAST_HD int num_bands(const QuantizerJob& job, int lines) { return (job.side + lines - 1) / lines; }

// Numbers that add_band keeps of h: the band's lines and those that the convolution sees above and below, with margins.
DDFAST_HD int64_t band_numbers(const QuantizerJob& job, int lines) {
    return int64_t{lines + job.kernel - 1} * padded_side(job) * job.channels;
}

struct Codes {
    const int64_t* tokens;
    const float* codebook;
    int channels;
    DDFAST_MEMBER const float* operator()(int i) const { return codebook + tokens[i] * channels; }
};

struct Rows {
    const float* first;
    int channels;
    DDFAST_MEMBER const float* operator()(int i) const { return first + int64_t{i} * channels; }
};

// sums[p] = sum over i < count of matrix[p, i] source(i), of kVector channels; where there are fewer rows than kTile,
// the last of them again.
template <int kVector, class Source>
DDFAST_HD void mix(const float* matrix, int count, int rows, const Source& source, int channel,
                   float (&sums)[kTile][kVector]) {
    const float* weights[kTile];
    DDFAST_UNROLL
    for (int p = 0; p < kTile; ++p) {
        weights[p] = matrix + int64_t{p < rows ? p : rows - 1} * count;
        DDFAST_UNROLL
        for (int j = 0; j < kVector; ++j) sums[p][j] = 0;
    }
    DDFAST_UNROLL_4
    for (int i = 0; i < count; ++i) {
        float x[kVector];
        load(source(i) + channel, x);
        DDFAST_UNROLL
        for (int p = 0; p < kTile; ++p) {
            const float w = weights[p][i];
            DDFAST_UNROLL
            for (int j = 0; j < kVector; ++j) sums[p][j] += w * x[j];
        }
    }
}

// f_hat of lines first_line .. first_line + lines - 1 of an image's map. h is memory that the group shares.
template <int kVector, class Group>
DDFAST_HD void add_band(const QuantizerJob& job, int64_t image, int first_line, int lines, float* h,
                        const Group& group) {
    const int side = job.side, channels = job.channels, kernel = job.kernel, half = kernel / 2;
    const int columns = tiles(side), quads = channels / kVector, padded = padded_side(job);
    const Codes codes{job.tokens + image * job.n, job.codebook, channels};
    for (int64_t i = group.rank(); i < band_numbers(job, lines); i += group.size()) h[i] = 0;
    group.sync();
    for (int item = group.rank(); item < (lines + kernel - 1) * columns * quads; item += group.size()) {
        const int channel = item % quads * kVector, left = item / quads % columns * kTile;
        const int line = item / quads / columns;
        const int map_line = first_line + line - half, there = side - left < kTile ? side - left : kTile;
        if (map_line < 0 || map_line >= side) continue;
        float sums[kTile][kVector];
        if (job.up) {
            mix(job.up + int64_t{map_line * side + left} * job.n, job.n, there, codes, channel, sums);
        } else {
            DDFAST_UNROLL
            for (int p = 0; p < kTile; ++p)
                if (p < there) load(codes(map_line * side + left + p) + channel, sums[p]);
        }
        DDFAST_UNROLL
        for (int p = 0; p < kTile; ++p)
            if (p < there) store(h + int64_t{line * padded + half + left + p} * channels + channel, sums[p]);
    }
    group.sync();
    for (int item = group.rank(); item < lines * columns * quads; item += group.size()) {
        const int channel = item % quads * kVector, left = item / quads % columns * kTile;
        const int line = item / quads / columns;
        if (first_line + line >= side) continue;
        float sums[kTile][kVector], bias[kVector];
        load(job.bias + channel, bias);
        DDFAST_UNROLL
        for (int p = 0; p < kTile; ++p) {
            DDFAST_UNROLL
            for (int j = 0; j < kVector; ++j) sums[p][j] = bias[j];
        }
        for (int tap = 0; tap < kernel * kernel; ++tap) {
            const int above = tap / kernel;
            const float* seen = h + int64_t{(line + above) * padded + left + tap - above * kernel} * channels;
            const float* weights = job.taps + int64_t{tap} * channels * channels + channel;
            for (int in = 0; in < channels; in += kVector) {
                float x[kTile][kVector], w[kVector][kVector];
                DDFAST_UNROLL
                for (int i = 0; i < kVector; ++i) load(weights + (in + i) * channels, w[i]);
                DDFAST_UNROLL
                for (int p = 0; p < kTile; ++p) load(seen + p * channels + in, x[p]);
                DDFAST_UNROLL
                for (int p = 0; p < kTile; ++p) {
                    DDFAST_UNROLL
                    for (int i = 0; i < kVector; ++i) {
                        DDFAST_UNROLL
                        for (int j = 0; j < kVector; ++j) sums[p][j] += x[p][i] * w[i][j];
                    }
                }
            }
        }
        float* to = job.f_hat + ((image * side + first_line + line) * side + left) * channels + channel;
        const float* here = h + int64_t{(line + half) * padded + half + left} * channels + channel;
        DDFAST_UNROLL
        for (int p = 0; p < kTile; ++p) {
            if (left + p >= side) continue;
            float f[kVector], plain[kVector];
            load(to + p * channels, f);
            load(here + p * channels, plain);
            DDFAST_UNROLL
            for (int j = 0; j < kVector; ++j) f[j] += (1 - job.ratio) * plain[j] + job.ratio * sums[p][j];
            store(to + p * channels, f);
        }
    }
}

// Pieces of out that one thread makes: kTile rows of kVector channels of an image.
template <int kVector>
DDFAST_HD int64_t reduce_items(const QuantizerJob& job) {
    return job.batch * tiles(job.outputs) * (job.channels / kVector);
}

template <int kVector>
DDFAST_HD void reduce_item(const QuantizerJob& job, int64_t item) {
    const int quads = job.channels / kVector, size = job.side * job.side;
    const int channel = static_cast<int>(item % quads) * kVector;
    const int64_t tile = item / quads, image = tile / tiles(job.outputs);
    const int first = static_cast<int>(tile - image * tiles(job.outputs)) * kTile;
    const int there = job.outputs - first < kTile ? job.outputs - first : kTile;
    float sums[kTile][kVector];
    mix(job.down + int64_t{first} * size, size, there, Rows{job.f_hat + image * size * job.channels, job.channels},
        channel, sums);
    float* to = job.out + (image * job.outputs + first) * job.channels + channel;
    DDFAST_UNROLL
    for (int p = 0; p < kTile; ++p)
        if (p < there) store(to + p * job.channels, sums[p]);
}

}  // namespace ddfast
