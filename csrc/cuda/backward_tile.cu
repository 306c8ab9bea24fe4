// dx = grad_y W on tensor cores, from the same bytes: no transposed copy of the weight.
//
// mma.m16n8k16 with 16 columns k of W as the rows of the first operand and the reduction over n.
// A byte holds two neighbours in k, and an operand register two neighbours in n: two byte
// permutations turn the decoded bytes of rows n and n + 1 into the registers of k and k + 1. Row g
// of a fragment is k = 2g, row g + 8 is 2g + 1. Scales change along the reduction, so a weight is
// decoded as dequantize does it: float32 product, one rounding.
#include "tile.cuh"
#include "up.cuh"

namespace nf4::cuda {
namespace {

constexpr int kWarpColumns = 64;  // elements of k a warp: one scale for each n

template <int kWarpsColumn_, int kWarpsToken_, int kTokenTiles_, int kStages_, bool kManyTokens_>
struct Shape {
  static constexpr int kWarpsColumn = kWarpsColumn_, kWarpsToken = kWarpsToken_;
  static constexpr int kRowTiles = kWarpColumns / 16, kTokenTiles = kTokenTiles_;  // of a warp
  static constexpr int kStages = kStages_, kCtasPerSm = 1;
  static constexpr bool kManyTokens = kManyTokens_;  // more than one token tile
  static constexpr int kStep = 32;  // elements of n a step: 8 for each lane of a quad
  static constexpr int kThreads = 32 * kWarpsColumn * kWarpsToken;
  static constexpr int kWarpRows = kWarpColumns;
  static constexpr int kRows = kWarpColumns * kWarpsColumn;
  static constexpr int kTokens = 8 * kTokenTiles * kWarpsToken;
  // The pad puts rows n, n + 8, n + 16, n + 24, which a warp reads at once, in different banks.
  static constexpr int kWeightRow = kRows / 2 + 32;
  static constexpr int kWeightStage = kStep * kWeightRow;
  static constexpr int kTokenStage = kTokens * kStep * 2;
  static constexpr int kTable = 256 * 16 * 8;
  static constexpr int kMap = 256 * 4;
  static constexpr int kShared = kTable + kMap + kStages * (kWeightStage + kTokenStage);
  static constexpr int kPartial = kRows * kTokens;  // floats of one partial result
};

using Tokens32 = Shape<8, 1, 4, 4, false>;  // 512 x 32
using Tokens128 = Shape<4, 2, 8, 4, true>;  // 256 x 128
using Small = Shape<4, 2, 8, 2, true>;      // the same in the 64 KiB of sm_75

// Starts the copies of one step after the other: weights as [row position][columns / 2], where row
// n of a step lies at position n % 8 * 4 + n / 8; grad_y as [token][32 elements].
template <typename T, typename S>
class BackwardLoader {
 public:
  __device__ BackwardLoader(const TileArguments& p, int64_t cta) : at_(p.schedule, cta) {
    enter_tile(p);
  }

  __device__ __forceinline__ void load(const TileArguments& p, unsigned char* weights,
                                       unsigned char* tokens) {
    const int64_t n = first_n();
    const uint8_t* weight = weight_;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int row = threadIdx.x / kPieces + i * kWeightRows;
      cp_async16(weights + (row % 8 * 4 + row / 8) * S::kWeightRow + threadIdx.x % kPieces * 16,
                 weight, columns_inside_ && n + row < p.n ? 16 : 0);
      weight += kWeightRows * (p.k / 2);
    }
    const bool inside = n + threadIdx.x % 4 * 8 < p.n;
    const T* token = token_;
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const int row = threadIdx.x / 4 + i * kTokenRows;
      if (row < S::kTokens) {
        cp_async16(tokens + row * (S::kStep * 2) + threadIdx.x % 4 * 16, token,
                   inside && row < tokens_left_ ? 16 : 0);
      }
      token += kTokenRows * p.n;
    }
    at_.advance();
    if (at_.step == 0) {
      enter_tile(p);
    } else {
      weight_ += S::kStep * (p.k / 2);
      token_ += S::kStep;
    }
  }

 private:
  static constexpr int kPieces = S::kRows / 32;  // 16 bytes of a weight row
  static constexpr int kWeightRows = S::kThreads / kPieces;
  static constexpr int kWeightCopies = S::kStep / kWeightRows;
  static constexpr int kTokenRows = S::kThreads / 4;
  static constexpr int kTokenCopies = (S::kTokens + kTokenRows - 1) / kTokenRows;
  static_assert(kWeightCopies * kWeightRows == S::kStep);

  __device__ __forceinline__ int64_t first_n() const {
    return static_cast<int64_t>(at_.step) * S::kStep;
  }
  __device__ __forceinline__ void enter_tile(const TileArguments& p) {
    const TilePosition tile = position<S>(p, at_.tile);
    const int64_t column = tile.row_tile * S::kRows + threadIdx.x % kPieces * 32;
    columns_inside_ = column < p.k;
    const int64_t first_token = tile.token_tile * S::kTokens;
    const int64_t tokens = p.m - first_token;
    tokens_left_ = tokens < S::kTokens ? static_cast<int>(tokens) : S::kTokens;
    weight_ = p.packed + (first_n() + threadIdx.x / kPieces) * (p.k / 2) + column / 2;
    token_ = static_cast<const T*>(p.in) + (first_token + threadIdx.x / 4) * p.n + first_n() +
             threadIdx.x % 4 * 8;
  }

