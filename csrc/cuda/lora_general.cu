// The narrow matmuls of LoRA in float32 FMA, for what tensor cores do not take: float32 inputs, odd
// row lengths, unaligned views. Down-projections (s, ds) and adapter gradients (da, db).
#include <algorithm>

#include "launch.cuh"
#include "matmul.cuh"
#include "shared.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

// Eight elements from `i`, zero from `end` on.
template <typename T>
__device__ __forceinline__ void load8_padded(const T* p, int64_t i, int64_t end, bool aligned,
                                             float (&v)[8]) {
  if (aligned && i + 8 <= end) {
    load8(p + i, v);
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = i + e < end ? to_float(p[i + e]) : 0.0f;
}

__device__ __forceinline__ void scale_kept(const Dropout& d, int64_t seed, int64_t i,
                                           float (&v)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float mask[4];
    dropout4(d, seed, i + 4 * half, mask);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[4 * half + e] *= mask[e];
  }
}

constexpr int kDownTokens = 4;
constexpr int kDownRanks = 8;
constexpr int kDownWarps = 8;

// A block computes 4 tokens x 8 ranks; its warps split the reduction and lanes take 8 elements
// each, so that M = 1 still has 8 warps a rank group. Warp sums are added in warp order.
template <typename T, typename R>
__global__ void __launch_bounds__(32 * kDownWarps)
    down_kernel(const Down p, bool right_transposed, bool aligned, int64_t m) {
  Carve carve;
  float* sums = carve.take<float>(kDownWarps * kDownTokens * kDownRanks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kDownTokens;
  const T* __restrict__ in = static_cast<const T*>(p.in);
  const R* __restrict__ right = static_cast<const R*>(p.right);
  const Dropout& dropout = p.dropout;
  const int64_t c = p.c;
  const int r = p.r;
  const int first_rank = blockIdx.y * kDownRanks;
  const int64_t seed = dropout.seed != nullptr ? *dropout.seed : 0;

  float acc[kDownTokens][kDownRanks] = {};
  for (int64_t i = (warp * 32 + lane) * 8; i < c; i += kDownWarps * 32 * 8) {
    float x[kDownTokens][8];
#pragma unroll
    for (int t = 0; t < kDownTokens; ++t) {
      const int64_t token = first_token + t;
      load8_padded(in + (token < m ? token : 0) * c, i, token < m ? c : 0, aligned, x[t]);
      if (dropout.seed != nullptr) scale_kept(dropout, seed, token * c + i, x[t]);
    }
#pragma unroll
    for (int j = 0; j < kDownRanks; ++j) {
      const int rank = first_rank + j;
      float w[8];
      if (!right_transposed) {
        load8_padded(right + static_cast<int64_t>(rank < r ? rank : 0) * c, i, rank < r ? c : 0,
                     aligned, w);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          w[e] = rank < r && i + e < c ? to_float(right[(i + e) * r + rank]) : 0.0f;
        }
      }
#pragma unroll
      for (int t = 0; t < kDownTokens; ++t) {
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[t][j] = fmaf(x[t][e], w[e], acc[t][j]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kDownTokens; ++t) {
#pragma unroll
    for (int j = 0; j < kDownRanks; ++j) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        acc[t][j] += __shfl_xor_sync(0xffffffffu, acc[t][j], lanes);
      }
      if (lane == 0) sums[(warp * kDownTokens + t) * kDownRanks + j] = acc[t][j];
    }
  }
  __syncthreads();
  if (threadIdx.x < kDownTokens * kDownRanks) {
    const int64_t token = first_token + threadIdx.x / kDownRanks;
    const int rank = first_rank + threadIdx.x % kDownRanks;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kDownWarps; ++w) {
      total += sums[w * kDownTokens * kDownRanks + threadIdx.x];
    }
    if (token < m && rank < r) p.out[token * r + rank] = p.scaling * total;
  }
}

constexpr int kOuterThreads = 128;
constexpr int kOuterColumns = 4;  // a thread
constexpr int kOuterRanks = 16;   // a block
constexpr int kOuterTokens = 32;  // of `left` staged at a time

