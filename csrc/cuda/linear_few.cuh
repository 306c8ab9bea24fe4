// y = x W^T for few tokens, where reading the weight is all the work there is.
//
// One CTA an SM, whole tiles of 32 rows of the weight each, so that no partial sums go through
// global memory and no second kernel adds them. The tiles of a CTA, laid end to end, are cut into
// units of 256 elements of K; of kStreams warps each takes every kStreams-th. It copies its units
// to stages of its own, kAhead ahead and past L1, where x stays, and never waits for another
// stream: it hands the sums of a unit to the last warp, through two places of its own in shared
// memory. That warp adds the units of a tile in their order, and LoRA's up-projection, and stores.
//
// mma.m16n8k16 with the weights as the 16-row operand and tokens as the 8 columns, as in
// linear_tile.cuh, with another permutation of K: of each 64 elements, lane t of a quad owns the 16
// from 16 t on. Those are 8 bytes of a row, and 32 of x.
#pragma once

#include "few_units.cuh"
#include "lora_few.cuh"

namespace nf4::cuda {

// The table of linear_tile.cuh at a multiple of its size, as one lane sees it.
class PairTable {
 public:
  __device__ __forceinline__ explicit PairTable(const uint32_t* words) : words_(words) {
#if !defined(NF4_EMULATE)
    column_ = shared_address(words) + threadIdx.x % 32 * 4;
#endif
  }
  // Of the byte in bits 7 to 14: a row of the table has 128 bytes.
  __device__ __forceinline__ uint32_t pair(uint32_t shifted) const {
#if defined(NF4_EMULATE)
    return words_[(shifted & 0x7f80) / 4 + threadIdx.x % 32];
#else
    return *static_cast<const uint32_t*>(
        __cvta_shared_to_generic(and_or(shifted, 0x7f80, column_)));
#endif
  }

 private:
  const uint32_t* words_;
  uint32_t column_ = 0;
};

// A lane's elements of a chunk, of each token tile.
template <typename S>
using FewTokens = uint4[S::kTokenTiles][2];

template <typename T, typename S>
__device__ __forceinline__ void load_tokens(FewTokens<S>& to, const T* const (&x)[S::kTokenTiles],
                                            int64_t k) {
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
#pragma unroll
    for (int j = 0; j < 2; ++j) to[tt][j] = reinterpret_cast<const uint4*>(x[tt] + k)[j];
  }
}

// Chunks `start` on of a unit, on the fragments of the warp. `tokens` holds those of the first, and
// at the end those of the chunk that follows: they are loaded a chunk ahead. `k` and `next_k` are
// where this unit and the next one begin, `scale` is of the row that FewScales says.
template <typename T, typename S>
__device__ __forceinline__ void multiply_chunks(float (&acc)[S::kRowTiles][S::kTokenTiles][4],
                                                const uint2 (&words_of)[S::kAtOnce][S::kOwnRows],
                                                const PairTable& table,
                                                const float (&scale)[kUnitChunks], int start,
                                                const T* const (&x)[S::kTokenTiles],
                                                FewTokens<S>& tokens, int64_t k, int64_t next_k) {
#pragma unroll
  for (int i = 0; i < S::kAtOnce; ++i) {
    const int c = start + i;
    FewTokens<S> ahead;
    load_tokens<T, S>(ahead, x, c + 1 < kUnitChunks ? k + (c + 1) * kChunk : next_k);
#pragma unroll
    for (int rt = 0; rt < S::kRowTiles; ++rt) {
      float s[2];
      uint32_t a[4][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s[half] = from_quad_lane(scale[c], 2 * rt + half);
        const uint2 words = words_of[i][2 * rt + half];
        const uint32_t word[2] = {words.x, words.y};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          a[2 * j][half] = table.pair(word[j] << 7);
          a[2 * j][half + 2] = table.pair(word[j] >> 1);
          a[2 * j + 1][half] = table.pair(word[j] >> 9);
          a[2 * j + 1][half + 2] = table.pair(word[j] >> 17);
        }
      }
#pragma unroll
      for (int tt = 0; tt < S::kTokenTiles; ++tt) {
        float sum[4] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t first[2] = {tokens[tt][j].x, tokens[tt][j].y};
          const uint32_t second[2] = {tokens[tt][j].z, tokens[tt][j].w};
          mma_m16n8k16<T>(sum, a[2 * j], first);
          mma_m16n8k16<T>(sum, a[2 * j + 1], second);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[rt][tt][e] = fmaf(sum[e], s[e / 2], acc[rt][tt][e]);
      }
    }
#pragma unroll
    for (int tt = 0; tt < S::kTokenTiles; ++tt) {
#pragma unroll
      for (int j = 0; j < 2; ++j) tokens[tt][j] = ahead[tt][j];
    }
  }
}

