// How linear_few.cuh cuts the work of a CTA, and brings its bytes and scales.
#pragma once

#include "linear_tile.cuh"
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

}  // namespace nf4::cuda
