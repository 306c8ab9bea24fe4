// Code tables on the device, scales, and the search for a code.
#pragma once

#include <nf4/codes.h>

#include "api.h"
#include "ptx.cuh"

namespace nf4::cuda {

static __constant__ float kCodes4[2][16] = {NF4_NF4_CODES, NF4_FP4_CODES};
static __constant__ float kCodes8[2][256] = {NF4_DYNAMIC8_CODES, NF4_DYNAMIC8_UNSIGNED_CODES};
static __constant__ float kThresholds8[2][255] = {NF4_DYNAMIC8_THRESHOLDS,
                                                  NF4_DYNAMIC8_UNSIGNED_THRESHOLDS};
// For tables of which each lane reads another entry: constant memory would serve them one by one.
static __device__ const float kLaneCodes4[2][16] = {NF4_NF4_CODES, NF4_FP4_CODES};
static __device__ const float kLaneCodes8[256] = NF4_DYNAMIC8_CODES;
static __device__ const float kThresholds4[2][15] = {NF4_NF4_THRESHOLDS, NF4_FP4_THRESHOLDS};
static __device__ const uint8_t kFp4Order[16] = NF4_FP4_ORDER;

__host__ __device__ constexpr bool is_4bit(int format) { return format <= NF4_FORMAT_FP4; }

inline bool valid_layout(int block_size, int format) {
  return format >= 0 && format <= NF4_FORMAT_DYNAMIC8_UNSIGNED && block_size >= 32 &&
         block_size <= 4096 && (block_size & (block_size - 1)) == 0;
}

inline int log2_of(int power) {
  int shift = 0;
  while ((1 << shift) < power) ++shift;
  return shift;
}

// The float scale of a block. Nested: two roundings, as formats.py fixes (built without fma).
struct Scales {
  const void* absmax;
  const float* nested_absmax;
  const float* offset;

  __device__ __forceinline__ float plain(int64_t block) const {
    return static_cast<const float*>(absmax)[block];
  }
  // By a warp whose lanes ask for different blocks.
  __device__ __forceinline__ float nested(int64_t block) const {
    const uint8_t code = static_cast<const uint8_t*>(absmax)[block];
    return kLaneCodes8[code] * nested_absmax[block / NF4_NESTED_BLOCK_SIZE] + offset[0];
  }
  __device__ __forceinline__ float operator()(int64_t block) const {
    if (nested_absmax == nullptr) return plain(block);
    const uint8_t code = static_cast<const uint8_t*>(absmax)[block];
    return kCodes8[0][code] * nested_absmax[block / NF4_NESTED_BLOCK_SIZE] + offset[0];
  }
};

inline Scales scales_of(const nf4_weight& w) { return {w.absmax, w.nested_absmax, w.offset}; }

// Element `index` of a weight, times its scale; for tails and the general kernels.
__device__ __forceinline__ float decode_element(const uint8_t* packed, const Scales& scales,
                                                int64_t index, int log2_block, int format) {
  float code;
  if (is_4bit(format)) {
    const uint8_t byte = packed[index / 2];
    code = kCodes4[format][index % 2 == 0 ? byte >> 4 : byte & 15];
  } else {
    code = kCodes8[format - NF4_FORMAT_DYNAMIC8][packed[index]];
  }
  return code * scales(index >> log2_block);
}

// Magnitudes are compared as bits, where NaN is above infinity: it shows in absmax.
__device__ __forceinline__ uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

__device__ __forceinline__ float at_least_floor(float absmax) {
  return absmax <= NF4_ABSMAX_FLOOR ? NF4_ABSMAX_FLOOR : absmax;  // NaN stays
}

// The code of a scaled value, plus kBias: the number of thresholds below it, in code order. All
// lanes of a warp encode together; those of the 4-bit formats hold the table and look up by
// shuffle, which neither conflicts in banks nor needs to be filled.
template <int kFormat>
class Encoder;

// NF4: 7 + v * (11.75 - 4 |v|) is within 0.47 of c at threshold c, so its rounded value r is the
// code or one below, and whether v exceeds threshold r decides which.
template <>
class Encoder<NF4_FORMAT_NF4> {
 public:
  static constexpr int kSharedWords = 0;
  static constexpr uint32_t kBias = 0x4b400000;  // 1.5 * 2^23 as float

  __device__ __forceinline__ explicit Encoder(float*) {
    const int lane = threadIdx.x % 32;
    // Lanes 15 and 31 answer for r = 15 and r = -1.
    threshold_ = lane < 15 ? kThresholds4[0][lane] : lane == 15 ? INFINITY : -INFINITY;
  }
  __device__ __forceinline__ uint32_t operator()(float v) const {
    // 1.5 * 2^23 rounds the sum to an integer in the low bits, of which a shuffle reads five.
    const uint32_t r =
        __float_as_uint(fmaf(v, fmaf(fabsf(v), -4.0f, 11.75f), __uint_as_float(kBias) + 7.0f));
    // The sign of the difference is the comparison, without a predicate.
    return r + (__float_as_uint(__shfl_sync(0xffffffffu, threshold_, r) - v) >> 31);
  }

 private:
  float threshold_;
};

template <>
class Encoder<NF4_FORMAT_FP4> {
 public:
  static constexpr int kSharedWords = 0;
  static constexpr uint32_t kBias = 0;

  __device__ __forceinline__ explicit Encoder(float*) {
    const int lane = threadIdx.x % 32;
    threshold_ = kThresholds4[1][lane < 15 ? lane : 0];
    code_ = kFp4Order[lane % 16];
  }
  __device__ __forceinline__ uint32_t operator()(float v) const {
    uint32_t rank = 0;
#pragma unroll
    for (int bit = 3; bit >= 0; --bit) {
      const float threshold = __shfl_sync(0xffffffffu, threshold_, rank + (1 << bit) - 1);
      rank |= __float_as_uint(threshold - v) >> 31 << bit;  // the sign is the comparison
    }
    return __shfl_sync(0xffffffffu, code_, rank);
  }

 private:
  float threshold_;
  uint32_t code_;
};

// The 8-bit maps are stored in value order: a binary search over 255 thresholds in shared
// memory. Constructed by all threads of a block.
template <int kMap>
class DynamicEncoder {
 public:
  static constexpr int kSharedWords = 256;
  static constexpr uint32_t kBias = 0;

  __device__ __forceinline__ explicit DynamicEncoder(float* shared) : table_(shared) {
    for (int i = threadIdx.x; i < 255; i += blockDim.x) shared[i] = kThresholds8[kMap][i];
    __syncthreads();
  }
  __device__ __forceinline__ uint32_t operator()(float v) const {
    uint32_t rank = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) rank += v > table_[rank + step - 1] ? step : 0;
    return rank;
  }

 private:
  const float* table_;
};
template <>
class Encoder<NF4_FORMAT_DYNAMIC8> : public DynamicEncoder<0> {
  using DynamicEncoder<0>::DynamicEncoder;
};
template <>
class Encoder<NF4_FORMAT_DYNAMIC8_UNSIGNED> : public DynamicEncoder<1> {
  using DynamicEncoder<1>::DynamicEncoder;
};

}  // namespace nf4::cuda
