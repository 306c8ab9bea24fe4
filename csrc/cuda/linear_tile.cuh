// y = x W^T on tensor cores, weights decoded in registers; from one token to any number. Few
// tokens go to linear_few.cuh where it takes the weight and fits the device.
//
// mma.m16n8k16 with the weights as the 16-row operand and tokens as the 8 columns. The byte layout
// of the weights is left as it is: K is permuted instead, in both operands alike. Of each 32
// elements of a row, lane t of a quad owns the 8 from 8t on: 4 bytes, which are 4 fragment
// registers, because a byte of two codes becomes two packed elements by one look-up. The table of
// 256 pairs has 32 copies, one per lane, so that no look-up meets another in a bank. Scales
// multiply the float32 sum of each 64-element chunk, and so add no rounding to a weight.
#pragma once

#include "lora_down.cuh"
#include "tile.cuh"
#include "up.cuh"

namespace nf4::cuda {

constexpr int kChunk = 64;  // elements of K under one scale

template <int kWarpsRow_, int kWarpsToken_, int kRowTiles_, int kTokenTiles_, int kChunks_,
          int kStages_, int kCtasPerSm_, bool kManyTokens_>
struct ForwardShape {
  static constexpr int kWarpsRow = kWarpsRow_, kWarpsToken = kWarpsToken_;
  static constexpr int kRowTiles = kRowTiles_, kTokenTiles = kTokenTiles_;  // of a warp
  static constexpr int kChunks = kChunks_;                                  // of a step
  static constexpr int kStages = kStages_, kCtasPerSm = kCtasPerSm_;
  static constexpr bool kManyTokens = kManyTokens_;  // more than one token tile
  static constexpr int kThreads = 32 * kWarpsRow * kWarpsToken;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarpRows * kWarpsRow;
  static constexpr int kTokens = 8 * kTokenTiles * kWarpsToken;
  static constexpr int kStep = kChunk * kChunks;
  // A step is cut into pieces of 32 elements: 16 bytes of a weight row, 64 of a token. The pad
  // keeps the asynchronous copies of consecutive pieces in different banks.
  static constexpr int kPieces = 2 * kChunks;
  static constexpr int kWeightPiece = kRows * 16 + 16;
  static constexpr int kTokenPiece = kTokens * 64 + 64;
  static constexpr int kWeightStage = kPieces * kWeightPiece;
  static constexpr int kTokenStage = kPieces * kTokenPiece;
  static constexpr int kTable = 256 * 32 * 4;
  static constexpr int kMap = 256 * 4;
  static constexpr int kShared = kTable + kMap + kStages * (kWeightStage + kTokenStage);
  static constexpr int kPartial = kRows * kTokens;  // floats of one partial result
};

// rows x tokens; the largest fits the 99 KiB of sm_86, sm_89 and sm_120, the last sm_75's 64 KiB.
using Tokens8 = ForwardShape<8, 1, 1, 1, 4, 3, 2, false>;   // 128 x 8
using Tokens16 = ForwardShape<8, 1, 1, 2, 4, 2, 2, false>;  // 128 x 16
using Tokens32 = ForwardShape<8, 1, 1, 4, 4, 2, 1, false>;  // 128 x 32
using Tokens64 = ForwardShape<4, 2, 2, 4, 1, 4, 1, false>;  // 128 x 64
using Tokens128 = ForwardShape<4, 2, 2, 8, 1, 3, 1, true>;  // 128 x 128
using Small = ForwardShape<4, 2, 2, 4, 1, 2, 1, true>;      // 128 x 64, two stages

// The position in shared memory of row `row` of a CTA tile, undoing the permutation.
template <typename S>
__device__ __forceinline__ int row_position(int row) {
  const int within = row % S::kWarpRows;
  const int g = within / (2 * S::kRowTiles), rest = within % (2 * S::kRowTiles);
  return row - within + rest / 2 * 16 + rest % 2 * 8 + g;
}

// Starts the copies of one step after the other: weights as [piece][row][16 bytes], tokens as
// [piece][token][lane of the quad][16 bytes]. A thread always copies the same piece of rows a fixed
// distance apart, so only a new tile costs index arithmetic.
template <typename T, typename S>
class ForwardLoader {
 public:
  template <typename Arguments>
  __device__ ForwardLoader(const Arguments& all, int64_t cta)
      : at_(shared_part(all).schedule, cta) {
    enter_tile(all);
  }

