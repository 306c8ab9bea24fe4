// How the warps of lora_pass.cu split a CTA's elements, and how the operands come to them.
#pragma once

#include "lora_down.cuh"

namespace nf4::cuda {

constexpr int kThreads = 256, kWarps = 8;
constexpr int kStep = 16;         // tokens that a warp takes at a time, the depth of one mma
constexpr int kWarpColumns = 64;  // 128 bytes of a token
constexpr int kColumnSteps = kWarpColumns / 16;
// Of a warp's own ring. Two of them are on their way: 64 KiB an SM, twice what it receives in the
// 1000 clocks that memory takes to answer.
constexpr int kStages = 3;
constexpr int kRow =
    kWarpColumns * 2 + 16;  // bytes of a token; the pad spreads rows over the banks
constexpr int kStage = kStep * kRow;
// Ranks of a CTA, the 16 rows of an mma. With 32 of them the CTAs of r = 64 read `in` from L2 half
// as often, and took longer: 93 us instead of 84 on an H200.
constexpr int kRanks = 16;
constexpr int kRankTiles = kRanks / 8;     // where ranks are the 8 columns
constexpr int kCtas = 2;                   // of an SM, at once
constexpr int kLeftRow = kRanks * 2 + 16;  // bytes of a token of `left`

struct PassArguments {
  const void* in;
  const void* right;  // [c, r]
  const float* left;  // [m, r]
  float* down;        // [column block][m][r]
  float* outer;       // [run][r][c]
  int64_t m, c, run;  // run: tokens of a CTA, a multiple of kStep
  int r, right_dtype;
  unsigned groups;  // of kRanks; CTAs of the same elements are neighbours and meet in L2
  Dropout dropout;  // of `in`, for the outer product
};

// Warps split the columns. Where nothing is summed over columns, they also split the tokens, so
// that a CTA has fewer columns, a longer run, and there are fewer partial results to write.
template <bool kDown>
struct PassShape {
  static constexpr int kTokenGroups = kDown ? 1 : 4;
  static constexpr int kColumnGroups = kWarps / kTokenGroups;
  static constexpr int kColumns = kColumnGroups * kWarpColumns;    // of a CTA
  static constexpr int kSteps = 2;                                 // of a warp, between barriers
  static constexpr int kTokens = kSteps * kTokenGroups * kStep;    // of a CTA, between barriers
  static constexpr int kLeftPart = kTokens * kLeftRow;             // high or low parts
  static constexpr int kLeft = 2 * 2 * kLeftPart;                  // two buffers
  static constexpr int kLeftValues = kTokens * kRanks / kThreads;  // of a thread
  static constexpr int kSums = kTokens * kRanks;                   // floats of a warp
  static constexpr int kReduce = kDown ? 2 * kWarps * kSums : 0;   // floats, two buffers
  static constexpr int kShared = kWarps * kStages * kStage + kLeft + kReduce * 4;
  // What the token groups add up at the end, where the stages were.
  static constexpr int kOuterFloats = kWarpColumns / 8 * 4;  // of a thread
  static_assert((kWarps - kColumnGroups) * 32 * kOuterFloats * 4 <= kWarps * kStages * kStage);
  static_assert(kShared <= 99 * 1024);
};

// A warp's copies: a lane always has the same 16 bytes of columns, and every 4th token.
template <typename T, typename S>
class PassLoader {
 public:
  __device__ __forceinline__ PassLoader(const PassArguments& p, int64_t first_column,
                                        int64_t first_token, int64_t end, unsigned char* stages)
      : to_(stages + threadIdx.x % 32 / kPieces * kRow + threadIdx.x % kPieces * 16) {
    const int64_t column = first_column + threadIdx.x % kPieces * 8;
    const int64_t token = first_token + threadIdx.x % 32 / kPieces;
    left_ = column < p.c ? static_cast<int>(end - token) : 0;  // all 8 or none: c % 8 == 0
    first_ = token * p.c + column;
  }
  __device__ __forceinline__ void load(const PassArguments& p, int stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async16(to_ + stage * kStage + i * kRows * kRow,
                 static_cast<const T*>(p.in) + first_ + i * kRows * p.c,
                 i * kRows < left_ ? 16 : 0);
    }
    left_ -= kAhead;
    first_ += kAhead * p.c;
  }
  // Clears what dropout drops of this lane's own copies of a step that it has waited for, the
  // `behind`-th before the next to be loaded.
  __device__ __forceinline__ void drop(const PassArguments& p, int64_t seed, int behind,
                                       int stage) const {
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      auto* at = reinterpret_cast<uint4*>(to_ + stage * kStage + i * kRows * kRow);
      uint4 x = *at;
      drop8(x, p.dropout, seed, first_ + (i * kRows - behind * kAhead) * p.c);
      *at = x;
    }
  }

 private:
  static constexpr int kPieces = kWarpColumns / 8, kRows = 32 / kPieces;
  static constexpr int kCopies = kStep / kRows;
  static constexpr int kAhead = kStep * S::kTokenGroups;  // to the warp's next step
  unsigned char* to_;
  int64_t first_;
  int left_;  // tokens to the end, from this lane's first
};

// `left` between two barriers: loaded one barrier ahead, stored as [part][token][rank].
template <typename T, typename S>
class LeftLoader {
 public:
  __device__ __forceinline__ void load(const PassArguments& p, int64_t token, int64_t end,
                                       int first_rank) {
#pragma unroll
    for (int i = 0; i < S::kLeftValues; ++i) {
      const int at = i * kThreads + threadIdx.x, rank = first_rank + at % kRanks;
      const int64_t row = token + at / kRanks;
      value_[i] = row < end && rank < p.r ? p.left[row * p.r + rank] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(unsigned char* to) const {
#pragma unroll
    for (int i = 0; i < S::kLeftValues; ++i) {
      const int at = i * kThreads + threadIdx.x;
      auto* high = reinterpret_cast<T*>(to + at / kRanks * kLeftRow + at % kRanks * 2);
      auto* low = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(high) + S::kLeftPart);
      *high = from_float<T>(value_[i]);
      *low = from_float<T>(value_[i] - to_float(*high));
    }
  }

 private:
  float value_[S::kLeftValues];
};

// `right` of this warp's columns as B fragments: [column step][rank tile of 8][part].
template <typename T>
struct Right {
  uint32_t b[kColumnSteps][kRankTiles][2][2];

  template <typename R>
  __device__ __forceinline__ void load(const PassArguments& p, int64_t first_column,
                                       int first_rank) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto value = [&](int64_t column, int rank) {
      return column < p.c && rank < p.r
                 ? to_float(static_cast<const R*>(p.right)[column * p.r + rank])
                 : 0.0f;
    };
#pragma unroll
    for (int ks = 0; ks < kColumnSteps; ++ks) {
      float v[kRankTiles][2][2];  // of one column step, all loaded before the first is used
#pragma unroll
      for (int rank = 0; rank < kRankTiles; ++rank) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t column = first_column + ks * 16 + i * 8 + 2 * t;
          v[rank][i][0] = value(column, first_rank + rank * 8 + g);
          v[rank][i][1] = value(column + 1, first_rank + rank * 8 + g);
        }
      }
#pragma unroll
      for (int rank = 0; rank < kRankTiles; ++rank) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          split2<T>(v[rank][i][0], v[rank][i][1], b[ks][rank][0][i], b[ks][rank][1][i]);
        }
      }
    }
  }
};

}  // namespace nf4::cuda
