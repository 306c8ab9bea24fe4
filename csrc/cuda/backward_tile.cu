// dx = grad_y W on tensor cores, from the same bytes: no transposed copy of the weight.
//
// mma.m16n8k16 with 16 columns k of W as the rows of the first operand and the reduction over n.
// A byte holds two neighbours in k, and an operand register two neighbours in n: two byte
// permutations turn the decoded bytes of rows n and n + 1 into the registers of k and k + 1. Row g
// of a fragment is k = 2g, row g + 8 is 2g + 1. Scales change along the reduction, so a weight is
// decoded as dequantize does it: float32 product, one rounding.
#include "launch.cuh"
#include "matmul.cuh"
#include "schedule.cuh"
#include "shared.cuh"
#include "up.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr int kStep = 32;         // elements of n a step: 8 for each lane of a quad
constexpr int kWarpColumns = 64;  // elements of k a warp: one scale for each n
constexpr int kChunk = 64;

template <int kWarpsColumn_, int kWarpsToken_, int kTokenTiles_, int kStages_, bool kManyTokens_>
struct Shape {
  static constexpr int kWarpsColumn = kWarpsColumn_, kWarpsToken = kWarpsToken_;
  static constexpr int kRowTiles = kWarpColumns / 16, kTokenTiles = kTokenTiles_;  // of a warp
  static constexpr int kStages = kStages_;
  static constexpr bool kManyTokens = kManyTokens_;  // more than one token tile
  static constexpr int kThreads = 32 * kWarpsColumn * kWarpsToken;
  static constexpr int kColumns = kWarpColumns * kWarpsColumn;
  static constexpr int kTokens = 8 * kTokenTiles * kWarpsToken;
  // The pad puts rows n, n + 8, n + 16, n + 24, which a warp reads at once, in different banks.
  static constexpr int kWeightRow = kColumns / 2 + 32;
  static constexpr int kWeightStage = kStep * kWeightRow;
  static constexpr int kTokenStage = kTokens * kStep * 2;
  static constexpr int kTable = 256 * 16 * 8;
  static constexpr int kMap = 256 * 4;
  static constexpr int kShared = kTable + kMap + kStages * (kWeightStage + kTokenStage);
  static constexpr int kPartial = kColumns * kTokens;  // floats of one partial result
};

using Tokens32 = Shape<8, 1, 4, 4, false>;  // 512 x 32
using Tokens128 = Shape<4, 2, 8, 4, true>;  // 256 x 128
using Small = Shape<4, 2, 8, 2, true>;      // the same in the 64 KiB of sm_75

struct Arguments {
  const void* grad_y;
  const uint8_t* packed;
  Scales scales;
  void* dx;
  float* partial;
  int64_t m, n, k;
  int log2_block;
  Up up;
  Schedule schedule;
  int64_t column_tiles, token_tiles;
};

template <typename S>
__device__ __forceinline__ TilePosition position(const Arguments& p, int64_t tile) {
  if constexpr (!S::kManyTokens) return {tile, 0};
  return tile_position(tile, p.column_tiles, p.token_tiles);
}

// Where the fragments of this thread lie: eight consecutive columns from `column(0, 0)`.
template <typename S>
struct Place {
  int64_t column_base, token_base;  // of the warp
  int g, t;

  __device__ Place(const Arguments& p, int64_t tile) {
    const TilePosition at = position<S>(p, tile);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    g = lane / 4;
    t = lane % 4;
    column_base = at.row_tile * S::kColumns + warp / S::kWarpsToken * kWarpColumns;
    token_base = at.token_tile * S::kTokens + warp % S::kWarpsToken * (8 * S::kTokenTiles);
  }
  __device__ int64_t first_token() const { return token_base + 2 * t; }
  __device__ int64_t column(int rt, int half) const { return column_base + 8 * g + 2 * rt + half; }
};

// Starts the copies of one step after the other: weights as [row position][columns / 2], where row
// n of a step lies at position n % 8 * 4 + n / 8; grad_y as [token][32 elements].
template <typename T, typename S>
class Loader {
 public:
  __device__ Loader(const Arguments& p, int64_t cta) : at_(p.schedule, cta) { enter_tile(p); }

