// dx = grad_y W on Hopper's warpgroup tensor cores (sm_90a), for many tokens.
//
// wgmma with grad_y as the 64-row operand and 256 columns of W; two warpgroups, 128 tokens a CTA. A
// producer thread keeps a ring of stages filled by TMA, 64 elements of n each. W comes as 16-bit
// weights that dequantize wrote to workspace, in their own order [n, k]: the reduction runs over
// the rows of that matrix, which wgmma reads as they are (shared_matrix_by_rows), so no transposed
// copy is made.
// LoRA comes first in a tile, because dropout masks its term alone: 32 ranks a step, ds as two
// 16-bit parts, a as two parts, and of their four products the three that matter. Then the sums are
// multiplied by the mask, and the steps of n follow. A CTA that joins a tile midway adds to it
// what has no mask.
#include "hopper_dx.cuh"
#include "launch.cuh"
#include "shared.cuh"
#include "tensor_map.cuh"
#include "up.cuh"

namespace nf4::cuda {
namespace {

using S = BackwardTile;

#if defined(NF4_HOPPER_CODE)

// One thread loads every step of this CTA's tiles, as soon as the consumers have left a stage.
__device__ __forceinline__ void produce(const BackwardArguments& p, unsigned char* tokens,
                                        unsigned char* weights, Mbarrier* full, Mbarrier* empty) {
  const int64_t cluster = blockIdx.x / S::kCluster;
  const int64_t count = p.schedule.count(cluster);
  Cursor at(p.schedule, cluster);
  Ring<S::kStages> ring;
  int token = 0, column = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || at.step == 0) {
      const TilePosition tile = tile_position(at.tile, p.column_tiles, p.token_tiles, p.band);
      const int64_t token_tile = tile.token_tile * S::kCluster + blockIdx.x % S::kCluster;
      token = static_cast<int>(token_tile * S::kTokens);
      column = static_cast<int>(tile.row_tile * S::kColumns);
    }
    const bool is_up = at.step < p.up_steps;
    const TensorMap& left = is_up ? p.left_map : p.token_map;
    const TensorMap& right = is_up ? p.right_map : p.weight_map;
    const int reduced = (is_up ? at.step : at.step - p.up_steps) * kHopperStep;
    Mbarrier* barrier = full + ring.stage;
    wait_empty<S>(empty, ring);
    mbarrier_arrive_expect(barrier, S::kTokenStage + S::kWeightStage);
    tma_load(tokens + ring.stage * S::kTokenStage, left, barrier, reduced, token);
#pragma unroll
    for (int i = 0; i < S::kBlocks / S::kCluster; ++i) {
      const int b = i * S::kCluster + static_cast<int>(blockIdx.x % S::kCluster);
      unsigned char* to = weights + ring.stage * S::kWeightStage + b * S::kBlock;
      if constexpr (S::kCluster > 1) {
        tma_load_all(to, right, barrier, column + 64 * b, reduced, S::kCluster);
      } else {
        tma_load(to, right, barrier, column + 64 * b, reduced);
      }
    }
    at.advance();
    ring.advance();
  }
  outlive_cluster<S>(empty, ring);
}

// acc += the product of 16 elements of the reduction, `left` bytes and `right` rows into a stage.
template <typename T>
__device__ __forceinline__ void add_product(DxSums& acc, const unsigned char* tokens,
                                            const unsigned char* weights, int left, int right) {
#if defined(NF4_PLANT_WRONG_TRANSPOSE)
  constexpr bool kByRows = false;
#else
  constexpr bool kByRows = true;
#endif
  const uint64_t x = shared_matrix(tokens + threadIdx.x / 128 * 64 * 128);
  const uint64_t w = shared_matrix_by_rows(weights, S::kBlock);
  wgmma<T, kByRows>(acc, moved(x, left), moved(w, right * 128));
}

// The columns of left and the rows of right are, twice, the high parts of 16 ranks and the low
// ones.
template <typename T>
__device__ __forceinline__ void multiply_up(DxSums& acc, Stages<S>& in, int steps) {
  multiply_steps(in, steps, [&](const unsigned char* tokens, const unsigned char* weights) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      add_product<T>(acc, tokens, weights, c * 64, c * 32);
      add_product<T>(acc, tokens, weights, c * 64, c * 32 + 16);
      add_product<T>(acc, tokens, weights, c * 64 + 32, c * 32);
    }
  });
}

template <typename T>
__device__ __forceinline__ void multiply(DxSums& acc, Stages<S>& in, int steps) {
  multiply_steps(in, steps, [&](const unsigned char* tokens, const unsigned char* weights) {
#pragma unroll
    for (int c = 0; c < 4; ++c) add_product<T>(acc, tokens, weights, c * 32, c * 16);
  });
}

