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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kManyThreads = true;  // an SM has room for six blocks of 256
#else
constexpr bool kManyThreads = false;
#endif
constexpr int kPerLane = 8;                         // neighbours that one lane takes
constexpr int kGroups = 4;                          // loads of 32 * 8 that a warp has in flight
constexpr int kWarpTile = 32 * kPerLane * kGroups;  // elements
constexpr int kTile = kWarpTile * (kThreads / 32);

template <typename T>
struct alignas(16) Eight {
  uint32_t words[2 * sizeof(T)];
};

template <typename T>
__device__ __forceinline__ void unpack8(const Eight<T>& raw, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    if constexpr (sizeof(T) == 4) {
      v[i] = __uint_as_float(raw.words[i]), v[i + 1] = __uint_as_float(raw.words[i + 1]);
    } else {
      unpack2<T>(raw.words[i / 2], v[i], v[i + 1]);
    }
  }
}

// Elements [first, first + 8) of x, zero past the end. A zero never raises an absmax.
template <typename T>
__device__ __forceinline__ Eight<T> load_padded(const T* x, int64_t first, int64_t numel,
                                                bool aligned) {
#if !defined(NF4_PLANT_OUT_OF_BOUNDS)
  if (aligned && first + 8 <= numel) {
#else
  if (aligned && first < numel) {
#endif
    return *reinterpret_cast<const Eight<T>*>(x + first);
  }
  Eight<T> raw = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i >= numel) continue;
    if constexpr (sizeof(T) == 4) {
      raw.words[i] = __float_as_uint(x[first + i]);
    } else {
      raw.words[i / 2] |= bits16(x[first + i]) << (i % 2 * 16);
    }
  }
  return raw;
}

// The largest magnitude, as bits of a float.
template <typename T>
__device__ __forceinline__ uint32_t largest(const Eight<T>& raw) {
  if constexpr (sizeof(T) == 4) {
    uint32_t m = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) m = larger(m, raw.words[i] & 0x7fffffffu);
    return m;
  } else {
    const uint32_t pair = larger_magnitudes<T>(larger_magnitudes<T>(raw.words[0], raw.words[1]),
                                               larger_magnitudes<T>(raw.words[2], raw.words[3]));
    float first, second;
    unpack2<T>(pair, first, second);
    return larger(magnitude(first), magnitude(second));
  }
}

// Encodes eight elements of one block and stores the bytes of the first `count`. `divide`: the
// short last block of a 4-bit format, whose `scale` is the divisor. Called by whole warps.
template <typename T, int kFormat>
__device__ __forceinline__ void store_codes(const Encoder<kFormat>& encode, const Eight<T>& raw,
                                            float scale, bool divide, int64_t count, uint8_t* to) {
  float v[8];
  unpack8(raw, v);
  uint32_t codes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = encode(divide ? v[i] / scale : v[i] * scale);
  if constexpr (is_4bit(kFormat)) {
    // Padding elements are zero, so an odd count pads with the code of zero.
    uint32_t word = 0;
#pragma unroll
    for (int i = 6; i >= 0; i -= 2) word = (((word << 4) + codes[i]) << 4) + codes[i + 1];
    word -= Encoder<kFormat>::kBias * 0x11111111u;
    if (count >= 8) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      for (int i = 0; i < 4 && 2 * i < count; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
    }
  } else {
    const uint2 words = make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24,
                                   codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24);
    if (count >= 8) {
      *reinterpret_cast<uint2*>(to) = words;
    } else {
      for (int i = 0; i < 8 && i < count; ++i) {
        to[i] = static_cast<uint8_t>((i < 4 ? words.x : words.y) >> (8 * (i % 4)));
      }
    }
  }
}

// Of four values a lane, the maximum of one over the kLanes lanes of its block. Lane bits 0 and 1
// say which: halving the values at each step takes 4 shuffles rather than 12, and leaves a lane
// one division rather than four.
template <int kLanes>
__device__ __forceinline__ uint32_t reduce_one_of_four(const uint32_t (&m)[4], int lane) {
  const bool high = (lane & 1) != 0, odd = (lane & 2) != 0;
  const uint32_t a =
      larger(high ? m[2] : m[0], __shfl_xor_sync(0xffffffffu, high ? m[0] : m[2], 1));
  const uint32_t b =
      larger(high ? m[3] : m[1], __shfl_xor_sync(0xffffffffu, high ? m[1] : m[3], 1));
  uint32_t one = larger(odd ? b : a, __shfl_xor_sync(0xffffffffu, odd ? a : b, 2));
#pragma unroll
  for (int lanes = 4; lanes < kLanes; lanes *= 2) {
    one = larger(one, __shfl_xor_sync(0xffffffffu, one, lanes));
  }
  return one;
}

