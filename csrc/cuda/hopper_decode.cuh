// What hopper_loop.cuh multiplies from registers: decoded weights, and LoRA's b as two parts.
#pragma once

#include "hopper_plan.cuh"
#include "up.cuh"

#if defined(NF4_HOPPER_CODE)

namespace nf4::cuda {

// The scales of a thread's two rows, a step of K at a time, loaded a step ahead. Rows past the last
// take its scales; nothing reads what comes of them.
template <bool kNested>
class RowScales {
 public:
  __device__ __forceinline__ RowScales(const HopperArguments& p, int64_t feature, int step) {
    const auto steps = static_cast<uint32_t>(p.k_steps);
    const int64_t last = p.n - 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = feature + half < last ? feature + half : last;
      at_[half] = static_cast<uint32_t>(row) * steps + step;
    }
    shift_ = p.log2_block - kLog2Step;
    offset_ = kNested ? p.scales.offset[0] : 0.0f;
  }

  __device__ __forceinline__ void load(const HopperArguments& p) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t block = at_[half]++ >> shift_;
      if constexpr (kNested) {
        code_[half] = static_cast<const uint8_t*>(p.scales.absmax)[block];
        scale_[half] = p.scales.nested_absmax[block / NF4_NESTED_BLOCK_SIZE];
      } else {
        scale_[half] = static_cast<const float*>(p.scales.absmax)[block];
      }
    }
  }
  __device__ __forceinline__ void decode(const float* map, float (&scale)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = kNested ? map[code_[half]] * scale_[half] + offset_ : scale_[half];
    }
  }

 private:
  static constexpr int kLog2Step = 6;
  static_assert(1 << kLog2Step == kHopperStep);

  uint32_t at_[2];  // steps of K from the start of the weight
  int shift_;
  float offset_;
  uint32_t code_[2];
  float scale_[2];
};

// The bytes of one step of a thread's two rows. Lane t of a quad needs byte t of every word.
struct StepWords {
  uint4 part[2][2];  // [row][16 bytes]

  __device__ __forceinline__ void load(const unsigned char* weights) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* row = weights + (warp * 16 + 2 * g + half) * 32;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // TMA's 32-byte swizzle: rows 4 to 7 of each 8 have their 16-byte parts exchanged.
        part[half][i] = *reinterpret_cast<const uint4*>(row + (i ^ (g / 2 % 2)) * 16);
      }
    }
  }
};

// One step of a warp's 16 rows, as the A fragments of four wgmmas. The table has a row of 128 bytes
// for each byte: 16 copies of its two codes in float32, so that the 16 lanes that are served
// together never meet in a bank.
template <typename T>
__device__ __forceinline__ void decode_step(uint32_t (&a)[4][4], const unsigned char* table,
                                            const StepWords& from, const float (&scale)[2]) {
  const uint32_t column = threadIdx.x % 16 * 8;
  const int turn = (8 * (threadIdx.x % 4) + 25) % 32;  // moves byte t to bits 7 to 14
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint4 words = from.part[half][part];
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t at = and_or(__funnelshift_r(word[i], word[i], turn), 0x7f80, column);
        const float2 pair = *reinterpret_cast<const float2*>(table + at);
        a[2 * part + i / 2][i % 2 * 2 + half] =
            pack2<T>(pair.x * scale[half], pair.y * scale[half]);
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) wgmma_pin(a[c]);
}

// b [n, r] of a thread's two rows and 32 ranks, as it lies in memory: loaded long before its use,
// and until then nothing waits for it.
class UpRows {
 public:
  __device__ __forceinline__ void load(const HopperArguments& p, int64_t feature, int first) {
    if (p.right_dtype == NF4_FLOAT32) {
      load_bits<uint32_t>(p, feature, first);
    } else {
      load_bits<uint16_t>(p, feature, first);
    }
  }

  // The A fragments of 16 ranks, as high and low parts.
  template <typename T>
  __device__ __forceinline__ void fragments(const HopperArguments& p, int c, uint32_t (&high)[4],
                                            uint32_t (&low)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = value(p.right_dtype, bits_[c][i][0]);
      const float second = value(p.right_dtype, bits_[c][i][1]);
      split2<T>(first, second, high[i], low[i]);
    }
  }

 private:
  template <typename Bits>
  __device__ __forceinline__ void load_bits(const HopperArguments& p, int64_t feature, int first) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t row = feature + i % 2;
          const int rank = first + c * 16 + threadIdx.x % 4 * 2 + i / 2 * 8 + e;
          const bool inside = row < p.n && rank < p.r;
          bits_[c][i][e] = inside ? static_cast<const Bits*>(p.right)[row * p.r + rank] : 0;
        }
      }
    }
  }
  static __device__ __forceinline__ float value(int dtype, uint32_t bits) {
    if (dtype == NF4_FLOAT32) return __uint_as_float(bits);
    float first, second;
    if (dtype == NF4_FLOAT16) {
      unpack2<__half>(bits, first, second);
    } else {
      unpack2<__nv_bfloat16>(bits, first, second);
    }
    return first;
  }

  uint32_t bits_[2][4][2];
};

}  // namespace nf4::cuda

#endif  // NF4_HOPPER_CODE
