// What lora_pass.cu holds of a step of 32 tokens in shared memory, and how it comes there.
#pragma once

#include "lora_down.cuh"

namespace nf4::cuda {

constexpr int kThreads = 256, kWarps = 8;
constexpr int kTokens = 32;    // of a step
constexpr int kColumns = 256;  // of a CTA
constexpr int kWarpColumns = kColumns / kWarps;
constexpr int kStages = 3;
constexpr int kRow = kColumns * 2 + 16;  // bytes of a token; the pad spreads rows over the banks
constexpr int kStage = kTokens * kRow;
constexpr int kReduceRow = kTokens + 8;  // floats of a rank in the sum over warps

struct PassArguments {
  const void* in;
  const void* right;  // [c, r]
  const float* left;  // [m, r]
  float* down;        // [column block][r][m]
  float* outer;       // [run][r][c]
  int64_t m, c, run;  // run: tokens of a CTA, a multiple of kTokens
  int r, right_dtype;
  unsigned groups;  // of ranks; CTAs of the same elements are neighbours and meet in L2
  Dropout dropout;  // of `in`, for the outer product
};

template <int kRankTiles>
struct PassShape {
  static constexpr int kRanks = 16 * kRankTiles;
  static constexpr int kLeftRow = kRanks * 2 + 16;                 // bytes of a token of `left`
  static constexpr int kLeftPart = kTokens * kLeftRow;             // high or low parts of a step
  static constexpr int kLeft = 2 * 2 * kLeftPart;                  // of two steps
  static constexpr int kReduce = kWarps * 16 * kReduceRow;         // floats
  static constexpr int kLeftValues = kTokens * kRanks / kThreads;  // of a thread and step
  static constexpr int kShared = kStages * kStage + kLeft + kReduce * 4;
};

// The copies of one step: a thread always has the same 16 bytes of columns, and every 8th token.
template <typename T>
class PassLoader {
 public:
  __device__ __forceinline__ PassLoader(const PassArguments& p, int64_t column_block,
                                        int64_t first_token, int64_t end) {
    const int64_t column = column_block * kColumns + threadIdx.x % kPieces * 8;
    const int64_t token = first_token + threadIdx.x / kPieces;
    left_ = column < p.c ? static_cast<int>(end - token) : 0;  // all 8 or none: c % 8 == 0
    first_ = token * p.c + column;
  }
  __device__ __forceinline__ void load(const PassArguments& p, unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async16(place(stage, i), static_cast<const T*>(p.in) + first_ + i * kRows * p.c,
                 i * kRows < left_ ? 16 : 0);
    }
    left_ -= kTokens;
    first_ += kTokens * p.c;
  }
  // Clears what dropout drops of this thread's own copies of a step that it has waited for, the
  // `behind`-th before the next to be loaded.
  __device__ __forceinline__ void drop(const PassArguments& p, int64_t seed, int behind,
                                       unsigned char* stage) const {
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      auto* at = reinterpret_cast<uint4*>(place(stage, i));
      uint4 x = *at;
      drop8(x, p.dropout, seed, first_ + (i * kRows - behind * kTokens) * p.c);
      *at = x;
    }
  }

 private:
  static constexpr int kPieces = kColumns / 8, kRows = kThreads / kPieces;
  static constexpr int kCopies = kTokens / kRows;
  static __device__ __forceinline__ unsigned char* place(unsigned char* stage, int i) {
    return stage + (threadIdx.x / kPieces + i * kRows) * kRow + threadIdx.x % kPieces * 16;
  }
  int64_t first_;
  int left_;  // tokens to the end, from this thread's first
};

// `left` of one step: loaded a step ahead, stored as [part][token][rank].
template <typename T, int kRankTiles>
class LeftLoader {
 public:
  using S = PassShape<kRankTiles>;
  __device__ __forceinline__ void load(const PassArguments& p, int64_t token, int64_t end,
                                       int first_rank) {
#pragma unroll
    for (int i = 0; i < S::kLeftValues; ++i) {
      const int at = i * kThreads + threadIdx.x, rank = first_rank + at % S::kRanks;
      const int64_t row = token + at / S::kRanks;
      value_[i] = row < end && rank < p.r ? p.left[row * p.r + rank] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(unsigned char* to) const {
#pragma unroll
    for (int i = 0; i < S::kLeftValues; ++i) {
      const int at = i * kThreads + threadIdx.x;
      auto* high = reinterpret_cast<T*>(to + at / S::kRanks * S::kLeftRow + at % S::kRanks * 2);
      auto* low = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(high) + S::kLeftPart);
      *high = from_float<T>(value_[i]);
      *low = from_float<T>(value_[i] - to_float(*high));
    }
  }

 private:
  float value_[S::kLeftValues];
};

}  // namespace nf4::cuda
