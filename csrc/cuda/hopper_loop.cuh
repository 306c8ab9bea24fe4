// The main loop of hopper_tile.cu: who loads, who decodes and multiplies, and what is stored.
#pragma once

#include "hopper_plan.cuh"
#include "up.cuh"

#if defined(NF4_HOPPER_CODE)

namespace nf4::cuda {

// Where a ring of stages stands, and the parity of the phase that its barriers go through.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where the fragments of this thread lie in the output. The 16 rows of a warp are permuted so that
// a thread has two neighbouring features: rows g and g + 8 of a fragment are 2 g and 2 g + 1.
struct Place {
  int64_t feature, token;  // acc[h][j][2 * half + e] is (feature + half, token + 128 h + 8 j + e)

  __device__ Place(const HopperArguments& p, int64_t tile, int tile_tokens) {
    const TilePosition at = tile_position(tile, p.row_tiles, p.token_tiles);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    feature = at.row_tile * kHopperRows + warp * 16 + lane / 4 * 2;
    token = at.token_tile * tile_tokens + lane % 4 * 2;
  }
};

// The scales of a thread's two rows, a step of K at a time, loaded a step ahead.
class RowScales {
 public:
  __device__ __forceinline__ RowScales(const HopperArguments& p, int64_t feature, int step)
      : flat_(feature * p.k + static_cast<int64_t>(step) * kHopperStep),
        rows_(feature + 1 < p.n ? 2 : (feature < p.n ? 1 : 0)),
        is_nested_(p.scales.nested_absmax != nullptr),
        offset_(is_nested_ ? p.scales.offset[0] : 0.0f) {}

  __device__ __forceinline__ void load(const HopperArguments& p) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raw_[half] = 0;
      nested_[half] = 0.0f;
      if (half >= rows_) continue;
      const int64_t block = (flat_ + half * p.k) >> p.log2_block;
      if (is_nested_) {
        raw_[half] = static_cast<const uint8_t*>(p.scales.absmax)[block];
        nested_[half] = p.scales.nested_absmax[block / NF4_NESTED_BLOCK_SIZE];
      } else {
        raw_[half] = static_cast<const uint32_t*>(p.scales.absmax)[block];
      }
    }
    flat_ += kHopperStep;
  }
  __device__ __forceinline__ void decode(const float* map, float (&scale)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] =
          is_nested_ ? map[raw_[half]] * nested_[half] + offset_ : __uint_as_float(raw_[half]);
    }
  }

 private:
  int64_t flat_;
  int rows_;
  bool is_nested_;
  float offset_;
  uint32_t raw_[2];
  float nested_[2];
};

// One step of a warp's 16 rows, as the A fragments of four wgmmas. Lane t of a quad needs byte t of
// every word. The table has a row of 128 bytes for each byte: 16 copies of its two codes in
// float32, so that the 16 lanes that are served together never meet in a bank.
template <typename T>
__device__ __forceinline__ void decode_step(uint32_t (&a)[4][4], const unsigned char* table,
                                            const unsigned char* weights, const float (&scale)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const uint32_t column = lane % 16 * 8;
  const int turn = (8 * t + 25) % 32;  // moves byte t to bits 7 to 14
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned char* row = weights + (warp * 16 + 2 * g + half) * 32;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      // TMA's 32-byte swizzle: rows 4 to 7 of each 8 have their 16-byte parts exchanged.
      const uint4 words = *reinterpret_cast<const uint4*>(row + (part ^ (g / 2 % 2)) * 16);
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

// The A fragments of 16 ranks of b, as high and low parts.
template <typename T>
__device__ __forceinline__ void up_fragments(uint32_t (&high)[4], uint32_t (&low)[4],
                                             const HopperArguments& p, int64_t feature, int first) {
  const auto right = [&](int64_t row, int rank) {
    if (row >= p.n || rank >= p.r) return 0.0f;
    return element_of(p.right, p.right_dtype, row * p.r + rank);
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = feature + i % 2;
    const int rank = first + threadIdx.x % 4 * 2 + i / 2 * 8;
    split2<T>(right(row, rank), right(row, rank + 1), high[i], low[i]);
  }
}

// One thread loads every step of this CTA's tiles, as soon as the consumers have left a stage.
template <typename S>
__device__ __forceinline__ void produce(const HopperArguments& p, unsigned char* tokens,
                                        unsigned char* weights, Mbarrier* full, Mbarrier* empty) {
  const int64_t count = p.schedule.count(blockIdx.x);
  Cursor at(p.schedule, blockIdx.x);
  Ring<S::kStages> ring;
  for (int64_t i = 0; i < count; ++i) {
    const TilePosition tile = tile_position(at.tile, p.row_tiles, p.token_tiles);
    const auto row = static_cast<int>(tile.row_tile * kHopperRows);
    const auto token = static_cast<int>(tile.token_tile * S::kTokens);
    Mbarrier* barrier = full + ring.stage;
    unsigned char* tokens_to = tokens + ring.stage * S::kTokenStage;
    unsigned char* weights_to = weights + ring.stage * S::kWeightStage;
    mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
    if (at.step < p.k_steps) {
      mbarrier_arrive_expect(barrier, S::kTokenStage + S::kWeightStage);
      const int k = at.step * kHopperStep;
      if constexpr (S::kDense) {
        tma_load(weights_to, p.weight_map, barrier, k, 0, 0, row / 16);
      } else {
        tma_load(weights_to, p.weight_map, barrier, k / 2, row);
      }
      tma_load(tokens_to, p.token_map, barrier, k, token);
    } else {
      mbarrier_arrive_expect(barrier, S::kTokenStage);
      tma_load(tokens_to, p.left_map, barrier, (at.step - p.k_steps) * kHopperStep, token);
    }
    at.advance();
    ring.advance();
  }
}

// Adds the bias, rounds and stores the fragments of one tile.
template <typename T, int kHalves>
__device__ __forceinline__ void store_tile(const float (&acc)[kHalves][16][4],
                                           const HopperArguments& p, const Place& place) {
  auto* y = static_cast<T*>(p.y);
  const int64_t feature = place.feature;
  if (feature >= p.n) return;
  const bool pair = feature + 1 < p.n;
  const bool aligned = p.n % 2 == 0;
  float bias[2] = {};
  if (p.bias != nullptr) {
    bias[0] = to_float(static_cast<const T*>(p.bias)[feature]);
    if (pair) bias[1] = to_float(static_cast<const T*>(p.bias)[feature + 1]);
  }
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t token = place.token + 128 * h + 8 * j + e;
        if (token >= p.m) continue;
        const float v0 = acc[h][j][e] + bias[0], v1 = acc[h][j][e + 2] + bias[1];
        T* to = y + token * p.n + feature;
        if (aligned) {
          *reinterpret_cast<uint32_t*>(to) = pack2<T>(v0, v1);
        } else {
          to[0] = from_float<T>(v0);
          if (pair) to[1] = from_float<T>(v1);
        }
      }
    }
  }
}

