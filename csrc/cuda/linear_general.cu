// Matmuls with a quantized weight for every dtype, shape, block size and format: float32 FMA.
//
// The path of float32 inputs, of k that no tensor-core tile fits, and of 8-bit weights. Each weight
// is decoded by its flat index, so blocks may cross rows.
#include "launch.cuh"
#include "matmul.cuh"
#include "shared.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // tokens and columns of a block; 4 x 4 outputs a thread
constexpr int kStep = 16;  // reduced elements staged at a time
constexpr int kPad = 4;
constexpr int kGroup = 4;  // steps summed on their own before they join the total

__device__ __forceinline__ float load_any(const void* p, int dtype, int64_t i) {
  if (dtype == NF4_FLOAT32) return static_cast<const float*>(p)[i];
  if (dtype == NF4_FLOAT16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    general_kernel(const T* __restrict__ in, const uint8_t* __restrict__ packed, Scales scales,
                   const T* __restrict__ bias, T* __restrict__ out, int64_t m, int64_t n, int64_t k,
                   int log2_block, int format, Up up) {
  Carve carve;
  float* in_tile = carve.take<float>(kStep * (kTile + kPad));
  float* weight_tile = carve.take<float>(kStep * (kTile + kPad));
  const int64_t columns = kBackward ? k : n;
  const int64_t reduced = kBackward ? n : k;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kTile;
  const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;

  float total[4][4] = {}, part[4][4] = {};
  int steps = 0;
  for (int64_t start = 0; start < reduced; start += kStep) {
    for (int i = threadIdx.x; i < kTile * kStep; i += kThreads) {
      const int64_t token = first_token + i / kStep, at = start + i % kStep;
      in_tile[i % kStep * (kTile + kPad) + i / kStep] =
          token < m && at < reduced ? to_float(in[token * reduced + at]) : 0.0f;
      // Neighbouring threads read neighbouring weights in either direction.
      const int column_in = kBackward ? i % kTile : i / kStep;
      const int reduced_in = kBackward ? i / kTile : i % kStep;
      const int64_t c = first_column + column_in, r = start + reduced_in;
      const int64_t index = kBackward ? r * k + c : c * k + r;
      weight_tile[reduced_in * (kTile + kPad) + column_in] =
          c < columns && r < reduced ? decode_element(packed, scales, index, log2_block, format)
                                     : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kStep; ++r) {
      const float4 a = *reinterpret_cast<const float4*>(in_tile + r * (kTile + kPad) + ty);
      const float4 b = *reinterpret_cast<const float4*>(weight_tile + r * (kTile + kPad) + tx);
      const float x[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = fmaf(x[i], w[j], part[i][j]);
      }
    }
    if (++steps == kGroup || start + kStep >= reduced) {
      steps = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total[i][j] += part[i][j];
          part[i][j] = 0.0f;
        }
      }
    }
    __syncthreads();
  }

  const int64_t seed = kBackward && up.dropout.seed != nullptr ? *up.dropout.seed : 0;
  for (int i = 0; i < 4; ++i) {
    const int64_t token = first_token + ty + i;
    if (token >= m) return;
    float mask[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if (kBackward && up.left != nullptr && up.dropout.seed != nullptr) {
      dropout4(up.dropout, seed, token * k + first_column + tx, mask);
    }
    for (int j = 0; j < 4; ++j) {
      const int64_t column = first_column + tx + j;
      if (column >= columns) break;
      float v = total[i][j];
      if (up.left != nullptr) {
        float term = 0.0f;
        for (int r = 0; r < up.r; ++r) {
          const int64_t at = kBackward ? r * k + column : column * up.r + r;
          term = fmaf(up.left[token * up.r + r], load_any(up.right, up.right_dtype, at), term);
        }
        v = fmaf(up.scaling * mask[j], term, v);
      }
      if (bias != nullptr) v += to_float(bias[column]);
      out[token * columns + column] = from_float<T>(v);
    }
  }
}

template <bool kBackward>
int general(const Matmul& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const nf4_weight& w = p.weight;
    const int64_t columns = kBackward ? w.k : w.n;
    const dim3 grid(static_cast<unsigned>((columns + kTile - 1) / kTile),
                    static_cast<unsigned>((p.m + kTile - 1) / kTile));
    constexpr size_t kShared = 2 * kStep * (kTile + kPad) * sizeof(float);
    return launch(general_kernel<T, kBackward>, grid, dim3(kThreads), kShared, stream,
                  static_cast<const T*>(p.in), w.packed, scales_of(w),
                  static_cast<const T*>(p.bias), static_cast<T*>(p.out), p.m, w.n, w.k,
                  log2_of(w.block_size), w.format, p.up);
  });
}

}  // namespace

int general_forward(const Matmul& p, cudaStream_t stream) { return general<false>(p, stream); }
int general_backward(const Matmul& p, cudaStream_t stream) { return general<true>(p, stream); }

}  // namespace nf4::cuda