  __device__ __forceinline__ void load(const Arguments& p, unsigned char* weights,
                                       unsigned char* tokens) {
    const uint8_t* weight = weight_;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int row = threadIdx.x / kPieces + i * kWeightRows;
      cp_async16(weights + (row % 8 * 4 + row / 8) * S::kWeightRow + threadIdx.x % kPieces * 16,
                 weight, columns_inside_ && n_ + row < p.n ? 16 : 0);
      weight += kWeightRows * (p.k / 2);
    }
    const bool inside = n_ + threadIdx.x % 4 * 8 < p.n;
    const T* token = token_;
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const int row = threadIdx.x / 4 + i * kTokenRows;
      if (row < S::kTokens) {
        cp_async16(tokens + row * (kStep * 2) + threadIdx.x % 4 * 16, token,
                   inside && row < tokens_left_ ? 16 : 0);
      }
      token += kTokenRows * p.n;
    }
    at_.advance();
    if (at_.step == 0) {
      enter_tile(p);
    } else {
      n_ += kStep;
      weight_ += kStep * (p.k / 2);
      token_ += kStep;
    }
  }

 private:
  static constexpr int kPieces = S::kColumns / 32;  // 16 bytes of a weight row
  static constexpr int kWeightRows = S::kThreads / kPieces;
  static constexpr int kWeightCopies = kStep / kWeightRows;
  static constexpr int kTokenRows = S::kThreads / 4;
  static constexpr int kTokenCopies = (S::kTokens + kTokenRows - 1) / kTokenRows;
  static_assert(kWeightCopies * kWeightRows == kStep);

  __device__ __forceinline__ void enter_tile(const Arguments& p) {
    const TilePosition tile = position<S>(p, at_.tile);
    n_ = static_cast<int64_t>(at_.step) * kStep;
    const int64_t column = tile.row_tile * S::kColumns + threadIdx.x % kPieces * 32;
    columns_inside_ = column < p.k;
    const int64_t first_token = tile.token_tile * S::kTokens;
    const int64_t tokens = p.m - first_token;
    tokens_left_ = tokens < S::kTokens ? static_cast<int>(tokens) : S::kTokens;
    weight_ = p.packed + (n_ + threadIdx.x / kPieces) * (p.k / 2) + column / 2;
    token_ = static_cast<const T*>(p.grad_y) + (first_token + threadIdx.x / 4) * p.n + n_ +
             threadIdx.x % 4 * 8;
  }

  Cursor at_;
  int64_t n_;
  int tokens_left_;
  bool columns_inside_;
  const uint8_t* weight_;
  const T* token_;
};

// The scale of row n = 8t + g of each step, loaded a step ahead; lanes exchange them.
template <typename S>
class TileScales {
 public:
  __device__ __forceinline__ TileScales(const Arguments& p, const Place<S>& place, int step) {
    n_ = static_cast<int64_t>(step) * kStep + 8 * place.t + place.g;
    inside_ = place.column_base < p.k;
    flat_ = n_ * p.k + place.column_base;
  }
  __device__ __forceinline__ void load(const Arguments& p) {
    raw_ = 0;
    nested_ = 0.0f;
    if (inside_ && n_ < p.n) {
      const int64_t block = flat_ >> p.log2_block;
      if (p.scales.nested_absmax == nullptr) {
        raw_ = static_cast<const uint32_t*>(p.scales.absmax)[block];
      } else {
        raw_ = static_cast<const uint8_t*>(p.scales.absmax)[block];
        nested_ = p.scales.nested_absmax[block / NF4_NESTED_BLOCK_SIZE];
      }
    }
    n_ += kStep;
    flat_ += kStep * p.k;
  }
  __device__ __forceinline__ float decode(const float* map, float offset, bool is_nested) const {
    return is_nested ? map[raw_] * nested_ + offset : __uint_as_float(raw_);
  }

 private:
  int64_t n_, flat_;
  bool inside_;
  uint32_t raw_;
  float nested_;
};