// Blocks for which the compiler must leave room; 0: as it thinks best. It gives FP4 of float32 as
// few registers as the others and spills some for sm_120, unless it is told of 80. With 40 for NF4
// of 16 bits an H200 takes 37.3 us for 14336 x 4096 bf16, with the 32 that it thinks best 38.0.
template <typename T, int kFormat>
constexpr int kLeastBlocks = sizeof(T) == 4 ? (kFormat == NF4_FORMAT_FP4 ? 3 : 0)
                             : kFormat == NF4_FORMAT_NF4 && kManyThreads ? 6
                                                                         : 0;

// One block takes block_size / 8 lanes (at most a warp).
template <typename T, int kFormat, int kLanes>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<T, kFormat>)
    quantize_kernel(const T* __restrict__ x, uint8_t* __restrict__ packed,
                    float* __restrict__ absmax, int64_t numel, bool aligned) {
  Carve carve;
  const Encoder<kFormat> encode(carve.take<float>(Encoder<kFormat>::kSharedWords));
  constexpr int kBlockSize = kLanes * kPerLane;
  constexpr int kCodesPerByte = is_4bit(kFormat) ? 2 : 1;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile;
  const int lane = threadIdx.x % 32;
  const int64_t first = tile + threadIdx.x / 32 * kWarpTile + lane * kPerLane;

  // Asked of the whole CTA: the compiler then knows that warps shuffle undivided.
  if (aligned && tile + kTile <= numel) {
    Eight<T> raw[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      raw[i] = *reinterpret_cast<const Eight<T>*>(x + first + i * 256);
    }
    uint32_t maxima[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) maxima[i] = largest(raw[i]);
    const float m = __uint_as_float(reduce_one_of_four<kLanes>(maxima, lane));
    const float own_scale = 1.0f / at_least_floor(m);
    const int group = (lane & 1) * 2 + (lane >> 1 & 1);
    uint8_t* to = packed + first / kCodesPerByte;
    if (lane % kLanes < 4) absmax[(first + group * 256) / kBlockSize] = m;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float scale = __shfl_sync(0xffffffffu, own_scale, (lane & ~3) + i / 2 + i % 2 * 2);
      store_codes<T, kFormat>(encode, raw[i], scale, false, 8, to + i * 256 / kCodesPerByte);
    }
    return;
  }

#pragma unroll 1
  for (int i = 0; i < kGroups; ++i) {
    const int64_t at = first + i * 256;
    const Eight<T> raw = load_padded(x, at, numel, aligned);
    uint32_t bits = largest(raw);
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      bits = larger(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
    }
    const int64_t block = at / kBlockSize;
    const bool divide = is_4bit(kFormat) && (block + 1) * kBlockSize > numel;
    const float m = __uint_as_float(bits);
    const float divisor = at_least_floor(m);
    if (lane % kLanes == 0 && at < numel) absmax[block] = divide ? divisor : m;
    store_codes<T, kFormat>(encode, raw, divide ? divisor : 1.0f / divisor, divide, numel - at,
                            packed + at / kCodesPerByte);
  }
}

// Blocks of 512 to 4096 elements: one warp each, in two passes over the block.
template <typename T, int kFormat>
__global__ void __launch_bounds__(kThreads)
    quantize_large_kernel(const T* __restrict__ x, uint8_t* __restrict__ packed,
                          float* __restrict__ absmax, int64_t numel, int block_size, bool aligned) {
  Carve carve;
  const Encoder<kFormat> encode(carve.take<float>(Encoder<kFormat>::kSharedWords));
  const int64_t block = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t start = block * block_size;
  if (start >= numel) return;
  const int column = threadIdx.x % 32 * kPerLane;
  uint32_t bits = 0;
#pragma unroll 2
  for (int i = 0; i < block_size; i += 32 * kPerLane) {
    bits = larger(bits, largest(load_padded(x, start + column + i, numel, aligned)));
  }
  bits = warp_max(bits);

  const bool divide = is_4bit(kFormat) && start + block_size > numel;
  const float m = __uint_as_float(bits);
  const float divisor = at_least_floor(m);
  if (threadIdx.x % 32 == 0) absmax[block] = divide ? divisor : m;
  const float scale = divide ? divisor : 1.0f / divisor;
  for (int i = 0; i < block_size && start + i < numel; i += 32 * kPerLane) {
    const int64_t first = start + column + i;
    store_codes<T, kFormat>(encode, load_padded(x, first, numel, aligned), scale, divide,
                            numel - first, packed + first / (is_4bit(kFormat) ? 2 : 1));
  }
}

template <typename T, int kFormat>
int quantize(const T* x, int64_t numel, int block_size, uint8_t* packed, float* absmax,
             cudaStream_t stream) {
  const bool aligned = aligned16(x);
  constexpr size_t kShared = Encoder<kFormat>::kSharedWords * sizeof(float);
  const auto small = [&](auto kernel) {
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