// partial[chunk][rank][column] = the sum over one chunk of tokens.
template <typename T>
__global__ void __launch_bounds__(kOuterThreads)
    outer_kernel(const T* __restrict__ in, const float* __restrict__ left,
                 float* __restrict__ partial, int64_t m, int64_t c, int r, int64_t chunk_tokens,
                 Dropout dropout, bool aligned) {
  Carve carve;
  float* staged = carve.take<float>(kOuterTokens * kOuterRanks);
  const int64_t column =
      (static_cast<int64_t>(blockIdx.x) * kOuterThreads + threadIdx.x) * kOuterColumns;
  const int64_t begin = blockIdx.y * chunk_tokens;
  const int64_t end = begin + chunk_tokens < m ? begin + chunk_tokens : m;
  const int first_rank = blockIdx.z * kOuterRanks;
  const int64_t seed = dropout.seed != nullptr ? *dropout.seed : 0;

  float acc[kOuterRanks][kOuterColumns] = {};
  for (int64_t start = begin; start < end; start += kOuterTokens) {
    __syncthreads();
    for (int i = threadIdx.x; i < kOuterTokens * kOuterRanks; i += kOuterThreads) {
      const int64_t token = start + i / kOuterRanks;
      const int rank = first_rank + i % kOuterRanks;
      staged[i] = token < end && rank < r ? left[token * r + rank] : 0.0f;
    }
    __syncthreads();
    const int here = end - start < kOuterTokens ? static_cast<int>(end - start) : kOuterTokens;
    if (column >= c) continue;
    for (int t = 0; t < here; ++t) {
      const int64_t at = (start + t) * c + column;
      float x[kOuterColumns];
      if (aligned) {
        if constexpr (sizeof(T) == 4) {
          const float4 v = *reinterpret_cast<const float4*>(in + at);
          x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        } else {
          const uint2 v = *reinterpret_cast<const uint2*>(in + at);
          unpack2<T>(v.x, x[0], x[1]);
          unpack2<T>(v.y, x[2], x[3]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kOuterColumns; ++e) x[e] = column + e < c ? to_float(in[at + e]) : 0.0f;
      }
      if (dropout.seed != nullptr) {
        float mask[4];
        dropout4(dropout, seed, at, mask);
#pragma unroll
        for (int e = 0; e < kOuterColumns; ++e) x[e] *= mask[e];
      }
#pragma unroll
      for (int j = 0; j < kOuterRanks; ++j) {
        const float l = staged[t * kOuterRanks + j];
#pragma unroll
        for (int e = 0; e < kOuterColumns; ++e) acc[j][e] = fmaf(l, x[e], acc[j][e]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kOuterRanks; ++j) {
    if (first_rank + j >= r) break;
#pragma unroll
    for (int e = 0; e < kOuterColumns; ++e) {
      if (column + e < c) {
        partial[(static_cast<int64_t>(blockIdx.y) * r + first_rank + j) * c + column + e] =
            acc[j][e];
      }
    }
  }
}

// Adds the chunks in order and rounds once.
template <typename O>
__global__ void __launch_bounds__(256)
    outer_sum_kernel(const float* __restrict__ partial, O* __restrict__ out, int64_t c, int r,
                     int chunks, float scaling, bool transposed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= c * r) return;
  float total = 0.0f;
  for (int chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * c * r + i];
  out[transposed ? i % c * r + i / c : i] = from_float<O>(scaling * total);
}

// Runs of tokens: enough blocks for two waves, runs of at least 64 tokens.
int64_t outer_chunks(const Pass& p) {
  const int64_t columns =
      (p.c + kOuterThreads * kOuterColumns - 1) / (kOuterThreads * kOuterColumns);
  const int64_t wanted = (4 * device().multiprocessors + columns - 1) / columns;
  return std::max<int64_t>(1, std::min(wanted, (p.m + 63) / 64));
}

int down(const Down& p, int in_dtype, bool right_transposed, int64_t m, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((m + kDownTokens - 1) / kDownTokens),
                  static_cast<unsigned>((p.r + kDownRanks - 1) / kDownRanks));
  constexpr size_t kShared = kDownWarps * kDownTokens * kDownRanks * sizeof(float);
  const bool aligned = p.c % 8 == 0 && aligned16(p.in) && aligned16(p.right);
  return with_dtype(in_dtype, [&](auto element) {
    using T = decltype(element);
    return with_dtype(p.right_dtype, [&](auto right) {
      using R = decltype(right);
      return launch(down_kernel<T, R>, grid, dim3(32 * kDownWarps), kShared, stream, p,
                    right_transposed, aligned, m);
    });
  });
}

int outer(const Pass& p, float* partial, cudaStream_t stream) {
  const int64_t chunks = outer_chunks(p);
  const int64_t chunk_tokens = (p.m + chunks - 1) / chunks;
  const int64_t per_block = kOuterThreads * kOuterColumns;
  const dim3 grid(static_cast<unsigned>((p.c + per_block - 1) / per_block),
                  static_cast<unsigned>(chunks),
                  static_cast<unsigned>((p.r + kOuterRanks - 1) / kOuterRanks));
  const bool aligned = p.c % 4 == 0 && aligned16(p.in);
  const int status = with_dtype(p.in_dtype, [&](auto element) {
    using T = decltype(element);
    return launch(outer_kernel<T>, grid, dim3(kOuterThreads),
                  kOuterTokens * kOuterRanks * sizeof(float), stream, static_cast<const T*>(p.in),
                  p.left, partial, p.m, p.c, p.r, chunk_tokens, p.dropout, aligned);
  });
  if (status != 0) return status;
  return with_dtype(p.outer_dtype, [&](auto element) {
    using O = decltype(element);
    const auto blocks = static_cast<unsigned>((p.c * p.r + 255) / 256);
    return launch(outer_sum_kernel<O>, dim3(blocks), dim3(256), 0, stream,
                  static_cast<const float*>(partial), static_cast<O*>(p.outer_out), p.c, p.r,
                  static_cast<int>(chunks), p.outer_scaling, p.outer_transposed);
  });
}

}  // namespace

int general_down(const Down& p, int in_dtype, int64_t m, cudaStream_t stream) {
  return down(p, in_dtype, false, m, stream);
}

size_t general_pass_workspace(const Pass& p) {
  return p.outer_out == nullptr ? 0 : outer_chunks(p) * p.c * p.r * sizeof(float);
}

int general_pass(const Pass& p, void* workspace, cudaStream_t stream) {
  int status = 0;
  if (p.down_out != nullptr) {
    const Down transposed{p.in, p.right,       p.down_out,     p.c,
                          p.r,  p.right_dtype, p.down_scaling, dropout_of(0.0, nullptr)};
    status = down(transposed, p.in_dtype, true, p.m, stream);
  }
  if (status != 0 || p.outer_out == nullptr) return status;
  return outer(p, static_cast<float*>(workspace), stream);
}

}  // namespace nf4::cuda