__device__ __forceinline__ void pin_sums(DxSums& acc) {
#pragma unroll
  for (int h = 0; h < S::kHalves; ++h) wgmma_results(acc[h]);
}

// All steps of this CTA's tiles by one warpgroup's 64 tokens.
template <typename T>
__device__ __forceinline__ void consume(const BackwardArguments& p, Stages<S>& in) {
  const int64_t cluster = blockIdx.x / S::kCluster;
  const int64_t count = p.schedule.count(cluster);
  Cursor at(p.schedule, cluster);
  for (int64_t done = 0; done < count;) {
    const DxPlace place(p, at.tile);
    const int64_t to_end = at.steps - at.step, to_leave = count - done;
    const int steps = static_cast<int>(to_end < to_leave ? to_end : to_leave);
    const int left = p.up_steps - at.step;
    const int up_steps = left < 0 ? 0 : (left < steps ? left : steps);
    DxSums acc = {};
    if (up_steps > 0) {
      multiply_up<T>(acc, in, up_steps);
      pin_sums(acc);
      if (p.dropout.seed != nullptr) mask_dx(acc, p, place);
    }
    multiply<T>(acc, in, steps - up_steps);
    pin_sums(acc);

    if (steps == to_end && at.step == 0) {
      store_dx<T>(acc, p, place);
    } else {
      store_partial<S::Fragments>(acc, partials_of<S>(p), partial_slot(cluster, at.step != 0),
                                  place.column, p.k);
    }
    done += steps;
    at.leave();
  }
}

#endif  // NF4_HOPPER_CODE

template <typename T>
__global__ void __launch_bounds__(S::kThreads, 1)
    hopper_backward_kernel(const __grid_constant__ BackwardArguments p) {
#if defined(NF4_HOPPER_CODE)
  Carve carve;
  unsigned char* tokens = carve.take<unsigned char>(S::kStages * S::kTokenStage, 1024);
  unsigned char* weights = carve.take<unsigned char>(S::kStages * S::kWeightStage, 1024);
  auto* full = carve.take<Mbarrier>(2 * S::kStages);
  Mbarrier* empty = full + S::kStages;
  if (threadIdx.x == 0) init_ring<S>(full, empty);
  sync_ring<S>();

  if (threadIdx.x < S::kConsumers) {
    take_registers<S::kConsumerRegisters>();
    Stages<S> in{tokens, weights, full, empty, {}};
    consume<T>(p, in);
  } else {
    give_registers<S::kProducerRegisters>();
    if (threadIdx.x == S::kConsumers) produce(p, tokens, weights, full, empty);
  }
#endif
}

// DxSums the partial results of one tile in CTA order.
template <typename T>
__global__ void __launch_bounds__(S::kConsumers)
    hopper_backward_sum_kernel(const __grid_constant__ BackwardArguments p) {
#if defined(NF4_HOPPER_CODE)
  DxSums acc = {};
  const int64_t tile = blockIdx.x / S::kCluster;
  const DxPlace place(p, tile);
  if (sum_partials<S::Fragments>(acc, p.schedule, partials_of<S>(p), tile, place.column, p.k)) {
    store_dx<T>(acc, p, place);
  }
#endif
}

// ds [m, r] * scaling -> left [m][2 padded] and a [r, k] -> right [2 padded][k], each 16 ranks'
// high 16-bit parts followed by their low ones.
template <typename T>
__global__ void __launch_bounds__(256)
    hopper_parts_kernel(Up up, uint32_t* __restrict__ left, uint32_t* __restrict__ right, int64_t m,
                        int64_t k, int padded) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t lefts = m * (padded / 2);
  if (i < lefts) return split_left<T>(up, left, i, padded);
  const int64_t rank = (i - lefts) / (k / 2), pair = (i - lefts) % (k / 2);
  if (rank >= padded) return;
  const auto value = [&](int64_t column) {
    return rank < up.r ? element_of(up.right, up.right_dtype, rank * k + column) : 0.0f;
  };
  uint32_t* to = right + (rank / 16 * 32 + rank % 16) * (k / 2) + pair;
  split2<T>(value(2 * pair), value(2 * pair + 1), to[0], to[16 * (k / 2)]);
}

// Workspace: weights, the parts of ds and of a, partial results.
struct BackwardWorkspace {
  size_t weights, left, right, partial;

  size_t total() const { return weights + left + right + partial; }
};

int64_t token_tiles_of(const Matmul& p) {
  constexpr int kTokens = S::kCluster * S::kTokens;
  return (p.m + kTokens - 1) / kTokens;
}

