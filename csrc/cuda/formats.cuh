// Code tables on the device, scales, and the search for a code.
#pragma once

#include <nf4/codes.h>

#include "api.h"
#include "ptx.cuh"

namespace nf4::cuda {

static __constant__ float kCodes4[2][16] = {NF4_NF4_CODES, NF4_FP4_CODES};
static __constant__ float kCodes8[2][256] = {NF4_DYNAMIC8_CODES, NF4_DYNAMIC8_UNSIGNED_CODES};
static __constant__ float kThresholds4[2][15] = {NF4_NF4_THRESHOLDS, NF4_FP4_THRESHOLDS};
static __constant__ float kThresholds8[2][255] = {NF4_DYNAMIC8_THRESHOLDS,
                                                  NF4_DYNAMIC8_UNSIGNED_THRESHOLDS};
static __constant__ uint8_t kFp4Order[16] = NF4_FP4_ORDER;

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

  __device__ __forceinline__ float operator()(int64_t block) const {
    if (nested_absmax == nullptr) return static_cast<const float*>(absmax)[block];
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

// The code of a scaled value: the number of thresholds below it, in code order.
template <int kFormat>
struct Encoder;

// NF4: 64 buckets of width 1/16 over [-2, 2); neighbouring thresholds lie at least 0.08 apart, so
// a bucket holds at most one, and one comparison decides. Inputs beyond [-1, 1] and NaN stay
// inside the table.
template <>
struct Encoder<NF4_FORMAT_NF4> {
  static constexpr int kSharedWords = 128;
  const float* table;

  static __device__ __forceinline__ int bucket_offset(float v) {
    // 1.5 * 2^23 moves v * 128 + 256 into the low mantissa bits; the low three are below a bucket.
    return __float_as_uint(fmaf(v, 128.0f, 12582912.0f + 256.0f)) & 0x1f8;
  }
  static __device__ void fill(float* shared, int thread, int threads) {
    for (int bucket = thread; bucket < 64; bucket += threads) {
      int below = 0;
      float threshold = INFINITY;
      for (int i = 0; i < 15; ++i) {
        const int at = bucket_offset(kThresholds4[0][i]) / 8;
        below += at < bucket;
        if (at == bucket) threshold = kThresholds4[0][i];
      }
      shared[2 * bucket] = threshold;
      shared[2 * bucket + 1] = __uint_as_float(static_cast<uint32_t>(below));
    }
  }
  __device__ __forceinline__ uint32_t operator()(float v) const {
    const float2 entry = *reinterpret_cast<const float2*>(
        reinterpret_cast<const unsigned char*>(table) + bucket_offset(v));
    return __float_as_uint(entry.y) + (v > entry.x ? 1u : 0u);
  }
};

template <>
struct Encoder<NF4_FORMAT_FP4> {
  static constexpr int kSharedWords = 16;
  const float* table;

  static __device__ void fill(float* shared, int thread, int threads) {
    for (int i = thread; i < 15; i += threads) shared[i] = kThresholds4[1][i];
  }
  __device__ __forceinline__ uint32_t operator()(float v) const {
    int rank = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) rank += v > table[i];
    return kFp4Order[rank];
  }
};

// The 8-bit maps are stored in value order: a binary search over 255 thresholds.
template <int kMap>
struct DynamicEncoder {
  static constexpr int kSharedWords = 256;
  const float* table;

  static __device__ void fill(float* shared, int thread, int threads) {
    for (int i = thread; i < 255; i += threads) shared[i] = kThresholds8[kMap][i];
  }
  __device__ __forceinline__ uint32_t operator()(float v) const {
    uint32_t rank = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) rank += v > table[rank + step - 1] ? step : 0;
    return rank;
  }
};
template <>
struct Encoder<NF4_FORMAT_DYNAMIC8> : DynamicEncoder<0> {};
template <>
struct Encoder<NF4_FORMAT_DYNAMIC8_UNSIGNED> : DynamicEncoder<1> {};

}  // namespace nf4::cuda