// Stream `warp`: the products of its units.
template <typename T, typename S>
__device__ __forceinline__ void stream(const FewCta<S>& cta, FewLoader<S>& loader,
                                       FewScales<S>& raw_scales) {
  const TileArguments& common = shared_part(cta.all);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* x[S::kTokenTiles];  // of this lane's tokens; those past the last repeat it
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
    const int64_t token = tt * 8 + lane / 4 < common.m ? tt * 8 + lane / 4 : common.m - 1;
    x[tt] = static_cast<const T*>(common.in) + token * common.k + lane % 4 * 16;
  }
  const PairTable table(cta.table);
  int stage = 0, place = warp;
  uint32_t parity = 1;  // of the phase in which the place was left
  FewTokens<S> tokens;
  Unit<S> at(cta);
  load_tokens<T, S>(tokens, x, at.unit * kUnit);
#pragma unroll 1
  while (at.tile < cta.tiles) {
    float scale[kUnitChunks];
    raw_scales.decode(cta.map, scale);
    const int unit = at.unit;
    at.advance(cta);
    raw_scales.load(cta, at);
    cp_async_wait<S::kAhead - 1>();
    __syncwarp();  // the stage has landed for all lanes
    float acc[S::kRowTiles][S::kTokenTiles][4] = {};
#pragma unroll
    for (int c = 0; c < kUnitChunks; c += S::kAtOnce) {
      uint2 words[S::kAtOnce][S::kOwnRows];
      loader.read(stage, c, words);
      if (c + S::kAtOnce == kUnitChunks) {
        __syncwarp();  // all lanes have left the stage
        loader.load(cta, stage);
      }
      multiply_chunks<T, S>(acc, words, table, scale, c, x, tokens, unit * kUnit, at.unit * kUnit);
    }
    stage = stage + 1 == S::kAhead ? 0 : stage + 1;

    mbarrier_wait(cta.empty + place, parity);
    float4* to = cta.sums + place * S::kFragments * 32 + lane;
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      const float (&own)[4] = acc[f / S::kTokenTiles][f % S::kTokenTiles];
      to[f * 32] = make_float4(own[0], own[1], own[2], own[3]);
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(cta.full + place);
    place += S::kStreams;
    if (place >= S::kPlaces) {
      place -= S::kPlaces;
      parity ^= 1;
    }
  }
  cp_async_wait<0>();
}

// The last warp: LoRA's down-projection, then of each tile the sums, the up-projection, the result.
template <typename T, typename S>
__device__ __forceinline__ void finish_tiles(const FewCta<S>& cta, const FewDown& down) {
  const int lane = threadIdx.x % 32;
  few_down<T>(down);
  int place = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int tile = 0; tile < cta.tiles; ++tile) {
    float total[S::kRowTiles][S::kTokenTiles][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < cta.units; ++unit) {
#if !defined(NF4_PLANT_MISSING_SUM_WAIT)
      mbarrier_wait(cta.full + place, parity);
#endif
      const float4* from = cta.sums + place * S::kFragments * 32 + lane;
#pragma unroll
      for (int f = 0; f < S::kFragments; ++f) {
        const float4 v = from[f * 32];
        float (&own)[4] = total[f / S::kTokenTiles][f % S::kTokenTiles];
        own[0] += v.x, own[1] += v.y, own[2] += v.z, own[3] += v.w;
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(cta.empty + place);
      if (++place == S::kPlaces) {
        place = 0;
        parity ^= 1;
      }
    }
    const OwnTile own = cta.own(tile);
    const Place<S> at(TilePosition{own.tile, 0});
    Forward<T, S>::finish(total, own.p, at);
    store_tile<T, S>(total, own.p, at);
  }
}

template <typename T, typename S>
__device__ __forceinline__ void run_few(const GroupArguments& all, int format,
                                        const FewDown& down) {
  Carve carve;
  auto* sums = carve.take<float4>(S::kSums / 16);
  carve.align(S::kTable);
  auto* table = carve.take<uint32_t>(S::kTable / 4, 128);
  float* map = carve.take<float>(S::kMap / 4);
  auto* stages = carve.take<unsigned char>(S::kStreams * S::kAhead * S::kStage, 128);
  auto* full = carve.take<Mbarrier>(2 * S::kPlaces);
  const auto total = static_cast<int>(all.first[all.count]);
  const int tiles = (total - static_cast<int>(blockIdx.x) - 1) / static_cast<int>(gridDim.x) + 1;
  const auto units = static_cast<int>(shared_part(all).k / kUnit);
  const bool streams = threadIdx.x / 32 < S::kStreams;
  const FewCta<S> cta{all, units, tiles, table, map, sums, full, full + S::kPlaces};

  FewLoader<S> loader(cta, stages);
  if (streams) loader.prefetch(cta);
  if (threadIdx.x < 2 * S::kPlaces) mbarrier_init(full + threadIdx.x, 1);
  Forward<T, S>::fill_table(table, format);
  for (int i = threadIdx.x; i < 256; i += S::kThreads) map[i] = kCodes8[0][i];
  FewScales<S> scales;
  if (streams) {
#pragma unroll
    for (int stage = 0; stage < S::kAhead; ++stage) loader.load(cta, stage);
    scales.load(cta, Unit<S>(cta));
  }
  __syncthreads();
  if (streams) {
    stream<T, S>(cta, loader, scales);
  } else {
    finish_tiles<T, S>(cta, down);
  }
}

}  // namespace nf4::cuda