  template <typename Arguments>
  __device__ __forceinline__ void load(const Arguments& all, unsigned char* weights,
                                       unsigned char* tokens) {
    const TileArguments& p = shared_part(all);
    const bool weight_k = k_ + kWeightK() < p.k;
    unsigned char* weight_to = weights + threadIdx.x % S::kPieces * S::kWeightPiece;
    const uint8_t* weight = weight_;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int row = threadIdx.x / S::kPieces + i * kWeightRows;
      cp_async16(weight_to + row_position<S>(row) * 16, weight,
                 weight_k && row < rows_left_ ? 16 : 0);
      weight += kWeightRows / 2 * p.k;
    }
    const bool token_k = k_ + kTokenK() < p.k;
    unsigned char* token_to = tokens + threadIdx.x % kParts / 4 * S::kTokenPiece;
    const T* token = token_;
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const int row = threadIdx.x / kParts + i * kTokenRows;
      cp_async16(token_to + (row * 4 + threadIdx.x % 4) * 16, token,
                 token_k && row < tokens_left_ ? 16 : 0);
      token += kTokenRows * p.k;
    }
    at_.advance();
    if (at_.step == 0) {
      enter_tile(all);
    } else {
      k_ += S::kStep;
      weight_ += S::kStep / 2;
      token_ += S::kStep;
    }
  }

 private:
  static constexpr int kParts = S::kPieces * 4;  // 16 bytes of a token
  static constexpr int kWeightRows = S::kThreads / S::kPieces;
  static constexpr int kWeightCopies = S::kRows / kWeightRows;
  static constexpr int kTokenRows = S::kThreads / kParts;
  static constexpr int kTokenCopies = S::kTokens / kTokenRows;
  static_assert(kWeightCopies * kWeightRows == S::kRows && kTokenCopies * kTokenRows == S::kTokens);

  static __device__ __forceinline__ int kWeightK() { return threadIdx.x % S::kPieces * 32; }
  static __device__ __forceinline__ int kTokenK() { return threadIdx.x % kParts * 8; }

  template <typename Arguments>
  __device__ __forceinline__ void enter_tile(const Arguments& all) {
    const OwnTile own = own_tile(all, at_.tile);
    const TileArguments& p = own.p;
    const TilePosition tile = position<S>(p, own.tile);
    k_ = static_cast<int64_t>(at_.step) * S::kStep;
    const int64_t rows = p.n - tile.row_tile * S::kRows;
    const int64_t tokens = p.m - tile.token_tile * S::kTokens;
    rows_left_ = rows < S::kRows ? static_cast<int>(rows) : S::kRows;
    tokens_left_ = tokens < S::kTokens ? static_cast<int>(tokens) : S::kTokens;
    const int64_t row = tile.row_tile * S::kRows + threadIdx.x / S::kPieces;
    const int64_t token = tile.token_tile * S::kTokens + threadIdx.x / kParts;
    weight_ = p.packed + (row * p.k + k_ + kWeightK()) / 2;
    token_ = static_cast<const T*>(p.in) + token * p.k + k_ + kTokenK();
  }

  Cursor at_;
  int64_t k_;
  int rows_left_, tokens_left_;
  const uint8_t* weight_;
  const T* token_;
};

