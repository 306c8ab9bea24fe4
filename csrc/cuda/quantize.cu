// Quantization to NF4, FP4 and the 8-bit maps: bit for bit what nf4/formats.py says. Built without
// fma contraction and with IEEE division.
#include <algorithm>

#include "formats.cuh"
#include "launch.cuh"
#include "shared.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;

// Elements [first, first + 8) of x as float, zero past the end. A zero never raises an absmax.
template <typename T>
__device__ __forceinline__ void load_padded(const T* x, int64_t first, int64_t numel, bool aligned,
                                            float (&v)[8]) {
#if !defined(NF4_PLANT_OUT_OF_BOUNDS)
  if (aligned && first + 8 <= numel) {
#else
  if (aligned && first < numel) {
#endif
    load8(x + first, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = first + i < numel ? to_float(x[first + i]) : 0.0f;
}

__device__ __forceinline__ uint32_t largest(const float (&v)[8]) {
  uint32_t m = magnitude(v[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) m = larger(m, magnitude(v[i]));
  return m;
}

// Encodes eight elements of one block and stores their bytes. `divide`: the short last block of a
// 4-bit format, whose `scale` is the divisor.
template <int kFormat>
__device__ __forceinline__ void store_codes(const Encoder<kFormat>& encode, const float (&v)[8],
                                            float scale, bool divide, int64_t first, int64_t numel,
                                            uint8_t* packed) {
  uint32_t codes[8];
  if (divide) {
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = encode(v[i] / scale);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = encode(v[i] * scale);
  }
  if constexpr (is_4bit(kFormat)) {
    // Padding elements are zero, so an odd count pads with the code of zero.
    const uint32_t word = (codes[0] << 4 | codes[1]) | (codes[2] << 4 | codes[3]) << 8 |
                          (codes[4] << 4 | codes[5]) << 16 | (codes[6] << 4 | codes[7]) << 24;
    if (first + 8 <= numel) {
      *reinterpret_cast<uint32_t*>(packed + first / 2) = word;
    } else {
      for (int i = 0; i < 4 && first + 2 * i < numel; ++i) {
        packed[first / 2 + i] = static_cast<uint8_t>(word >> (8 * i));
      }
    }
  } else {
    const uint2 words = make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24,
                                   codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24);
    if (first + 8 <= numel) {
      *reinterpret_cast<uint2*>(packed + first) = words;
    } else {
      for (int i = 0; i < 8 && first + i < numel; ++i) {
        packed[first + i] = static_cast<uint8_t>((i < 4 ? words.x : words.y) >> (8 * (i % 4)));
      }
    }
  }
}

// One block takes block_size / 8 lanes (at most a warp).
template <typename T, int kFormat, int kLanes>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ x, uint8_t* __restrict__ packed,
                    float* __restrict__ absmax, int64_t numel, bool aligned) {
  Carve carve;
  float* table = carve.take<float>(Encoder<kFormat>::kSharedWords);
  Encoder<kFormat>::fill(table, threadIdx.x, kThreads);
  __syncthreads();
  const Encoder<kFormat> encode{table};

  constexpr int kBlockSize = kLanes * kPerThread;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * (kThreads * kPerThread) + threadIdx.x * kPerThread;
  float v[8];
  load_padded(x, first, numel, aligned, v);
  uint32_t bits = largest(v);
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    bits = larger(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
  }
  if (first >= numel) return;

  const int64_t block = first / kBlockSize;
  const bool divide = is_4bit(kFormat) && (block + 1) * kBlockSize > numel;
  const float m = __uint_as_float(bits);
  const float divisor = at_least_floor(m);
  if (threadIdx.x % kLanes == 0) absmax[block] = divide ? divisor : m;
  store_codes(encode, v, divide ? divisor : 1.0f / divisor, divide, first, numel, packed);
}

// Blocks of 512 to 4096 elements: one warp each, in two passes over the block.
template <typename T, int kFormat>
__global__ void __launch_bounds__(kThreads)
    quantize_large_kernel(const T* __restrict__ x, uint8_t* __restrict__ packed,
                          float* __restrict__ absmax, int64_t numel, int block_size, bool aligned) {
  Carve carve;
  float* table = carve.take<float>(Encoder<kFormat>::kSharedWords);
  Encoder<kFormat>::fill(table, threadIdx.x, kThreads);
  __syncthreads();
  const Encoder<kFormat> encode{table};

  const int64_t block = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t start = block * block_size + threadIdx.x % 32 * kPerThread;
  float v[8];
  uint32_t bits = 0;
  for (int i = 0; i < block_size; i += 32 * kPerThread) {
    load_padded(x, start + i, numel, aligned, v);
    bits = larger(bits, largest(v));
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    bits = larger(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
  }
  if (block * block_size >= numel) return;

  const bool divide = is_4bit(kFormat) && (block + 1) * block_size > numel;
  const float m = __uint_as_float(bits);
  const float divisor = at_least_floor(m);
  if (threadIdx.x % 32 == 0) absmax[block] = divide ? divisor : m;
  const float scale = divide ? divisor : 1.0f / divisor;
  for (int i = 0; i < block_size && start + i < numel; i += 32 * kPerThread) {
    load_padded(x, start + i, numel, aligned, v);
    store_codes(encode, v, scale, divide, start + i, numel, packed);
  }
}

template <typename T, int kFormat>
int quantize(const T* x, int64_t numel, int block_size, uint8_t* packed, float* absmax,
             cudaStream_t stream) {
  const bool aligned = aligned16(x);
  constexpr size_t kShared = Encoder<kFormat>::kSharedWords * sizeof(float);
  const auto small = [&](auto kernel) {
    constexpr int64_t kTile = kThreads * kPerThread;
    const auto grid = static_cast<unsigned>((numel + kTile - 1) / kTile);
    return launch(kernel, grid, kThreads, kShared, stream, x, packed, absmax, numel, aligned);
  };
  switch (block_size) {
    case 32:
      return small(quantize_kernel<T, kFormat, 4>);
    case 64:
      return small(quantize_kernel<T, kFormat, 8>);
    case 128:
      return small(quantize_kernel<T, kFormat, 16>);
    case 256:
      return small(quantize_kernel<T, kFormat, 32>);
    default: {
      const int64_t tile = static_cast<int64_t>(block_size) * (kThreads / 32);
      const auto grid = static_cast<unsigned>((numel + tile - 1) / tile);
      return launch(quantize_large_kernel<T, kFormat>, grid, kThreads, kShared, stream, x, packed,
                    absmax, numel, block_size, aligned);
    }
  }
}

}  // namespace
}  // namespace nf4::cuda

extern "C" int nf4_cuda_quantize(const void* x, int dtype, int64_t numel, int block_size,
                                 int format, uint8_t* packed, float* absmax, cudaStream_t stream) {
  using namespace nf4::cuda;
  if (!valid_layout(block_size, format)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto* values = static_cast<const T*>(x);
    switch (format) {
      case NF4_FORMAT_NF4:
        return quantize<T, NF4_FORMAT_NF4>(values, numel, block_size, packed, absmax, stream);
      case NF4_FORMAT_FP4:
        return quantize<T, NF4_FORMAT_FP4>(values, numel, block_size, packed, absmax, stream);
      case NF4_FORMAT_DYNAMIC8:
        return quantize<T, NF4_FORMAT_DYNAMIC8>(values, numel, block_size, packed, absmax, stream);
      default:
        return quantize<T, NF4_FORMAT_DYNAMIC8_UNSIGNED>(values, numel, block_size, packed, absmax,
                                                         stream);
    }
  });
}
