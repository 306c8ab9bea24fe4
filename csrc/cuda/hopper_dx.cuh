// The tile of dx that one CTA of hopper_backward.cu computes: its shape, where its sums lie, the
// dropout mask on them, and the way to memory.
#pragma once

#include "hopper_plan.cuh"
#include "hopper_ring.cuh"
#include "schedule.cuh"
#include "tensor_map.cuh"
#include "up.cuh"

namespace nf4::cuda {

// kCluster CTAs work together on the same columns and steps of n, each on tokens of its own: W is
// read once for all of them.
struct BackwardTile : HopperRoles {
  static constexpr int kCluster = 2;
  static constexpr int kHalves = 2;  // of 128 columns
  static constexpr int kStages = 4;
  static constexpr int kTokens = kHopperRows, kColumns = 128 * kHalves;
  static constexpr int kTokenStage = kTokens * 2 * kHopperStep;
  static constexpr int kBlock = 128 * kHopperStep;  // 64 columns of a step
  static constexpr int kBlocks = kColumns / 64;
  static_assert(kBlocks % kCluster == 0);
  static constexpr int kWeightStage = kBlocks * kBlock;
  static constexpr int kShared = kStages * (kTokenStage + kWeightStage) + 2 * kStages * 8;
  static_assert(kShared <= 227 * 1024);

  struct Fragments {  // as schedule.cuh stores partial results
    static constexpr int kThreads = HopperRoles::kConsumers, kRowTiles = kHalves, kTokenTiles = 16;
    static constexpr int kPartial = kTokens * kColumns;
  };
};
struct BackwardArguments {
  TensorMap token_map, weight_map;  // of grad_y and W
  TensorMap left_map, right_map;    // of the parts of ds and a
  Dropout dropout;
  void* dx;
  float* partial;
  int64_t m, k;
  Schedule schedule;                        // of clusters
  int64_t column_tiles, token_tiles, band;  // of a cluster: kCluster token tiles
  int up_steps;                             // the first of a tile's steps: ranks
};

#if defined(NF4_HOPPER_CODE)

using DxSums = float[BackwardTile::kHalves][16][4];

// Where the fragments of this thread lie in the output: acc[h][j][2 * half + e] is
// (token + 8 * half, column + 128 h + 8 j + e).
struct DxPlace {
  int64_t token, column;

  __device__ DxPlace(const BackwardArguments& p, int64_t tile) {
    const TilePosition at = tile_position(tile, p.column_tiles, p.token_tiles, p.band);
    const int64_t token_tile =
        at.token_tile * BackwardTile::kCluster + blockIdx.x % BackwardTile::kCluster;
    token = token_tile * BackwardTile::kTokens + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    column = at.row_tile * BackwardTile::kColumns + threadIdx.x % 4 * 2;
  }
};

// Multiplies the sums by the dropout mask. A Philox block is four neighbouring columns, which two
// lanes share: the even one computes it for the token of its upper rows, the odd one for that of
// its lower rows, and they exchange the bits.
__device__ __forceinline__ void mask_dx(DxSums& acc, const BackwardArguments& p,
                                        const DxPlace& place) {
  const Dropout& d = p.dropout;
  const int64_t seed = *d.seed;
  const int odd = threadIdx.x % 2;
  const int64_t first = (place.token + 8 * odd) * p.k + place.column - 2 * odd;
#pragma unroll
  for (int part = 0; part < 2 * BackwardTile::kHalves; ++part) {  // 64 columns each
    uint32_t own = 0;
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
      const uint4 w = philox(seed, (first + 64 * part + 8 * j) / 4);
      const uint32_t kept = (is_kept(d, w.x) ? 1u : 0u) | (is_kept(d, w.y) ? 2u : 0u) |
                            (is_kept(d, w.z) ? 4u : 0u) | (is_kept(d, w.w) ? 8u : 0u);
      own |= kept << (4 * j);
    }
    const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 1);
    const uint32_t bits[2] = {(odd ? other : own) >> (2 * odd), (odd ? own : other) >> (2 * odd)};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float (&v)[4] = acc[part / 2][part % 2 * 8 + j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] *= bits[i / 2] >> (4 * j + i % 2) & 1 ? d.keep_scale : 0.0f;
      }
    }
  }
}

// Lane t of a quad has word i of 16 bytes i; afterwards it has the four words of 16 bytes t.
__device__ __forceinline__ void transpose4(uint32_t (&v)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t sent = upper ? v[i] : v[i + distance];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, distance);
      if (upper) {
        v[i] = got;
      } else {
        v[i + distance] = got;
      }
    }
  }
}

// Rounds and stores the fragments of one tile, 16 bytes a lane: 64 of each of a warp's 8 rows.
template <typename T>
__device__ __forceinline__ void store_dx(const DxSums& acc, const BackwardArguments& p,
                                         const DxPlace& place) {
  const int lane_column = threadIdx.x % 4;
  const int64_t first = place.column - 2 * lane_column + 8 * lane_column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = place.token + 8 * half;
    T* row = static_cast<T*>(p.dx) + token * p.k + first;
#pragma unroll
    for (int part = 0; part < 4 * BackwardTile::kHalves; ++part) {  // 32 columns each
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&from)[4] = acc[part / 4][part % 4 * 4 + j];
        v[j] = pack2<T>(from[2 * half], from[2 * half + 1]);
      }
      transpose4(v);
      if (token < p.m && first + 32 * part < p.k) {
        *reinterpret_cast<uint4*>(row + 32 * part) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }
}

#endif  // NF4_HOPPER_CODE

}  // namespace nf4::cuda