  Cursor at_;
  int tokens_left_;
  bool columns_inside_;
  const uint8_t* weight_;
  const T* token_;
};

// The scale of row n = 8t + g of each step, loaded a step ahead; lanes exchange them.
template <typename S>
class BackwardScales {
 public:
  __device__ __forceinline__ BackwardScales(const TileArguments& p, const Place<S>& place,
                                            int step) {
    inside_ = place.row_base() < p.k;
    flat_ = (static_cast<int64_t>(step) * S::kStep + row()) * p.k + place.row_base();
  }
  // Of the step after the one before.
  __device__ __forceinline__ void load(const TileArguments& p, int step) {
    raw_.clear();
    const bool inside = static_cast<int64_t>(step) * S::kStep + row() < p.n;
    if (inside_ && inside) raw_.load(p.scales, flat_ >> p.log2_block);
    flat_ += S::kStep * p.k;
  }
  __device__ __forceinline__ void decode(const float* map, float offset, bool is_nested,
                                         float& scale) const {
    scale = raw_.decode(map, offset, is_nested);
  }

 private:
  // Of a step, as the lane has it.
  static __device__ __forceinline__ int row() { return threadIdx.x % 4 * 8 + threadIdx.x % 32 / 4; }
  int64_t flat_;
  bool inside_;
  RawScale raw_;
};

template <typename T, typename S>
__device__ __forceinline__ void compute_step(Accumulators<S>& acc, const float2* table,
                                             const unsigned char* weights,
                                             const unsigned char* tokens, float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const unsigned char* words = weights + t * S::kWeightRow + warp / S::kWarpsToken * 32 + g * 4;
  const int token = warp % S::kWarpsToken * (8 * S::kTokenTiles) + g;
  const uint32_t column = lane % 16 * 8;
  uint4 b[S::kTokenTiles];
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
    b[tt] = *reinterpret_cast<const uint4*>(tokens + (token + tt * 8) * (S::kStep * 2) + t * 16);
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
__device__ __forceinline__ void start_with_lora(Accumulators<S>& acc, const TileArguments& p,
                                                const Place<S>& place) {
  add_up<T, true>(
      acc, p.up, p.k, p.m, [&](int rt, int half) { return place.row(rt, half); },
      [&](int tt) { return place.token_base() + tt * 8 + place.g; });
  if (p.up.dropout.seed == nullptr) return;
  const int64_t seed = *p.up.dropout.seed;
#pragma unroll
  for (int tt = 0; tt < S::kTokenTiles; ++tt) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t token = place.first_token() + tt * 8 + e;
      // A branch a token also keeps the compiler from weaving all masks together, for which it has
      // no registers.
      if (token >= p.m) continue;
      const int64_t first = token * p.k + place.row(0, 0);
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
__device__ __forceinline__ void store_tile(const Accumulators<S>& acc, const TileArguments& p,
                                           const Place<S>& place) {
  const int64_t column = place.row(0, 0);
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
      store8(static_cast<T*>(p.out) + token * p.k + column, v);
    }
  }
}

template <typename T, typename S_>
struct Backward {
  using S = S_;
  using Entry = float2;
  using Loader = BackwardLoader<T, S>;
  using TileScales = BackwardScales<S>;
  using Scale = float;

  // 16 copies of each pair.
  static __device__ __forceinline__ void fill_table(float2* table, int format) {
    for (int i = threadIdx.x; i < 256 * 16; i += S::kThreads) {
      table[i] = make_float2(kCodes4[format][i / 16 >> 4], kCodes4[format][i / 16 & 15]);
    }
  }
  static __device__ __forceinline__ void start(Accumulators<S>& acc, const TileArguments& p,
                                               const Place<S>& place) {
    if (p.up.left != nullptr) start_with_lora<T, S>(acc, p, place);
  }
  static __device__ __forceinline__ void step(Accumulators<S>& acc, const float2* table,
                                              const unsigned char* weights,
                                              const unsigned char* tokens, float scale) {
    compute_step<T, S>(acc, table, weights, tokens, scale);
  }
  static __device__ __forceinline__ void finish(Accumulators<S>&, const TileArguments&,
                                                const Place<S>&) {}
  static __device__ __forceinline__ void store(const Accumulators<S>& acc, const TileArguments& p,
                                               const Place<S>& place) {
    store_tile<T, S>(acc, p, place);
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kCtasPerSm)
    backward_tile_kernel(const TileArguments p, int format) {
  run_tiles<Backward<T, S>>(p, format, [](float*, int*) {});
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads) backward_sum_kernel(const TileArguments p) {
  run_sums<Backward<T, S>>(p);
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

}  // namespace

bool tile_backward_takes(const Matmul& p) { return tiles_take(p) && p.weight.n % 8 == 0; }

size_t tile_backward_workspace(const Matmul& p) {
  return with_kernel(p, [&](auto, auto shape) -> size_t {
    using S = decltype(shape);
    return partial_bytes<S>(tile_arguments<S>(p, p.weight.k, p.weight.n, nullptr).schedule);
  });
}

int tile_backward(const Matmul& p, void* workspace, cudaStream_t stream) {
  return with_kernel(p, [&](auto element, auto shape) -> int {
    using T = decltype(element);
    using S = decltype(shape);
    const TileArguments a = tile_arguments<S>(p, p.weight.k, p.weight.n, workspace);
    return launch_tiles<S>(backward_tile_kernel<T, S>, backward_sum_kernel<T, S>, a, a.schedule,
                           p.weight.format, stream);
  });
}

}  // namespace nf4::cuda