// All steps of this CTA's tiles by one warpgroup's 64 rows.
template <typename T, typename S>
__device__ __forceinline__ void consume(const HopperArguments& p, const unsigned char* tokens,
                                        const unsigned char* weights, const unsigned char* table,
                                        const float* map, Mbarrier* full, Mbarrier* empty) {
  constexpr int kHalves = S::kHalves;
  const int group = threadIdx.x / 128;
  const int64_t count = p.schedule.count(blockIdx.x);
  Cursor at(p.schedule, blockIdx.x);
  Ring<S::kStages> ring;
  const auto release = [&](int stage) {
    __syncwarp();  // all lanes have read
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + stage);
  };
  for (int64_t done = 0; done < count;) {
    const Place place(p, at.tile, S::kTokens);
    const int64_t to_end = at.steps - at.step, to_leave = count - done;
    const int steps = static_cast<int>(to_end < to_leave ? to_end : to_leave);
    const int left = p.k_steps - at.step;
    const int main_steps = left < 0 ? 0 : (left < steps ? left : steps);
    float acc[kHalves][16][4] = {};

    RowScales scales(p, place.feature, at.step);
    if (!S::kDense && main_steps > 0) scales.load(p);
    uint32_t a[2][4][4];
    int before = 0;  // the stage whose products are under way
#pragma unroll 1
    for (int start = 0; start < main_steps; start += 2) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {  // two sets of fragments: one is decoded, one multiplied
        if (start + u >= main_steps) break;
        const unsigned char* x = tokens + ring.stage * S::kTokenStage;
        const unsigned char* w = weights + ring.stage * S::kWeightStage;
#if !defined(NF4_PLANT_MISSING_MBARRIER_WAIT)
#if defined(NF4_PLANT_WRONG_PHASE)
        mbarrier_wait(full + ring.stage, ring.parity ^ 1);
#else
        mbarrier_wait(full + ring.stage, ring.parity);
#endif
#endif
        if constexpr (!S::kDense) {
          float scale[2];
          scales.decode(map, scale);
          if (start + u + 1 < main_steps) scales.load(p);
          decode_step<T>(a[u], table, w, scale);
        }
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; ++c) {  // 16 elements of K
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            const uint64_t b = shared_matrix(x + h * 128 * 128 + c * 32);
            if constexpr (S::kDense) {
              wgmma_m64n128k16<T>(acc[h], shared_matrix(w + group * 64 * 128 + c * 32), b);
            } else {
              wgmma_m64n128k16<T>(acc[h], a[u][c], b);
            }
          }
        }
        wgmma_commit();
#if !defined(NF4_PLANT_MISSING_WGMMA_WAIT)
        wgmma_wait<1>();
#endif
        if (start + u > 0) {
          if constexpr (!S::kDense) {
#pragma unroll
            for (int c = 0; c < 4; ++c) wgmma_keep(a[u ^ 1][c]);
          }
          release(before);
        }
        before = ring.stage;
        ring.advance();
      }
    }
    wgmma_wait<0>();
    if (main_steps > 0) release(before);

    // Columns of a stage, twice: high parts of 16 ranks of s, low parts of the same.
#pragma unroll 1
    for (int i = main_steps; i < steps; ++i) {
      const unsigned char* x = tokens + ring.stage * S::kTokenStage;
      const int rank = (at.step + i - p.k_steps) * (kHopperStep / 2);
      uint32_t high[2][4], low[2][4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        up_fragments<T>(high[c], low[c], p, place.feature, rank + c * 16);
      }
      mbarrier_wait(full + ring.stage, ring.parity);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          const unsigned char* columns = x + h * 128 * 128 + c * 64;
          wgmma_m64n128k16<T>(acc[h], high[c], shared_matrix(columns));
          wgmma_m64n128k16<T>(acc[h], high[c], shared_matrix(columns + 32));
          wgmma_m64n128k16<T>(acc[h], low[c], shared_matrix(columns));
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        wgmma_keep(high[c]);
        wgmma_keep(low[c]);
      }
      release(ring.stage);
      ring.advance();
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) wgmma_results(acc[h]);

    if (steps == to_end && at.step == 0) {
      store_tile<T>(acc, p, place);
    } else {
      store_partial<typename S::Fragments>(acc, p.partial, partial_slot(blockIdx.x, at.step != 0),
                                           place.token, p.m);
    }
    done += steps;
    at.leave();
  }
}

}  // namespace nf4::cuda

#endif  // NF4_HOPPER_CODE
