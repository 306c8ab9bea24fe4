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

#include "linear_tile.cuh"
#include "lora_few.cuh"
#include "mbarrier.cuh"

namespace nf4::cuda {

constexpr int kReserved = 1024;  // bytes of shared memory that the system takes first

template <int kTokenTiles_, int kStreams_, int kAhead_, bool kGroup_>
struct FewShape {
  static constexpr int kRowTiles = 2, kTokenTiles = kTokenTiles_;
  static constexpr int kStreams = kStreams_, kAhead = kAhead_;
  static constexpr bool kGroup = kGroup_;  // several weights
  static constexpr int kThreads = 32 * (kStreams + 1);
  static constexpr int kOwnRows = 2 * kRowTiles;  // of a lane
  static constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles;
  static constexpr int kWarpsToken = 1, kWarpRows = 0;  // the warp that stores has the whole tile
  static constexpr bool kManyTokens = false;
  static constexpr int kAtOnce = kTokenTiles == 1 ? 4 : 2;  // chunks in registers
  static constexpr int kTable = 256 * 32 * 4;
  static constexpr int kMap = 256 * 4;
  static constexpr int kPlaces = 2 * kStreams;  // for the sums of a unit
  static constexpr int kFragments = kRowTiles * kTokenTiles;
  static constexpr int kSums = kPlaces * kFragments * 32 * 16;
  static constexpr int kBarriers = 2 * kPlaces * 8;
  static constexpr int kStage = kRows * 128;  // a unit
  // The table begins at a multiple of its size, so that an address in it is a bit-wise or.
  static constexpr int kTableAt = (kReserved + kSums + kTable - 1) / kTable * kTable;
  static constexpr int kShared =
      kTableAt - kReserved + kTable + kMap + kBarriers + kStreams * kAhead * kStage;
};

constexpr int kUnit = 256;                   // elements of K, of all rows of a tile
constexpr int kUnitChunks = kUnit / kChunk;  // each under one scale
constexpr int kUnitBytes = kUnit / 2;        // of a row

// What the warps of a CTA share.
template <typename S>
struct FewCta {
  const GroupArguments& all;
  int units, tiles;  // of a tile, of the CTA
  const uint32_t* table;
  const float* map;
  float4* sums;
  Mbarrier *full, *empty;  // of each place

  // The CTA's `tile`-th.
  __device__ __forceinline__ OwnTile own(int tile) const {
    const int64_t number = blockIdx.x + static_cast<int64_t>(tile) * gridDim.x;
    if constexpr (S::kGroup) return own_tile(all, number);
    return {all.members[0], number};
  }
};

// A unit of this stream: the how-manieth tile of the CTA, and which of its units.
template <typename S>
struct Unit {
  int tile, unit;

  __device__ __forceinline__ explicit Unit(const FewCta<S>& cta)
      : tile(0), unit(static_cast<int>(threadIdx.x / 32)) {
    wrap(cta);
  }
  __device__ __forceinline__ void advance(const FewCta<S>& cta) {
    unit += S::kStreams;
    wrap(cta);
  }

 private:
  __device__ __forceinline__ void wrap(const FewCta<S>& cta) {
    while (unit >= cta.units) {
      unit -= cta.units;
      ++tile;
    }
  }
};

// Starts the copies of one unit after the other: rows of 128 bytes, of which every 32 are moved so
// that the quads of half a warp, which read the same 32 of four rows, meet in no bank.
template <typename S>
class FewLoader {
 public:
  __device__ __forceinline__ FewLoader(const FewCta<S>& cta, unsigned char* stages)
      : at_(cta), stages_(stages + threadIdx.x / 32 * (S::kAhead * S::kStage)) {
    enter(cta);
  }