template <typename T, typename S>
__device__ __forceinline__ void compute_step(float (&acc)[S::kRowTiles][S::kTokenTiles][4],
                                             const float2* table, const unsigned char* weights,
                                             const unsigned char* tokens, float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const unsigned char* words = weights + t * S::kWeightRow + warp / S::kWarpsToken * 32 + g * 4;
  const int token = warp % S::kWarpsToken * (8 * S::kTokenTiles) + g;
  const uint32_t column = lane % 16 * 8;
  uint4 b[S::kTokenTiles];
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
    b[tt] = *reinterpret_cast<const uint4*>(tokens + (token + tt * 8) * (kStep * 2) + t * 16);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t word[4];
    float s[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      word[j] = *reinterpret_cast<const uint32_t*>(words + (half * 4 + j) * 4 * S::kWeightRow);
      s[j] = __shfl_sync(0xffffffffu, scale, (half * 4 + j) * 4 + t);
    }
#pragma unroll
    for (int rt = 0; rt < S::kRowTiles; ++rt) {
      uint32_t pair[4];  // (k, k + 1) of rows n to n + 3
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t shifted = rt == 0 ? word[j] << 7 : word[j] >> (8 * rt - 7);
        const float2 codes = *reinterpret_cast<const float2*>(
            reinterpret_cast<const unsigned char*>(table) + and_or(shifted, 0x7f80, column));
        pair[j] = pack2<T>(codes.x * s[j], codes.y * s[j]);
      }
      const uint32_t a[4] = {
          __byte_perm(pair[0], pair[1], 0x5410), __byte_perm(pair[0], pair[1], 0x7632),
          __byte_perm(pair[2], pair[3], 0x5410), __byte_perm(pair[2], pair[3], 0x7632)};
#pragma unroll
      for (int tt = 0; tt < S::kTokenTiles; ++tt) {
        const uint32_t x[2] = {half == 0 ? b[tt].x : b[tt].z, half == 0 ? b[tt].y : b[tt].w};
        mma_m16n8k16<T>(acc[rt][tt], a, x);
      }
    }
  }
}

// acc = dropout(ds a): before the main loop, so that the mask does not touch grad_y W.
template <typename T, typename S>
__device__ __forceinline__ void start_with_lora(float (&acc)[S::kRowTiles][S::kTokenTiles][4],
                                                const Arguments& p, const Place<S>& place) {
  add_up<T, true>(
      acc, p.up, p.k, p.m, [&](int rt, int half) { return place.column(rt, half); },
      [&](int tt) { return place.token_base + tt * 8 + place.g; });
  if (p.up.dropout.seed == nullptr) return;
  const int64_t seed = *p.up.dropout.seed;
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t first = (place.first_token() + tt * 8 + e) * p.k + place.column(0, 0);
#pragma unroll
      for (int quarter = 0; quarter < 2; ++quarter) {
        float mask[4];
        dropout4_aligned(p.up.dropout, seed, first + 4 * quarter, mask);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[2 * quarter + i / 2][tt][i % 2 * 2 + e] *= mask[i];
      }
    }
  }
}

template <typename T, typename S>
__device__ __forceinline__ void store_tile(const float (&acc)[S::kRowTiles][S::kTokenTiles][4],
                                           const Arguments& p, const Place<S>& place) {
  const int64_t column = place.column(0, 0);
  if (column >= p.k) return;
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t token = place.first_token() + tt * 8 + e;
      if (token >= p.m) continue;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = acc[i / 2][tt][i % 2 * 2 + e];
      store8(static_cast<T*>(p.dx) + token * p.k + column, v);
    }
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    backward_tile_kernel(const Arguments p, int format) {
  Carve carve;
  float2* table = carve.take<float2>(S::kTable / 8, 128);
  float* map = carve.take<float>(S::kMap / 4);
  unsigned char* weights = carve.take<unsigned char>(S::kStages * S::kWeightStage);
  unsigned char* tokens = carve.take<unsigned char>(S::kStages * S::kTokenStage);

  const int64_t cta = blockIdx.x;
  const int64_t count = p.schedule.count(cta);
  Loader<T, S> loader(p, cta);
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) {
    if (stage < count) {
      loader.load(p, weights + stage * S::kWeightStage, tokens + stage * S::kTokenStage);
    }
    cp_async_commit();
  }
  for (int i = threadIdx.x; i < 256 * 16; i += S::kThreads) {
    table[i] = make_float2(kCodes4[format][i / 16 >> 4], kCodes4[format][i / 16 & 15]);
  }
  for (int i = threadIdx.x; i < 256; i += S::kThreads) map[i] = kCodes8[0][i];

  const bool is_nested = p.scales.nested_absmax != nullptr;
  const float offset = is_nested ? p.scales.offset[0] : 0.0f;
  Cursor at(p.schedule, cta);
  int stage = 0;
  for (int64_t done = 0; done < count;) {
    const Place<S> place(p, at.tile);
    const int64_t to_end = at.steps - at.step, to_leave = count - done;
    const int steps = static_cast<int>(to_end < to_leave ? to_end : to_leave);
    TileScales<S> scales(p, place, at.step);
    scales.load(p);
    float acc[S::kRowTiles][S::kTokenTiles][4] = {};
    if (at.step == 0 && p.up.left != nullptr) start_with_lora<T, S>(acc, p, place);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      cp_async_wait<S::kStages - 2>();
      __syncthreads();  // the stage has landed for all, and all have left the one loaded next
      if (done + i + S::kStages - 1 < count) {
        const int to = stage == 0 ? S::kStages - 1 : stage - 1;
        loader.load(p, weights + to * S::kWeightStage, tokens + to * S::kTokenStage);
      }
      cp_async_commit();
      const float scale = scales.decode(map, offset, is_nested);
      if (i + 1 < steps) scales.load(p);
      compute_step<T, S>(acc, table, weights + stage * S::kWeightStage,
                         tokens + stage * S::kTokenStage, scale);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    if (steps == at.steps) {
      store_tile<T, S>(acc, p, place);
    } else {
      store_partial<S>(acc, p.partial, partial_slot(cta, at.step != 0), place.first_token(), p.m);
    }
    done += steps;
    at.leave();
  }
  cp_async_wait<0>();
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads) backward_sum_kernel(const Arguments p) {
  float acc[S::kRowTiles][S::kTokenTiles][4] = {};
  const int64_t tile = blockIdx.x;
  const Place<S> place(p, tile);
  if (sum_partials<S>(acc, p.schedule, p.partial, tile, place.first_token(), p.m)) {
    store_tile<T, S>(acc, p, place);
  }
}