// The scales of the steps of one tile, loaded a step ahead: lane t of a quad holds chunk
// t % kChunks of each of the quad's rows.
template <typename S>
class ForwardScales {
 public:
  __device__ __forceinline__ ForwardScales(const TileArguments& p, const Place<S>& place,
                                           int step) {
    k_ = static_cast<int64_t>(step) * S::kStep + threadIdx.x % 4 % S::kChunks * kChunk;
    flat_ = place.row(0, 0) * p.k + k_;
    const int64_t rows = p.n - place.row(0, 0);
    rows_left_ = rows < 0 ? 0 : rows < 2 * S::kRowTiles ? static_cast<int>(rows) : 2 * S::kRowTiles;
  }
  // Of the step after the one before.
  __device__ __forceinline__ void load(const TileArguments& p, int) {
#pragma unroll
    for (int i = 0; i < 2 * S::kRowTiles; ++i) {
      raw_[i].clear();
      if (i >= rows_left_ || k_ >= p.k) continue;
      raw_[i].load(p.scales, (flat_ + i * p.k) >> p.log2_block);
    }
    k_ += S::kStep;
    flat_ += S::kStep;
  }
  __device__ __forceinline__ void decode(const float* map, float offset, bool is_nested,
                                         float (&scale)[S::kRowTiles][2]) const {
#pragma unroll
    for (int i = 0; i < 2 * S::kRowTiles; ++i) {
      scale[i / 2][i % 2] = raw_[i].decode(map, offset, is_nested);
    }
  }

 private:
  int64_t k_, flat_;
  int rows_left_;
  RawScale raw_[2 * S::kRowTiles];
};

// One step of K on all fragments of the warp.
template <typename T, typename S>
__device__ __forceinline__ void compute_step(Accumulators<S>& acc, const uint32_t* table,
                                             const unsigned char* weights,
                                             const unsigned char* tokens,
                                             const float (&scale)[S::kRowTiles][2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / S::kWarpsToken * S::kWarpRows + lane / 4;
  const int token = warp % S::kWarpsToken * (8 * S::kTokenTiles);
  const uint32_t column = lane * 4;
  const auto pair = [&](uint32_t shifted) {  // bits 7 to 14 are the byte: 128 bytes a table row
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const unsigned char*>(table) +
                                              and_or(shifted, 0x7f80, column));
  };
#pragma unroll
  for (int chunk = 0; chunk < S::kChunks; ++chunk) {
    uint32_t a[S::kRowTiles][4][4];
    float s[S::kRowTiles][2];
#pragma unroll
    for (int rt = 0; rt < S::kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s[rt][half] = S::kChunks == 1
                          ? scale[rt][half]
                          : __shfl_sync(0xffffffffu, scale[rt][half], (lane & 28) + chunk);
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
          const uint32_t word =
              *reinterpret_cast<const uint32_t*>(weights + (2 * chunk + piece) * S::kWeightPiece +
                                                 (row + rt * 16 + half * 8) * 16 + lane % 4 * 4);
          a[rt][2 * piece][half] = pair(word << 7);
          a[rt][2 * piece][half + 2] = pair(word >> 1);
          a[rt][2 * piece + 1][half] = pair(word >> 9);
          a[rt][2 * piece + 1][half + 2] = pair(word >> 17);
        }
      }
    }
#pragma unroll
    for (int tt = 0; tt < S::kTokenTiles; ++tt) {
      float sum[S::kRowTiles][4] = {};
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const uint4 x =
            *reinterpret_cast<const uint4*>(tokens + (2 * chunk + piece) * S::kTokenPiece +
                                            ((token + tt * 8 + lane / 4) * 4 + lane % 4) * 16);
        const uint32_t first[2] = {x.x, x.y}, second[2] = {x.z, x.w};
#pragma unroll
        for (int rt = 0; rt < S::kRowTiles; ++rt) {
          mma_m16n8k16<T>(sum[rt], a[rt][2 * piece], first);
          mma_m16n8k16<T>(sum[rt], a[rt][2 * piece + 1], second);
        }
      }
#pragma unroll
      for (int rt = 0; rt < S::kRowTiles; ++rt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[rt][tt][i] = fmaf(sum[rt][i], s[rt][i / 2], acc[rt][tt][i]);
      }
    }
  }
}

