// Which CTA works on which part of which output tile, and in which order partial sums are added.
//
// A tile's reduction is cut into steps; a unit is one step of one tile. Few tiles: every CTA takes
// an equal run of consecutive units (stream-K), so all SMs are busy; a tile that several CTAs share
// is summed from their partial results by a second kernel, in CTA order. Many tiles: whole tiles,
// one after the other, with no partial results.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace nf4::cuda {

struct Schedule {
  int64_t tiles;
  int steps;  // of a tile
  int ctas;
  bool whole_tiles;

  __host__ __device__ int64_t units() const { return tiles * steps; }
  __host__ __device__ int64_t begin(int64_t cta) const { return units() * cta / ctas; }
  // The CTA whose run contains `unit`.
  __host__ __device__ int64_t owner(int64_t unit) const {
    int64_t cta = unit * ctas / units();
    while (begin(cta + 1) <= unit) ++cta;
    while (begin(cta) > unit) --cta;
    return cta;
  }
  // Units of one CTA.
  __device__ int64_t count(int64_t cta) const {
    if (!whole_tiles) return begin(cta + 1) - begin(cta);
    return cta < tiles ? ((tiles - cta - 1) / ctas + 1) * steps : 0;
  }
};

inline Schedule make_schedule(int64_t tiles, int64_t steps, int ctas_per_sm) {
  // From four waves on, the uneven last wave costs less than the partial sums would.
  const int64_t full = static_cast<int64_t>(device().multiprocessors) * ctas_per_sm;
  const bool whole = tiles >= 4 * full || tiles % full == 0;
  const auto ctas = static_cast<int>(std::min(full, whole ? tiles : tiles * steps));
  return {tiles, static_cast<int>(steps), ctas, whole};
}

// The same for long steps and large tiles, one CTA an SM (hopper_tile.cu, hopper_backward.cu); of
// clusters of CTAs `tiles` and the schedule count what a cluster does. Whole tiles, unless their
// last wave leaves SMs idle for longer than cutting costs: partial sums, and inputs that are no
// longer those that others just brought to L2, since each CTA is at another step of K. On an H200,
// whole against cut, steps idle in brackets: 14336 x 4096 60 and 75 us at M = 256 (10), 117 and 129
// at 512 (19), about equal at 1024 (39 of 256), 1566 and 1702 at 8192 (54 of 1792); 4096 x 4096 59
// and 51 us at M = 512 (33 of 64).
inline Schedule make_long_schedule(int64_t tiles, int64_t steps, int cluster) {
  constexpr int64_t kPartialSteps = 20;
  const int64_t full = std::max(device().multiprocessors / cluster, 1);
  const int64_t waves = (tiles + full - 1) / full;
  const int64_t idle = (waves * full - tiles) * steps / full;
  const bool whole = idle <= kPartialSteps + waves * steps / 12;
  const auto ctas = static_cast<int>(std::min(full, whole ? tiles : tiles * steps));
  return {tiles, static_cast<int>(steps), ctas, whole};
}

// Walks over the units of a CTA. What the schedule knows stays in the kernel's constant parameters:
// a loop has two of these, and no register to spare.
struct Cursor {
  const Schedule& schedule;
  const int& steps;
  int64_t tile;
  int step;

  __device__ Cursor(const Schedule& s, int64_t cta) : schedule(s), steps(s.steps) {
    const int64_t first = s.whole_tiles ? cta * s.steps : s.begin(cta);
    tile = first / s.steps;
    step = static_cast<int>(first % s.steps);
  }
  __device__ __forceinline__ void advance() {
    if (++step == steps) leave();
  }
  // On to the start of the next tile.
  __device__ __forceinline__ void leave() {
    step = 0;
    tile += schedule.whole_tiles ? schedule.ctas : 1;
  }
};

// A CTA leaves at most two partial results: of the tile that it joins midway (slot 2 * cta) and of
// the one that it leaves before the end (slot 2 * cta + 1).
__device__ __forceinline__ int64_t partial_slot(int64_t cta, bool starts_midway) {
  return 2 * cta + (starts_midway ? 0 : 1);
}

// Partial results lie in fragment order: acc[row tile][token tile] of every thread. Fragments of
// tokens past m are skipped. `body(float4&, row tile, token tile)`.
template <typename S, typename Body>
__device__ __forceinline__ void each_partial(float* partial, int64_t slot, int64_t first_token,
                                             int64_t m, const Body& body) {
  auto* base = reinterpret_cast<float4*>(partial + slot * S::kPartial);
#pragma unroll
  for (int rt = 0; rt < S::kRowTiles; ++rt) {
#pragma unroll
    for (int tt = 0; tt < S::kTokenTiles; ++tt) {
      if (first_token + tt * 8 < m) {
        body(base[(rt * S::kTokenTiles + tt) * S::kThreads + threadIdx.x], rt, tt);
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void store_partial(const float (&acc)[S::kRowTiles][S::kTokenTiles][4],
                                              float* partial, int64_t slot, int64_t first_token,
                                              int64_t m) {
  each_partial<S>(partial, slot, first_token, m, [&](float4& to, int rt, int tt) {
    to = make_float4(acc[rt][tt][0], acc[rt][tt][1], acc[rt][tt][2], acc[rt][tt][3]);
  });
}

// The sum over the CTAs that share a tile, in their order; false where one CTA did it all.
template <typename S>
__device__ __forceinline__ bool sum_partials(float (&acc)[S::kRowTiles][S::kTokenTiles][4],
                                             const Schedule& s, float* partial, int64_t tile,
                                             int64_t first_token, int64_t m) {
  const int64_t begin = tile * s.steps;
  const int64_t first = s.owner(begin), last = s.owner(begin + s.steps - 1);
  if (first == last) return false;
  for (int64_t cta = first; cta <= last; ++cta) {
    each_partial<S>(partial, partial_slot(cta, s.begin(cta) > begin), first_token, m,
                    [&](float4& from, int rt, int tt) {
                      const float4 v = from;
                      acc[rt][tt][0] += v.x;
                      acc[rt][tt][1] += v.y;
                      acc[rt][tt][2] += v.z;
                      acc[rt][tt][3] += v.w;
                    });
  }
  return true;
}

// Tiles in an order in which CTAs that run at the same time share inputs in L2: bands of token
// tiles, and within a band all row tiles.
struct TilePosition {
  int64_t row_tile, token_tile;
};
__device__ __forceinline__ TilePosition tile_position(int64_t tile, int64_t row_tiles,
                                                      int64_t token_tiles, int64_t band_tiles = 8) {
  const int64_t band = tile / (band_tiles * row_tiles), within = tile % (band_tiles * row_tiles);
  const int64_t left = token_tiles - band * band_tiles;
  const int64_t wide = left < band_tiles ? left : band_tiles;
  return {within / wide, band * band_tiles + within % wide};
}

}  // namespace nf4::cuda
