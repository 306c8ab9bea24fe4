// Which of hopper_tile.cu's kernels takes a problem, and what it is given.
#pragma once

#include "hopper_ring.cuh"
#include "lora_down.cuh"
#include "matmul.cuh"
#include "schedule.cuh"
#include "vector.cuh"

namespace nf4::cuda {

constexpr int kHopperRows = 128;  // of a CTA, 64 for each of its two warpgroups
constexpr int kHopperStep = 64;   // elements of K: 128 bytes, the width of a swizzled box

// kCluster CTAs work together on the same tokens and steps of K, each on row tiles of its own: x is
// read once for all of them.
template <int kHalves_, bool kDense_, int kStages_, bool kNested_, int kCluster_>
struct HopperTile : HopperRoles {
  static constexpr int kCluster = kCluster_;
  static constexpr int kHalves = kHalves_;  // of 128 tokens
  static constexpr bool kDense = kDense_;
  static constexpr bool kNested = kNested_;  // the fused way: nested scales
  static constexpr int kStages = kStages_;
  static constexpr int kTokens = 128 * kHalves;
  static constexpr int kTokenStage = kTokens * 2 * kHopperStep;
  static constexpr int kWeightStage = kHopperRows * kHopperStep * (kDense ? 4 : 1) / 2;
  // Tokens / 8 of a task of LoRA's down-projection, which comes before the tiles: few, so that no
  // CTA has none (128 tasks at M = 2048 and rank 16), and loads run ahead (lora_down.cuh).
  static constexpr int kDownTiles = 2;
  // A warpgroup's 64 features of 128 tokens on their way to y. The dense way has them where the
  // down-projection had its sums.
  static constexpr int kStoreStage = 128 * 128;
  static constexpr int kStore = kConsumers / 128 * kStoreStage;
  static constexpr int kTable = kDense ? kStore : 256 * 16 * 8;
  static constexpr int kMap = kDense ? 16 : 256 * 4;
  static_assert(kDownScratch<kDownTiles> * 4 <= kTable);
  static constexpr int kShared = kStages * (kTokenStage + kWeightStage) + (kDense ? 0 : kStore) +
                                 kTable + kMap + 2 * kStages * 8;
  static_assert(kShared <= 227 * 1024);

  struct Fragments {  // as schedule.cuh stores partial results
    static constexpr int kThreads = HopperRoles::kConsumers, kRowTiles = kHalves, kTokenTiles = 16;
    static constexpr int kPartial = kHopperRows * kTokens;
  };
};

struct HopperArguments {
  TensorMap token_map, weight_map, left_map, y_map;
  Scales scales;
  const void* bias;
  void* y;
  bool stores_boxes;  // by y_map
  float* partial;
  const void* right;  // b [n, r]
  uint16_t* left;     // the parts of s, for the down-projection of this launch to write
  int padded;         // their ranks
  float left_scaling;
  int64_t m, n, k;
  Schedule schedule;                     // of clusters
  int64_t row_tiles, token_tiles, band;  // of a cluster: kCluster row tiles
  int k_steps;                           // the rest of a tile's steps are ranks
  int r, right_dtype, log2_block, format;
};

// Fewer tokens go to linear_few.cu and linear_tile.cu. On an H200, 14336 x 4096: the tile of 128
// tokens takes 44 us, linear_tile.cu 74 for 64 tokens, linear_few.cu 34 for 32.
constexpr int64_t kHopperTokens = 33;
// From here on weights are dequantized first. On an H200, 14336 x 4096: 217 us at M = 1024, 40 of
// them for dequantize, against 227 fused; 342 to 365 against 422 at 2048, 1356 against 1718 at
// 8192. In a step of 256 tokens, 1024 clocks of the tensor cores, shared memory serves the fused
// way for 1144 (wgmma 512, TMA 288, table look-ups and bytes 344), the dense one for 1024 (640 and
// 384).
constexpr int64_t kDenseTokens = 1024;
// dx (hopper_backward.cu): from here on wgmma on weights that are dequantized first. A weight then
// costs an SM 2.5 bytes at 16.5 a clock, 0.15 clocks, and M / 2048 for its products. Of 128 tokens,
// backward_tile.cu decodes each weight for 64 in 8.8 issue slots (cuda_static.csv), so it does at
// most 64 * 128 / 8.8 = 930 products a clock: M / 930. They meet at M = 260.
// A weight that backward_tile.cu does not take would go to float32 FMA instead, so there wgmma
// begins at kHopperTokens.
constexpr int64_t kBackwardTokens = 256;
// Tiles of 128 tokens decode each weight twice as often, and then shared memory (128 + 192 of 256
// clocks) is the limit: 1.25 times slower a token. They win where they leave fewer tokens empty.
inline bool wants_halves(int64_t m) {
  const int64_t one = (m + 127) / 128 * 128, two = (m + 255) / 256 * 256;
  return one * 5 < two * 4;
}

inline bool fused_takes(const nf4_weight& w) {
  return is_4bit(w.format) && w.block_size >= kHopperStep && w.k % kHopperStep == 0 &&
         w.n * (w.k / kHopperStep) < int64_t{1} << 32 && aligned16(w.packed);
}
inline bool goes_dense(const Matmul& p) { return p.m >= kDenseTokens || !fused_takes(p.weight); }

// Calls `body(T(), HopperTile())` for the kernel that takes the problem.
template <typename Body>
auto with_hopper_tile(const Matmul& p, const Body& body) {
  const auto by_tile = [&](auto element) {
    const bool is_nested = p.weight.nested_absmax != nullptr;
    if (wants_halves(p.m)) {
      if (goes_dense(p)) return body(element, HopperTile<1, true, 6, false, 2>());
      return is_nested ? body(element, HopperTile<1, false, 8, true, 1>())
                       : body(element, HopperTile<1, false, 8, false, 1>());
    }
    if (goes_dense(p)) return body(element, HopperTile<2, true, 4, false, 2>());
    return is_nested ? body(element, HopperTile<2, false, 4, true, 2>())
                     : body(element, HopperTile<2, false, 4, false, 2>());
  };
  return p.dtype == NF4_FLOAT16 ? by_tile(__half()) : by_tile(__nv_bfloat16());
}

// Token tiles (256 tokens of a cluster) in a band of tile_position. On an H200 at M = 8192, the
// matmul alone with bands of 4 and 8: 14336 x 4096 1316 and 1473 us, dx 1281 and 1343; 8192 x 8192
// 1632 and 1573, dx 1597 and 1473. At M = 2048 one band of all 8 was the better one, 325 against
// 345 us.
inline int64_t band_tiles(int64_t token_tiles, int64_t k) {
  return token_tiles > 8 && k <= 4096 ? 4 : 8;
}

// The extra steps of K for LoRA, 32 ranks each, and the ranks that s is padded to.
inline int up_steps(const Up& up) { return (up.r + 31) / 32; }
inline int padded_ranks(const Up& up) { return (up.r + 15) / 16 * 16; }

// Partial results of this CTA's place in a cluster, as many for each.
template <typename S, typename Arguments>
__device__ __forceinline__ float* partials_of(const Arguments& p) {
  const int64_t slots = 2 * static_cast<int64_t>(p.schedule.ctas);
  return p.partial + blockIdx.x % S::kCluster * slots * S::Fragments::kPartial;
}

}  // namespace nf4::cuda