  // The first unit, as far as L2.
  __device__ __forceinline__ void prefetch(const FewCta<S>& cta) const {
    if (at_.tile >= cta.tiles || threadIdx.x % 8 != 0) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (row() + 4 * i < rows_left_) prefetch_to_l2(from_ + i * four_rows_);
    }
  }
  __device__ __forceinline__ void load(const FewCta<S>& cta, int stage) {
    if (at_.tile < cta.tiles) {
      unsigned char* to = stages_ + stage * S::kStage;
      const int piece = threadIdx.x % 8;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int at = row() + 4 * i;
        cp_async16(to + at * 128 + moved(piece / 2, at) * 32 + piece % 2 * 16,
                   from_ + i * four_rows_, at < rows_left_ ? 16 : 0);
      }
      at_.advance(cta);
      enter(cta);
    }
    cp_async_commit();
  }
  // The words of chunks `first` on of the unit in `stage`, of this lane's rows.
  __device__ __forceinline__ void read(int stage, int first,
                                       uint2 (&words)[S::kAtOnce][S::kOwnRows]) const {
    const unsigned char* from = stages_ + stage * S::kStage;
#pragma unroll
    for (int i = 0; i < S::kOwnRows; ++i) {
      const int at = static_cast<int>(threadIdx.x % 32 / 4) * S::kOwnRows + i;
#pragma unroll
      for (int c = 0; c < S::kAtOnce; ++c) {
        words[c][i] = *reinterpret_cast<const uint2*>(from + at * 128 + moved(first + c, at) * 32 +
                                                      threadIdx.x % 4 * 8);
      }
    }
  }

 private:
  static constexpr int kCopies = S::kRows / 4;

  static __device__ __forceinline__ int row() { return threadIdx.x % 32 / 8; }
  // Where the 32 bytes of a chunk lie in its row.
  static __device__ __forceinline__ int moved(int chunk, int row) {
    return chunk ^ (row / S::kOwnRows % 4);
  }
  __device__ __forceinline__ void enter(const FewCta<S>& cta) {
    if (at_.tile >= cta.tiles) return;
    const OwnTile own = cta.own(at_.tile);
    const TileArguments& p = own.p;
    const int64_t first = own.tile * S::kRows;
    const int64_t rows = p.n - first;
    rows_left_ = rows < S::kRows ? static_cast<int>(rows) : S::kRows;
    const int64_t row_bytes = p.k / 2;
    four_rows_ = 4 * row_bytes;
    from_ = p.packed + (first + row()) * row_bytes + at_.unit * kUnitBytes + threadIdx.x % 8 * 16;
  }

  Unit<S> at_;
  unsigned char* stages_;  // of this warp
  int rows_left_;
  int64_t four_rows_;
  const uint8_t* from_;
};

// The scales of a unit, loaded a unit ahead. Lane t of a quad has those of the quad's row t for the
// four chunks.
template <typename S>
class FewScales {
 public:
  __device__ __forceinline__ void load(const FewCta<S>& cta, const Unit<S>& at) {
    static_assert(S::kOwnRows == 4);
    if (at.tile >= cta.tiles) return;
    const OwnTile own = cta.own(at.tile);
    const TileArguments& p = own.p;
    const int64_t row = own.tile * S::kRows + threadIdx.x % 32;
    // Rows past the last take its scales; nothing reads what comes of them.
    const int64_t chunk = (row < p.n ? row : p.n - 1) * (p.k / kChunk) + at.unit * kUnitChunks;
    const int shift = p.log2_block - kLog2Chunk;
    is_nested_ = p.scales.nested_absmax != nullptr;
    const auto* codes = static_cast<const uint8_t*>(p.scales.absmax);
    const auto* absmax = static_cast<const float*>(p.scales.absmax);
    if (is_nested_) {
      offset_ = p.scales.offset[0];
      // Of four blocks in a row all or none begin a nested block.
      nested_ = p.scales.nested_absmax[(chunk >> shift) / NF4_NESTED_BLOCK_SIZE];
      if (shift == 0) {
        const uint32_t four = *reinterpret_cast<const uint32_t*>(codes + chunk);
#pragma unroll
        for (int c = 0; c < 4; ++c) raw_[c] = four >> 8 * c & 0xff;
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) raw_[c] = codes[(chunk + c) >> shift];
      }
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) raw_[c] = __float_as_uint(absmax[(chunk + c) >> shift]);
    }
  }
  __device__ __forceinline__ void decode(const float* map, float (&scale)[kUnitChunks]) const {
#pragma unroll
    for (int c = 0; c < kUnitChunks; ++c) {
      scale[c] = is_nested_ ? map[raw_[c]] * nested_ + offset_ : __uint_as_float(raw_[c]);
    }
  }

 private:
  static constexpr int kLog2Chunk = 6;
  static_assert(1 << kLog2Chunk == kChunk);

  bool is_nested_ = false;
  float offset_ = 0.0f, nested_ = 0.0f;
  uint32_t raw_[kUnitChunks] = {};
};

// The table of linear_tile.cuh at a multiple of its size, as one lane sees it.
class PairTable {
 public:
  __device__ __forceinline__ explicit PairTable(const uint32_t* words)
#if defined(NF4_EMULATE)
      : words_(words){}
#else
      : column_(shared_address(words) + threadIdx.x % 32 * 4) {
  }
#endif
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
#if defined(NF4_EMULATE)
  const uint32_t* words_;
#else
  uint32_t column_;
#endif
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
#if !defined(NF4_PLANT_MISSING_STAGE_BARRIER)
        __syncwarp();  // all lanes have left the stage
#endif
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
  wait_for_previous();
  let_next_begin();
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
