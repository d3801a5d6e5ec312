#include <algorithm>
#include <stdexcept>
#include <string>

#include "../core/layers_dispatch.h"
#include "layers.h"

namespace ddfast::cuda {
namespace {

constexpr int kThreads = 128, kWarp = 32;
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

void check_blocks(int64_t blocks) {
    if (blocks > kMostBlocks) throw std::runtime_error("more than a launch can take: give fewer rows");
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// Groups of threads, as core/layers.h has them

// Sums x over lanes threads side by side, a power of two; all of them must come here.
__device__ __forceinline__ float sum_lanes(float x, int lanes) {
    const unsigned lane = threadIdx.x % kWarp;
    const unsigned mask = lanes == kWarp ? ~0u : ((1u << lanes) - 1) << (lane - lane % lanes);
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
    return x;
}

struct Lanes {
    int lanes;
    __device__ int rank() const { return threadIdx.x % lanes; }
    __device__ int size() const { return lanes; }
    __device__ float sum(float x) const { return sum_lanes(x, lanes); }
};

// kWarps warps: a block, or a part of one where kWarps is 1.
template <int kWarps>
struct Warps {
    float* shared;  // [kWarps]
    __device__ int rank() const { return threadIdx.x % (kWarps * kWarp); }
    __device__ int size() const { return kWarps * kWarp; }
    __device__ float sum(float x) const {
        x = sum_lanes(x, kWarp);
        if constexpr (kWarps > 1) {
            __syncthreads();  // the last sum has been read
            if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
            __syncthreads();
            x = 0;
            for (int i = 0; i < kWarps; ++i) x += shared[i];
        }
        return x;
    }
    __device__ uint32_t max(uint32_t x) const {
        for (int offset = kWarp / 2; offset > 0; offset /= 2) x = ::max(x, __shfl_xor_sync(~0u, x, offset));
        if constexpr (kWarps > 1) {
            __syncthreads();  // the last sum has been read
            if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = __uint_as_float(x);
            __syncthreads();
            for (int i = 0; i < kWarps; ++i) x = ::max(x, __float_as_uint(shared[i]));
        }
        return x;
    }
};

struct Block {
    __device__ int rank() const { return threadIdx.x; }
    __device__ int size() const { return kThreads; }
    __device__ void sync() const { __syncthreads(); }
};

// A block whose streams have kLanes lanes each.
template <int kLanes>
struct Streams : Block {
    static constexpr int kStreams = kThreads / kLanes;
    __device__ int lanes() const { return kLanes; }
    __device__ int lane() const { return threadIdx.x % kLanes; }
    __device__ float lane_sum(float x) const { return sum_lanes(x, kLanes); }
    __device__ int stream() const { return threadIdx.x / kLanes; }
    __device__ int streams() const { return kStreams; }
    __device__ int stream_step() const { return kStreams; }
};

// Kernels

template <class T, int kVector, bool kCentred, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? kThreads : kWarps* kWarp, kWarps == 1 ? 4 : 1)
    norm_kernel(NormJob job) {
    __shared__ float shared[kWarps];
    constexpr int kRows = kWarps == 1 ? kThreads / kWarp : 1;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / (kWarps * kWarp);
    if (row < job.rows) norm_row<T, kVector, kCentred>(job, row, Warps<kWarps>{shared});
}

template <class T, int kVector, bool kRotated>
__global__ void __launch_bounds__(kThreads) append_kernel(AppendJob job, uint32_t count, int lanes) {
    const uint32_t index = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes;
    if (index < count) append_vector<T, kVector, kRotated>(job, index, Lanes{lanes});
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluJob job) {
    const int64_t at = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVector;
    if (at < job.hidden) swiglu_pack<T, kVector>(job, blockIdx.x, at);
}

template <class T, class Code, int kVector, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? kThreads : kWarps* kWarp, kWarps == 1 ? 4 : 1)
    quantize_kernel(QuantizeJob job) {
    __shared__ float shared[kWarps];
    constexpr int kRows = kWarps == 1 ? kThreads / kWarp : 1;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / (kWarps * kWarp);
    if (row < job.rows) quantize_row<T, Code, kVector>(job, row, Warps<kWarps>{shared});
}

template <class T, int kVector, int kPacks, int kHeads, int kLanes>
__global__ void __launch_bounds__(kThreads, kHeads == 1 ? 8 : 3) decode_kernel(DecodeJob job) {
    constexpr int kMost = kLanes * kPacks * kVector < kMostWidth ? kLanes * kPacks * kVector : kMostWidth;
    __shared__ float streams[Streams<kLanes>::kStreams * kHeads * (kMost + kPartHead)];
    const int sharing = job.heads / job.kv_heads, chunks = (sharing + kHeads - 1) / kHeads;
    const int chunk = blockIdx.x % chunks, kv_head = blockIdx.x / chunks % job.kv_heads;
    const int64_t row = blockIdx.x / chunks / job.kv_heads;
    const int begin = kv_head * sharing, first = begin + chunk * kHeads;
    decode_split<T, kVector, kPacks, kHeads>(job, row, kv_head, first, begin + sharing, blockIdx.y, streams,
                                             Streams<kLanes>{});
}

template <class T>
__global__ void __launch_bounds__(kThreads) join_kernel(DecodeJob job, int64_t queries) {
    const int64_t query = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (query < queries) join_splits<T>(job, query, Lanes{kWarp});
}

template <int kVector>
__global__ void __launch_bounds__(kThreads, 4) band_kernel(QuantizerJob job, int lines) {
    extern __shared__ float4 band[];
    const int bands = num_bands(job, lines), image = blockIdx.x / bands;
    const int first = (blockIdx.x - image * bands) * lines;
    add_band<kVector>(job, image, first, lines, reinterpret_cast<float*>(band), Block{});
}

template <int kVector>
__global__ void __launch_bounds__(kThreads) reduce_kernel(QuantizerJob job) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (item < reduce_items<kVector>(job)) reduce_item<kVector>(job, item);
}