Schedule backward_schedule(const Matmul& p) {
  const int64_t column_tiles = (p.weight.k + S::kColumns - 1) / S::kColumns;
  const int64_t n_steps = (p.weight.n + kHopperStep - 1) / kHopperStep;
  return make_long_schedule(column_tiles * token_tiles_of(p), n_steps + up_steps(p.up),
                            S::kCluster);
}

BackwardWorkspace backward_workspace_of(const Matmul& p) {
  const auto rounded = [](int64_t bytes) { return static_cast<size_t>((bytes + 255) / 256 * 256); };
  const Schedule s = backward_schedule(p);
  const int64_t ranks = up_steps(p.up) == 0 ? 0 : padded_ranks(p.up);
  return {rounded(p.weight.n * p.weight.k * 2), rounded(p.m * ranks * 4),
          rounded(p.weight.k * ranks * 4),
          s.whole_tiles ? 0 : 2 * s.ctas * S::kCluster * sizeof(float) * S::Fragments::kPartial};
}

}  // namespace

bool hopper_backward_takes(const Matmul& p) {
#if defined(NF4_SM90A) || defined(NF4_EMULATE)
  const nf4_weight& w = p.weight;
  if (device().compute_capability != 90) return false;
  if (p.m < (tile_backward_takes(p) ? kBackwardTokens : kHopperTokens)) return false;
  if (p.dtype != NF4_FLOAT16 && p.dtype != NF4_BFLOAT16) return false;
  // TMA wants rows of grad_y and of the weights at multiples of 16 bytes, coordinates are 32-bit.
  constexpr int64_t kMost = int64_t{1} << 31;
  return w.n > 0 && w.k > 0 && w.n % 8 == 0 && w.k % 8 == 0 && aligned16(p.in) &&
         aligned16(p.out) && p.m < kMost && w.n < kMost && w.k < kMost;
#else
  static_cast<void>(p);
  return false;
#endif
}

size_t hopper_backward_workspace(const Matmul& p) { return backward_workspace_of(p).total(); }

int hopper_backward(const Matmul& p, void* workspace, cudaStream_t stream) {
  const nf4_weight& w = p.weight;
  const BackwardWorkspace parts = backward_workspace_of(p);
  auto* weights = static_cast<unsigned char*>(workspace);
  unsigned char* left = weights + parts.weights;
  unsigned char* right = left + parts.left;
  BackwardArguments a = {};
  const int padded = padded_ranks(p.up);
  int status = encode_matrix(p.in, p.m, w.n, S::kTokens, &a.token_map);
  if (status == 0) status = encode_matrix(weights, w.n, w.k, kHopperStep, &a.weight_map);
  if (status == 0 && up_steps(p.up) > 0) {
    status = encode_matrix(left, p.m, 2 * padded, S::kTokens, &a.left_map);
    if (status == 0) status = encode_matrix(right, 2 * padded, w.k, kHopperStep, &a.right_map);
  }
  if (status != 0) return status;
  a.dropout = p.up.dropout;
  a.dx = p.out;
  a.partial = reinterpret_cast<float*>(right + parts.right);
  a.m = p.m, a.k = w.k;
  a.schedule = backward_schedule(p);
  a.column_tiles = (w.k + S::kColumns - 1) / S::kColumns;
  a.token_tiles = token_tiles_of(p);
  a.band = band_tiles(a.token_tiles, w.k);
  a.up_steps = up_steps(p.up);

  status = nf4_cuda_dequantize(&w, w.n * w.k, weights, p.dtype, stream);
  const auto run = [&](auto element) -> int {
    using T = decltype(element);
    if (a.up_steps > 0) {
      const int64_t pairs = (p.m + w.k) * padded / 2;
      const int split =
          launch(hopper_parts_kernel<T>, dim3(static_cast<unsigned>((pairs + 255) / 256)),
                 dim3(256), 0, stream, p.up, reinterpret_cast<uint32_t*>(left),
                 reinterpret_cast<uint32_t*>(right), p.m, w.k, padded);
      if (split != 0) return split;
    }
    const int done = launch_clusters(hopper_backward_kernel<T>, dim3(a.schedule.ctas * S::kCluster),
                                     dim3(S::kThreads), S::kCluster, S::kShared, stream, a);
    if (done != 0 || a.schedule.whole_tiles) return done;
    return launch(hopper_backward_sum_kernel<T>,
                  dim3(static_cast<unsigned>(a.schedule.tiles * S::kCluster)), dim3(S::kConsumers),
                  0, stream, a);
  };
  if (status != 0) return status;
  return p.dtype == NF4_FLOAT16 ? run(__half()) : run(__nv_bfloat16());
}

}  // namespace nf4::cuda
