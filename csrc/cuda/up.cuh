// LoRA's up-projection as one more K tile on the accumulators of an output tile.
#pragma once

#include "matmul.cuh"
#include "vector.cuh"

namespace nf4::cuda {

// A float as the sum of two T: the product of two such pairs keeps what one T would round away.
template <typename T>
__device__ __forceinline__ void split2(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack2<T>(first, second);
  float a, b;
  unpack2<T>(high, a, b);
  low = pack2<T>(first - a, second - b);
}

__device__ __forceinline__ float element_of(const void* p, int dtype, int64_t i) {
  if (dtype == NF4_FLOAT32) return static_cast<const float*>(p)[i];
  if (dtype == NF4_FLOAT16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

// The `i`-th pair of ranks of up.left [m, r] * scaling, in out [m][2 padded]: of each 16 ranks,
// padded with zeros, the high 16-bit parts and then the low ones.
template <typename T>
__device__ __forceinline__ void split_left(const Up& up, uint32_t* out, int64_t i, int padded) {
  const int64_t token = i / (padded / 2);
  const auto pair = static_cast<int>(i % (padded / 2));
  const auto value = [&](int rank) {
    return rank < up.r ? up.left[token * up.r + rank] * up.scaling : 0.0f;
  };
  uint32_t* to = out + token * padded + pair / 8 * 16 + pair % 8;
  split2<T>(value(2 * pair), value(2 * pair + 1), to[0], to[8]);
}

// acc[row tile][token tile] += right left^T * scaling, over ranks in steps of 16.
// `feature(rt, half)` is the output column of fragment row g + 8 * half, `token(tt)` the token of
// fragment column g. Forward reads right[feature * r + rank], backward right[rank * columns +
// feature]; what lies outside is zero. float operands are split in two, so three mmas a step.
template <typename T, bool kBackward, int kRowTiles, int kTokenTiles, typename Feature,
          typename Token>
__device__ __forceinline__ void add_up(float (&acc)[kRowTiles][kTokenTiles][4], const Up& up,
                                       int64_t columns, int64_t m, const Feature& feature,
                                       const Token& token) {
  const int t = threadIdx.x % 4;
  const auto right = [&](int64_t column, int rank) {
    if (column >= columns || rank >= up.r) return 0.0f;
    return element_of(up.right, up.right_dtype,
                      kBackward ? rank * columns + column : column * up.r + rank);
  };
  const auto left = [&](int64_t row, int rank) {
    return row < m && rank < up.r ? up.left[row * up.r + rank] * up.scaling : 0.0f;
  };
  for (int start = 0; start < up.r; start += 16) {
    const int rank = start + 2 * t;
    uint32_t high[kRowTiles][4], low[kRowTiles][4];
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t column = feature(rt, i % 2);
        const int first = rank + i / 2 * 8;
        split2<T>(right(column, first), right(column, first + 1), high[rt][i], low[rt][i]);
      }
    }
#pragma unroll
    for (int tt = 0; tt < kTokenTiles; ++tt) {
      uint32_t x_high[2], x_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = token(tt);
        const int first = rank + i * 8;
        split2<T>(left(row, first), left(row, first + 1), x_high[i], x_low[i]);
      }
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        mma_m16n8k16<T>(acc[rt][tt], high[rt], x_high);
        mma_m16n8k16<T>(acc[rt][tt], high[rt], x_low);
        mma_m16n8k16<T>(acc[rt][tt], low[rt], x_high);
      }
    }
  }
}

}  // namespace nf4::cuda