// Launches

// launch(warps, blocks, threads) with as many warps a row, of 1, 4 and 16, as hold it in registers.
template <int kVector, class Job, class Launch>
void with_warps(const Job& job, const Launch& launch) {
    const auto launch_with = [&](auto warps) {
        constexpr int kWarps = decltype(warps)::value;
        const int64_t rows = kWarps == 1 ? kThreads / kWarp : 1, blocks = (job.rows + rows - 1) / rows;
        check_blocks(blocks);
        launch(warps, static_cast<unsigned>(blocks), kWarps == 1 ? kThreads : kWarps * kWarp);
        check(cudaGetLastError());
    };
    const int held = kWarp * kHeldPacks * kVector;
    if (job.width <= held) return launch_with(Constant<1>{});
    if (job.width <= 4 * held) return launch_with(Constant<4>{});
    launch_with(Constant<16>{});
}

template <bool kCentred>
void norm(const NormJob& job, void* stream) {
    if (job.rows == 0 || job.width == 0) return;
    with_packs_of(job, [&](auto zero, auto packs) {
        constexpr int kVector = decltype(packs)::value;
        with_warps<kVector>(job, [&](auto warps, unsigned blocks, int threads) {
            constexpr int kWarps = decltype(warps)::value;
            norm_kernel<decltype(zero), kVector, kCentred, kWarps><<<blocks, threads, 0, stream_of(stream)>>>(job);
        });
    });
}

// The least power of two lanes, at most a warp, that hold width numbers in packs.
int lanes_for(int width, int vector) {
    int lanes = 1;
    while (lanes < kWarp && lanes * vector < width) lanes *= 2;
    return lanes;
}

template <bool kRotated>
void append(const AppendJob& job, void* stream) {
    const int64_t count = job.rows * job.n * heads_of(job);
    if (count == 0 || job.width == 0) return;
    if (count > int64_t{UINT32_MAX}) throw std::runtime_error("more than 2^32 heads: give fewer rows");
    with_packs_of<kRotated ? 2 : 1>(job, [&](auto zero, auto packs) {
        constexpr int kVector = decltype(packs)::value;
        const int lanes = lanes_for(job.width, kVector), vectors = kThreads / lanes;
        append_kernel<decltype(zero), kVector, kRotated>
            <<<(count + vectors - 1) / vectors, kThreads, 0, stream_of(stream)>>>(job, count, lanes);
        check(cudaGetLastError());
    });
}

template <class T, int kVector, int kPacks, int kHeads, int kLanes>
void launch_decode(const DecodeJob& job, void* stream) {
    const int64_t chunks = (job.heads / job.kv_heads + kHeads - 1) / kHeads, blocks = job.rows * job.kv_heads * chunks;
    check_blocks(blocks);
    const dim3 grid(static_cast<unsigned>(blocks), job.splits);
    decode_kernel<T, kVector, kPacks, kHeads, kLanes><<<grid, kThreads, 0, stream_of(stream)>>>(job);
    check(cudaGetLastError());
}