// Adds the bias, rounds and stores the fragments of one tile.
template <typename T, typename S>
__device__ __forceinline__ void store_tile(const Accumulators<S>& acc, const TileArguments& p,
                                           const Place<S>& place) {
  auto* y = static_cast<T*>(p.out);
  float bias[2 * S::kRowTiles] = {};
  const int64_t first = place.row(0, 0);
#pragma unroll
  for (int i = 0; i < 2 * S::kRowTiles; ++i) {
    if (p.bias != nullptr && first + i < p.n) {
      bias[i] = to_float(static_cast<const T*>(p.bias)[first + i]);
    }
  }
  const bool pairs = p.n % 2 == 0;  // so that every pair is aligned
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t token = place.token_base() + tt * 8 + 2 * place.t + e;
      if (token >= p.m) continue;
#pragma unroll
      for (int rt = 0; rt < S::kRowTiles; ++rt) {
        const int64_t feature = first + 2 * rt;
        const float v0 = acc[rt][tt][e] + bias[2 * rt], v1 = acc[rt][tt][e + 2] + bias[2 * rt + 1];
        T* to = y + token * p.n + feature;
        if (pairs && feature < p.n) {
          *reinterpret_cast<uint32_t*>(to) = pack2<T>(v0, v1);
        } else {
          if (feature < p.n) to[0] = from_float<T>(v0);
          if (feature + 1 < p.n) to[1] = from_float<T>(v1);
        }
      }
    }
  }
}

template <typename T, typename S_>
struct Forward {
  using S = S_;
  using Entry = uint32_t;  // two packed elements
  using Loader = ForwardLoader<T, S>;
  using TileScales = ForwardScales<S>;
  using Scale = float[S::kRowTiles][2];

  // 32 copies of each pair.
  static __device__ __forceinline__ void fill_table(uint32_t* table, int format) {
    for (int i = threadIdx.x; i < 256 * 8; i += S::kThreads) {
      const uint32_t v = pack2<T>(kCodes4[format][i / 8 >> 4], kCodes4[format][i / 8 & 15]);
      reinterpret_cast<uint4*>(table)[i] = make_uint4(v, v, v, v);
    }
  }
  static __device__ __forceinline__ void start(Accumulators<S>&, const TileArguments&,
                                               const Place<S>&) {}
  static __device__ __forceinline__ void step(Accumulators<S>& acc, const uint32_t* table,
                                              const unsigned char* weights,
                                              const unsigned char* tokens, const Scale& scale) {
    compute_step<T, S>(acc, table, weights, tokens, scale);
  }
  static __device__ __forceinline__ void finish(Accumulators<S>& acc, const TileArguments& p,
                                                const Place<S>& place) {
    if (p.up.left == nullptr) return;
    if (p.tasks != 0) wait_for_tasks(p.counters, p.tasks);
    add_up<T, false>(
        acc, p.up, p.n, p.m, [&](int rt, int half) { return place.row(rt, half); },
        [&](int tt) { return place.token_base() + tt * 8 + place.g; });
  }
  static __device__ __forceinline__ void store(const Accumulators<S>& acc, const TileArguments& p,
                                               const Place<S>& place) {
    store_tile<T, S>(acc, p, place);
  }
};

// LoRA's down-projection before the tiles, in tasks of few tokens where few are all.
template <typename S>
constexpr int kDownTiles = S::kManyTokens ? 4 : 1;
template <typename T, typename S>
__device__ __forceinline__ void down_before(const DownWork& w, float* scratch, int* ticket) {
  static_assert(kDownScratch<kDownTiles<S>> * 4 <= S::kTable && S::kThreads >= 32 * kDownWarps);
  down_phase<T, kDownTiles<S>>(
      w, scratch, ticket,
      [](const Down& p, int64_t token, int rank, float value) {
        if (rank < p.r) p.out[token * p.r + rank] = value;
      },
      [] {});
}

// Workspace: the counters of the down-projection, then partial sums.
inline size_t counter_bytes(const Matmul& p) { return p.up.r > 0 ? kCounterBytes : 0; }

// Calls `body(T(), ForwardShape())` for the kernel that takes m tokens.
template <typename Body>
auto with_forward_shape(int64_t m, int dtype, const Body& body) {
  const auto by_shape = [&](auto element) {
    if (device().compute_capability < 80) return body(element, Small());
    if (m <= 8) return body(element, Tokens8());
    if (m <= 16) return body(element, Tokens16());
    if (m <= 32) return body(element, Tokens32());
    if (m <= 64) return body(element, Tokens64());
    return body(element, Tokens128());
  };
  return dtype == NF4_FLOAT16 ? by_shape(__half()) : by_shape(__nv_bfloat16());
}

}  // namespace nf4::cuda
