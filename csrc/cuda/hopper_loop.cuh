// The main loop of hopper_tile.cu: who loads, who decodes and multiplies, and what is stored.
#pragma once

#include "hopper_decode.cuh"
#include "hopper_ring.cuh"

#if defined(NF4_HOPPER_CODE)

namespace nf4::cuda {

// Where the fragments of this thread lie in the output. The 16 rows of a warp are permuted so that
// a thread has two neighbouring features: rows g and g + 8 of a fragment are 2 g and 2 g + 1.
struct HopperPlace {
  int64_t feature, token;  // acc[h][j][2 * half + e] is (feature + half, token + 128 h + 8 j + e)

  __device__ HopperPlace(const HopperArguments& p, int64_t tile, int tile_tokens, int cluster) {
    const TilePosition at = tile_position(tile, p.row_tiles, p.token_tiles, p.band);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t row_tile = at.row_tile * cluster + blockIdx.x % cluster;
    feature = row_tile * kHopperRows + warp * 16 + lane / 4 * 2;
    token = at.token_tile * tile_tokens + lane % 4 * 2;
  }
};

// One thread loads every step of this CTA's tiles, as soon as the consumers have left a stage.
template <typename S>
__device__ __forceinline__ void produce(const HopperArguments& p, const DownWork& work,
                                        unsigned char* tokens, unsigned char* weights,
                                        Mbarrier* full, Mbarrier* empty) {
  bool has_left = work.tasks == 0;
  const int64_t cluster = blockIdx.x / S::kCluster;
  const int64_t count = p.schedule.count(cluster);
  Cursor at(p.schedule, cluster);
  Ring<S::kStages> ring;
  int row = 0, token = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || at.step == 0) {
      const TilePosition tile = tile_position(at.tile, p.row_tiles, p.token_tiles, p.band);
      const int64_t row_tile = tile.row_tile * S::kCluster + blockIdx.x % S::kCluster;
      row = static_cast<int>(row_tile * kHopperRows);
      token = static_cast<int>(tile.token_tile * S::kTokens);
    }
    Mbarrier* barrier = full + ring.stage;
    unsigned char* tokens_to = tokens + ring.stage * S::kTokenStage;
    unsigned char* weights_to = weights + ring.stage * S::kWeightStage;
    wait_empty<S>(empty, ring);
    if (at.step < p.k_steps) {
      mbarrier_arrive_expect(barrier, S::kTokenStage + S::kWeightStage);
      const int k = at.step * kHopperStep;
      if constexpr (S::kDense) {
        tma_load(weights_to, p.weight_map, barrier, k, 0, 0, row / 16);
      } else {
        tma_load(weights_to, p.weight_map, barrier, k / 2, row);
      }
      load_shared<S>(tokens_to, p.token_map, barrier, k, token, S::kTokens);
    } else {
      if (!has_left) {
        wait_for(work.counters + 1, work.tasks);
        fence_async_global();
        has_left = true;
      }
      mbarrier_arrive_expect(barrier, S::kTokenStage);
      load_shared<S>(tokens_to, p.left_map, barrier, (at.step - p.k_steps) * kHopperStep, token,
                     S::kTokens);
    }
    at.advance();
    ring.advance();
  }
  outlive_cluster<S>(empty, ring);
}

// Takes LoRA's down-projections: s, and of the own weight also its two parts.
template <typename T>
struct DownStore {
  const HopperArguments& p;
  const DownWork& work;

  __device__ __forceinline__ void operator()(const Down& d, int64_t token, int rank,
                                             float value) const {
    if (rank < d.r) d.out[token * d.r + rank] = value;
    if (&d != work.members) return;
    auto* to = reinterpret_cast<T*>(p.left) + token * 2 * p.padded + rank / 16 * 32 + rank % 16;
    const float scaled = value * p.left_scaling;
    to[0] = from_float<T>(scaled);
    to[16] = from_float<T>(scaled - to_float(to[0]));
  }
};

template <typename T, typename S>
__device__ __forceinline__ void down_before(const HopperArguments& p, const DownWork& work,
                                            float* scratch, int* ticket) {
  down_phase<T, S::kDownTiles>(work, scratch, ticket, DownStore<T>{p, work},
                               [] { fence_async_global(); });
}