// Few lanes where packs are wide and vectors short, a warp with several packs a lane elsewhere.
template <class T, int kVector, int kHeads>
void decode(const DecodeJob& job, void* stream) {
    constexpr int kPacks = kMostWidth / (kWarp * kVector);
    const int lanes = lanes_for(job.width, kVector);
    if constexpr (kVector * sizeof(T) == 16) {
        if (lanes <= 8) return launch_decode<T, kVector, 1, kHeads, 8>(job, stream);
        if (lanes <= 16) return launch_decode<T, kVector, 1, kHeads, 16>(job, stream);
    }
    if constexpr (kPacks > 1 && kVector * sizeof(T) >= 8)
        if (job.width <= kWarp * kVector) return launch_decode<T, kVector, 1, kHeads, kWarp>(job, stream);
    launch_decode<T, kVector, kPacks, kHeads, kWarp>(job, stream);
}

// Lines of the map that a block works on: more share the work on what the convolution sees beyond them.
int band_lines(const QuantizerJob& job) { return job.batch * tiles(job.side) >= 128 ? kTile : 1; }

}  // namespace

void add_layer_norm(const NormJob& job, void* stream) { norm<true>(job, stream); }
void add_rms_norm(const NormJob& job, void* stream) { norm<false>(job, stream); }
void append_normed(const AppendJob& job, void* stream) { append<false>(job, stream); }
void append_rotated(const AppendJob& job, void* stream) { append<true>(job, stream); }

void swiglu(const SwigluJob& job, void* stream) {
    if (job.rows == 0 || job.hidden == 0) return;
    check_blocks(job.rows);
    with_packs_of(job, [&](auto zero, auto packs) {
        constexpr int kVector = decltype(packs)::value;
        const int64_t columns = (job.hidden + kThreads * kVector - 1) / (kThreads * kVector);
        if (columns > 65535) throw std::runtime_error("swiglu takes a hidden width of at most 8 million");
        const dim3 grid(static_cast<unsigned>(job.rows), static_cast<unsigned>(columns));
        swiglu_kernel<decltype(zero), kVector><<<grid, kThreads, 0, stream_of(stream)>>>(job);
        check(cudaGetLastError());
    });
}

void decode_attention(const DecodeJob& job, void* stream) {
    const int64_t queries = job.rows * job.heads;
    if (queries == 0 || job.width == 0) return;
    with_packs_of(job, [&](auto zero, auto packs) {
        using T = decltype(zero);
        constexpr int kVector = decltype(packs)::value;
        if (job.heads == job.kv_heads)
            decode<T, kVector, 1>(job, stream);
        else
            decode<T, kVector, 4>(job, stream);
        if (job.splits == 1) return;
        const int64_t blocks = (queries + kThreads / kWarp - 1) / (kThreads / kWarp);
        check_blocks(blocks);
        join_kernel<T><<<blocks, kThreads, 0, stream_of(stream)>>>(job, queries);
        check(cudaGetLastError());
    });
}

void quantize_rows(const QuantizeJob& job, void* stream) {
    if (job.rows == 0) return;
    with_packs_of(job, [&](auto zero, auto code, auto packs) {
        constexpr int kVector = decltype(packs)::value;
        with_warps<kVector>(job, [&](auto warps, unsigned blocks, int threads) {
            quantize_kernel<decltype(zero), decltype(code), kVector, decltype(warps)::value>
                <<<blocks, threads, 0, stream_of(stream)>>>(job);
        });
    });
}

void quantizer_step(const QuantizerJob& job, void* stream) {
    if (job.batch == 0 || job.side == 0 || job.channels == 0) return;
    constexpr int kAlways = 48 * 1024;  // bytes of shared memory that need no asking
    int most = 0, device = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    int lines = band_lines(job);
    if (band_numbers(job, lines) * 4 > most) lines = 1;
    const int64_t bytes = band_numbers(job, lines) * 4;
    if (bytes > most) throw std::runtime_error("three lines of the latent map do not fit into shared memory");
    check_blocks(job.batch * num_bands(job, lines));
    with_packs_of(job, [&](auto packs) {
        constexpr int kVector = decltype(packs)::value;
        if (bytes > kAlways)
            check(cudaFuncSetAttribute(band_kernel<kVector>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)));
        const int64_t blocks = job.batch * num_bands(job, lines);
        band_kernel<kVector><<<blocks, kThreads, bytes, stream_of(stream)>>>(job, lines);
        check(cudaGetLastError());
        if (!job.down || job.outputs == 0) return;
        const int64_t pieces = (reduce_items<kVector>(job) + kThreads - 1) / kThreads;
        check_blocks(pieces);
        reduce_kernel<kVector><<<pieces, kThreads, 0, stream_of(stream)>>>(job);
        check(cudaGetLastError());
    });
}

}  // namespace ddfast::cuda
