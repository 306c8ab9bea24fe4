// The 8-bit maps of the optimizer step in shared memory: values by code, and codes by value.
#pragma once

#include "formats.cuh"
#include "ptx.cuh"
#include "shared.cuh"

namespace nf4::cuda {

constexpr int kTableThreads = 256;  // of a thread block that fills the tables

// The code of a value in [-1, 1], exactly, by two look-ups and one comparison. Values fall into
// buckets by the upper bits of their magnitude, fine enough that none holds two thresholds; a table
// has the number of thresholds below each bucket. A binary search takes three times as many
// instructions.
template <int kMap>
struct Ranker {
  static constexpr bool kSigned = kMap == 0;
  static constexpr int kShift = kSigned ? 17 : 16;
  // Powers of two below the smallest positive threshold: whatever is smaller counts as this.
  static constexpr uint32_t kLowest = kSigned ? 0x34800000u : 0x34000000u;
  static constexpr int kFirst = kLowest >> kShift;
  static constexpr int kBuckets = (0x3f800000u >> kShift) - kFirst + 1;  // the last holds 1.0
  static constexpr int kStride = (kBuckets + 15) / 16 * 16;  // from positive to negative values
  static constexpr int kBytes = kSigned ? 2 * kStride : kStride;
  const uint8_t* ranks;
  const float* thresholds;  // [256], the last one infinity

  static __device__ __forceinline__ int bucket(float v) {
    const int index = static_cast<int>(__float_as_uint(fmaxf(fabsf(v), bits(kLowest))) >> kShift);
    return index - kFirst + (kSigned && v < 0.0f ? kStride : 0);
  }

  // By kTableThreads threads: one for each rank.
  static __device__ void fill(uint8_t* ranks, float* thresholds, int rank) {
    const float own = threshold(rank);
    thresholds[rank] = own;
    // Buckets in the order of their values; negative ones come first and downwards.
    constexpr int kNegative = kSigned ? kBuckets : 0;
    const auto position = [](float v) {
      const int index = bucket(v);
      return index < kStride ? kNegative + index : kBuckets - 1 - (index - kStride);
    };
    const int begin = rank == 0 ? 0 : position(threshold(rank - 1)) + 1;
    const int end = rank == 255 ? kNegative + kBuckets : position(own) + 1;
    for (int i = begin; i < end; ++i) {
      ranks[i >= kNegative ? i - kNegative : kStride + kBuckets - 1 - i] =
          static_cast<uint8_t>(rank);
    }
  }

  __device__ __forceinline__ uint32_t operator()(float v) const {
    const uint32_t rank = ranks[bucket(v)];
    // One more if v is above the threshold: the sign of the difference is never lost.
    return rank + (__float_as_uint(thresholds[rank] - v) >> 31);
  }

 private:
  // The lowest value of a rank's next; the unsigned map has code 0 for zero alone.
  static __device__ float threshold(int rank) {
    if (rank == 255) return INFINITY;
    return rank == 0 && !kSigned ? 0.0f : kThresholds8[kMap][rank];
  }
  static __device__ __forceinline__ float bits(uint32_t value) { return __uint_as_float(value); }
};

struct Hyper {
  float beta1, gain1, beta2, gain2, inverse_c2, eps, decay, step_size;
};
constexpr int kScalars = sizeof(Hyper) / sizeof(float);

// What a thread block keeps in shared memory.
struct Tables {
  const Hyper* hyper;
  const float* values1;
  const float* values2;
  Ranker<0> rank1;
  Ranker<1> rank2;
};
constexpr size_t kSharedBytes =
    sizeof(Hyper) + 4 * 256 * sizeof(float) + Ranker<0>::kBytes + Ranker<1>::kBytes;

// Filled by all threads, without a barrier behind.
__device__ __forceinline__ Tables make_tables(const float* hyper) {
  Carve carve;
  float* scalars = carve.take<float>(kScalars);
  float* values1 = carve.take<float>(256);
  float* values2 = carve.take<float>(256);
  float* thresholds1 = carve.take<float>(256);
  float* thresholds2 = carve.take<float>(256);
  uint8_t* ranks1 = carve.take<uint8_t>(Ranker<0>::kBytes);
  uint8_t* ranks2 = carve.take<uint8_t>(Ranker<1>::kBytes);
  const int i = threadIdx.x;
  if (i < kScalars) scalars[i] = hyper[i];
  values1[i] = kCodes8[0][i];
  values2[i] = kCodes8[1][i];
  Ranker<0>::fill(ranks1, thresholds1, i);
  Ranker<1>::fill(ranks2, thresholds2, i);
  return {reinterpret_cast<const Hyper*>(scalars),
          values1,
          values2,
          {ranks1, thresholds1},
          {ranks2, thresholds2}};
}

}  // namespace nf4::cuda