// Adds the bias, rounds and stores the fragments of one tile.
template <typename T, int kHalves>
__device__ __forceinline__ void store_tile(const float (&acc)[kHalves][16][4],
                                           const HopperArguments& p, const HopperPlace& place) {
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
  const int64_t tokens = p.m - place.token;
  const int left = tokens < 256 ? static_cast<int>(tokens) : 256;
  T* to = y + place.token * p.n + feature;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      T* at = to;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float v0 = acc[h][j][e] + bias[0], v1 = acc[h][j][e + 2] + bias[1];
        if (128 * h + 8 * j + e < left) {
          if (aligned) {
            *reinterpret_cast<uint32_t*>(at) = pack2<T>(v0, v1);
          } else {
            at[0] = from_float<T>(v0);
            if (pair) at[1] = from_float<T>(v1);
          }
        }
        at += p.n;
      }
      to += 8 * p.n;
    }
  }
}

// The same by TMA, from shared memory, while the next tile is under way: 128 tokens of a
// warpgroup's 64 features at a time. Rows of 128 bytes are features, swizzled as TMA reads them, so
// that the 32 lanes' words lie in 32 banks.
template <typename T, int kHalves>
__device__ __forceinline__ void store_boxes(const float (&acc)[kHalves][16][4],
                                            const HopperArguments& p, const HopperPlace& place,
                                            unsigned char* to) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int chunk = threadIdx.x / 32 % 4 * 2 + g / 4;  // of 16 bytes in a row
  float bias[2] = {};
  if (p.bias != nullptr && place.feature < p.n) {
    const uint32_t pair =
        *reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + place.feature);
    unpack2<T>(pair, bias[0], bias[1]);
  }
  const bool leads = threadIdx.x % 128 == 0;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
#if !defined(NF4_PLANT_MISSING_STORE_WAIT)
    if (leads) tma_store_wait();
#endif
    warpgroup_sync();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 2 * t + e;
      unsigned char* at = to + row * 128 + (chunk ^ row) * 16 + g % 4 * 4;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        *reinterpret_cast<uint32_t*>(at + j * 1024) =
            pack2<T>(acc[h][j][e] + bias[0], acc[h][j][e + 2] + bias[1]);
      }
    }
    fence_async_shared();
    warpgroup_sync();
    const int64_t token = place.token + 128 * h;
    if (leads && place.feature < p.n && token < p.m) {
      tma_store(p.y_map, to, static_cast<int>(place.feature), static_cast<int>(token));
      tma_store_commit();
    }
  }
}

// What weights are decoded by, in shared memory: codes (decode_step) and the map of nested scales.
struct DecodeTables {
  const unsigned char* codes;
  const float* map;
};

// `steps` steps of K with weights decoded from bytes: those of the next step while the products of
// this one are under way. Between two steps a warpgroup's queue is empty for the time of a wait and
// a fence; the other warpgroup's products fill it. (Keeping one group under way across the loop
// makes ptxas wait after every product of the tile of 128 tokens, C7513.)
template <typename T, typename S>
__device__ __forceinline__ void multiply_fused(float (&acc)[S::kHalves][16][4],
                                               const HopperArguments& p, Stages<S>& in,
                                               const DecodeTables& tables,
                                               RowScales<S::kNested>& scales, int steps) {
  uint32_t a[2][4][4];
  float scale[2];
  StepWords words;
  Ring<S::kStages> ahead = in.ring;  // of the bytes to be read next
  const auto read = [&] {
    in.wait(ahead);
    words.load(in.weights_at(ahead.stage));
    ahead.advance();
  };
  const auto decode = [&](uint32_t (&to)[4][4], bool has_next) {
    scales.decode(tables.map, scale);
    if (has_next) scales.load(p);
    decode_step<T>(to, tables.codes, words, scale);
    if (has_next) read();
  };
  if (steps > 0) {
    scales.load(p);
    read();
    decode(a[0], steps > 1);
  }
#pragma unroll 1
  for (int start = 0; start < steps; start += 2) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {  // two sets of fragments: one is multiplied, one decoded
      if (start + u >= steps) break;
      const int stage = in.ring.stage;
      const uint64_t x = shared_matrix(in.tokens_at(stage));
      pin(a[u]);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // 16 elements of K
        wgmma<T>(acc, a[u][c], moved(x, c * 32));
      }
      wgmma_commit();
      in.ring.advance();
      if (start + u + 1 < steps) decode(a[u ^ 1], start + u + 2 < steps);
#if !defined(NF4_PLANT_MISSING_WGMMA_WAIT)
      wgmma_wait<0>();
#endif
      pin(a[u]);
      in.release(stage);
    }
  }
  wgmma_wait<0>();
}