// Calls `body(T(), Shape())` for the kernel that takes the problem.
template <typename Body>
auto with_kernel(const Matmul& p, const Body& body) {
  const auto by_shape = [&](auto element) {
    if (device().compute_capability < 80) return body(element, Small());
    return p.m <= 32 ? body(element, Tokens32()) : body(element, Tokens128());
  };
  return p.dtype == NF4_FLOAT16 ? by_shape(__half()) : by_shape(__nv_bfloat16());
}

template <typename S>
Arguments arguments(const Matmul& p, void* workspace) {
  const nf4_weight& w = p.weight;
  const int64_t column_tiles = (w.k + S::kColumns - 1) / S::kColumns;
  const int64_t token_tiles = (p.m + S::kTokens - 1) / S::kTokens;
  return {p.in,
          w.packed,
          scales_of(w),
          p.out,
          static_cast<float*>(workspace),
          p.m,
          w.n,
          w.k,
          log2_of(w.block_size),
          p.up,
          make_schedule(column_tiles * token_tiles, (w.n + kStep - 1) / kStep, 1),
          column_tiles,
          token_tiles};
}

}  // namespace

bool tile_backward_takes(const Matmul& p) {
  const nf4_weight& w = p.weight;
  if (!is_4bit(w.format) || w.block_size < kChunk || w.k % kChunk != 0 || w.n % 8 != 0)
    return false;
  if (p.dtype != NF4_FLOAT16 && p.dtype != NF4_BFLOAT16) return false;
  if (p.dtype == NF4_BFLOAT16 && device().compute_capability < 80) return false;
  return p.m > 0 && w.n > 0 && w.k > 0 && aligned16(p.in) && aligned16(w.packed) &&
         aligned16(p.out);
}

size_t tile_backward_workspace(const Matmul& p) {
  return with_kernel(p, [&](auto, auto shape) -> size_t {
    using S = decltype(shape);
    const Schedule s = arguments<S>(p, nullptr).schedule;
    return s.whole_tiles ? 0 : 2 * s.ctas * sizeof(float) * S::kPartial;
  });
}

int tile_backward(const Matmul& p, void* workspace, cudaStream_t stream) {
  return with_kernel(p, [&](auto element, auto shape) -> int {
    using T = decltype(element);
    using S = decltype(shape);
    const Arguments a = arguments<S>(p, workspace);
    const int status = launch(backward_tile_kernel<T, S>, dim3(a.schedule.ctas), dim3(S::kThreads),
                              S::kShared, stream, a, p.weight.format);
    if (status != 0 || a.schedule.whole_tiles) return status;
    return launch(backward_sum_kernel<T, S>, dim3(static_cast<unsigned>(a.schedule.tiles)),
                  dim3(S::kThreads), 0, stream, a);
  });
}

}  // namespace nf4::cuda