// `steps` steps of K with 16-bit weights.
template <typename T, typename S>
__device__ __forceinline__ void multiply_dense(float (&acc)[S::kHalves][16][4], Stages<S>& in,
                                               int steps) {
  const int group = threadIdx.x / 128;
  multiply_steps(in, steps, [&](const unsigned char* tokens, const unsigned char* weights) {
    const uint64_t x = shared_matrix(tokens);
    const uint64_t w = shared_matrix(weights + group * 64 * 128);
#pragma unroll
    for (int c = 0; c < 4; ++c) wgmma<T>(acc, moved(w, c * 32), moved(x, c * 32));
  });
}

// `steps` steps of 32 ranks from `rank` on, the first of which the dense way has in `rows`. The
// columns of a stage are, twice, the high parts of 16 ranks of s and their low parts.
template <typename T, typename S>
__device__ __forceinline__ void multiply_up(float (&acc)[S::kHalves][16][4],
                                            const HopperArguments& p, Stages<S>& in, UpRows& rows,
                                            int64_t feature, int rank, int steps) {
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    uint32_t high[2][4], low[2][4];
    if constexpr (!S::kDense) rows.load(p, feature, rank);  // no registers are left for it before
#pragma unroll
    for (int c = 0; c < 2; ++c) rows.fragments<T>(p, c, high[c], low[c]);
    const uint64_t x = shared_matrix(in.tokens_at(in.ring.stage));
    in.wait(in.ring);
    pin(high);
    pin(low);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint64_t s = moved(x, c * 64);
      wgmma<T>(acc, high[c], s);
      wgmma<T>(acc, high[c], moved(s, 32));
      wgmma<T>(acc, low[c], s);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(high);
    pin(low);
    in.release(in.ring.stage);
    in.ring.advance();
    rank += 32;
    if (S::kDense && i + 1 < steps) rows.load(p, feature, rank);
  }
}

// All steps of this CTA's tiles by one warpgroup's 64 rows.
template <typename T, typename S>
__device__ __forceinline__ void consume(const HopperArguments& p, const DecodeTables& tables,
                                        Stages<S>& in, unsigned char* store) {
  const int64_t cluster = blockIdx.x / S::kCluster;
  const int64_t count = p.schedule.count(cluster);
  Cursor at(p.schedule, cluster);
  for (int64_t done = 0; done < count;) {
    const HopperPlace place(p, at.tile, S::kTokens, S::kCluster);
    const int64_t to_end = at.steps - at.step, to_leave = count - done;
    const int steps = static_cast<int>(to_end < to_leave ? to_end : to_leave);
    const int left = p.k_steps - at.step;
    const int k_steps = left < 0 ? 0 : (left < steps ? left : steps);
    const int up_steps = steps - k_steps, rank = (at.step + k_steps - p.k_steps) * 32;
    UpRows rows;
    float acc[S::kHalves][16][4] = {};
    if constexpr (S::kDense) {
      if (up_steps > 0) rows.load(p, place.feature, rank);
      multiply_dense<T, S>(acc, in, k_steps);
    } else {
      RowScales<S::kNested> scales(p, place.feature, at.step);
      multiply_fused<T, S>(acc, p, in, tables, scales, k_steps);
    }
    multiply_up<T, S>(acc, p, in, rows, place.feature, rank, up_steps);
#pragma unroll
    for (int h = 0; h < S::kHalves; ++h) wgmma_results(acc[h]);

    if (steps == to_end && at.step == 0) {
      if (p.stores_boxes) {
        store_boxes<T>(acc, p, place, store + threadIdx.x / 128 * S::kStoreStage);
      } else {
        store_tile<T>(acc, p, place);
      }
    } else {
      store_partial<typename S::Fragments>(acc, partials_of<S>(p),
                                           partial_slot(cluster, at.step != 0), place.token, p.m);
    }
    done += steps;
    at.leave();
  }
  if (threadIdx.x % 128 == 0) tma_store_wait();
}

}  // namespace nf4::cuda

#endif  // NF4_HOPPER_CODE
