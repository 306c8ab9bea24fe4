// y = x W^T on Hopper's warpgroup tensor cores (sm_90a), for more tokens than linear_tile.cu likes.
//
// wgmma with the weights as the 64-row operand and tokens as the columns; two warpgroups, 128 rows
// and 128 or 256 tokens a CTA. One producer thread keeps a ring of stages filled by TMA, a step of
// 64 elements of K each. Weights come in two ways:
// - fused: the bytes of nf4 or fp4. Each warp decodes its 16 rows into A fragments in registers
//   while the products of the step before are under way. Scales cannot multiply the sums here (a
//   second set of accumulators does not fit beside 128 registers), so they multiply the decoded
//   codes: in float32 and rounded once, which gives exactly the weights that dequantize writes.
// - dense: 16-bit weights that dequantize wrote to workspace. For so many tokens that a launch over
//   the weight pays, and for every format, block size and k that the fused way does not take.
// LoRA's down-projection comes before the tiles, as tasks of whichever CTA is free (lora_down.cuh);
// of the dense way it is a launch of its own. The up-projection is a few more steps of K at the end
// of a tile: s as two 16-bit parts by TMA, b as two parts in registers, and of their four products
// the three that matter.
#include "hopper_loop.cuh"
#include "shared.cuh"
#include "tensor_map.cuh"

namespace nf4::cuda {
namespace {

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    hopper_tile_kernel(const __grid_constant__ HopperArguments p,
                       const __grid_constant__ DownWork work) {
#if defined(NF4_HOPPER_CODE)
  Carve carve;
  unsigned char* tokens = carve.take<unsigned char>(S::kStages * S::kTokenStage, 1024);
  unsigned char* weights = carve.take<unsigned char>(S::kStages * S::kWeightStage, 1024);
  unsigned char* store = S::kDense ? nullptr : carve.take<unsigned char>(S::kStore, 1024);
  auto* table = carve.take<float>(S::kTable / 4, 1024);
  if (S::kDense) store = reinterpret_cast<unsigned char*>(table);
  auto* map = carve.take<float>(S::kMap / 4);
  auto* full = carve.take<Mbarrier>(2 * S::kStages);
  Mbarrier* empty = full + S::kStages;

  if (threadIdx.x == 0) init_ring<S>(full, empty);
  if constexpr (!S::kDense) down_before<T, S>(p, work, table, reinterpret_cast<int*>(map));
  if constexpr (!S::kDense) {
    for (int i = threadIdx.x; i < S::kTable / 16; i += S::kThreads) {
      const int byte = i / 8;
      const float first = kCodes4[p.format][byte >> 4], second = kCodes4[p.format][byte & 15];
      reinterpret_cast<float4*>(table)[i] = make_float4(first, second, first, second);
    }
    for (int i = threadIdx.x; i < S::kMap / 4; i += S::kThreads) map[i] = kCodes8[0][i];
  }
  sync_ring<S>();

  if (threadIdx.x < S::kConsumers) {
    take_registers<S::kConsumerRegisters>();
    Stages<S> in{tokens, weights, full, empty, {}};
    consume<T, S>(p, DecodeTables{reinterpret_cast<const unsigned char*>(table), map}, in, store);
  } else {
    give_registers<S::kProducerRegisters>();
    if (threadIdx.x == S::kConsumers) produce<S>(p, work, tokens, weights, full, empty);
  }
#endif
}

// Sums the partial results of one tile in CTA order.
template <typename T, typename S>
__global__ void __launch_bounds__(S::kConsumers)
    hopper_sum_kernel(const __grid_constant__ HopperArguments p) {
#if defined(NF4_HOPPER_CODE)
  float acc[S::kHalves][16][4] = {};
  const int64_t tile = blockIdx.x / S::kCluster;
  const HopperPlace place(p, tile, S::kTokens, S::kCluster);
  if (sum_partials<typename S::Fragments>(acc, p.schedule, partials_of<S>(p), tile, place.token,
                                          p.m)) {
    store_tile<T>(acc, p, place);
  }
#endif
}

// The down-projections of the dense way, a task a CTA. In its launch only 8 warps of an SM would
// work on them while nothing else can begin.
template <typename T, typename S>
__global__ void __launch_bounds__(32 * kDownWarps, 2)
    hopper_down_kernel(const __grid_constant__ HopperArguments p,
                       const __grid_constant__ DownWork work) {
#if defined(NF4_HOPPER_CODE)
  Carve carve;
  float* scratch = carve.take<float>(kDownScratch<S::kDownTiles>);
  do_task<T, S::kDownTiles, true>(work, static_cast<int>(blockIdx.x), scratch,
                                  DownStore<T>{p, work});
#endif
}

// Splits s, where another launch computed it.
template <typename T>
__global__ void __launch_bounds__(256)
    hopper_split_kernel(Up up, uint32_t* __restrict__ out, int64_t m, int padded) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < m * (padded / 2)) split_left<T>(up, out, i, padded);
}

// Workspace: counters, weights (rows padded to 16), the parts of s, partial results.
struct Workspace {
  size_t counters, weights, left, partial;

  size_t total() const { return counters + weights + left + partial; }
};

template <typename S>
int64_t row_tiles_of(const Matmul& p) {
  constexpr int kRows = S::kCluster * kHopperRows;
  return (p.weight.n + kRows - 1) / kRows;
}

template <typename S>
Schedule hopper_schedule(const Matmul& p) {
  const int64_t token_tiles = (p.m + S::kTokens - 1) / S::kTokens;
  const int64_t k_steps = (p.weight.k + kHopperStep - 1) / kHopperStep;
  return make_long_schedule(row_tiles_of<S>(p) * token_tiles, k_steps + up_steps(p.up),
                            S::kCluster);
}

template <typename S>
Workspace workspace_of(const Matmul& p) {
  const auto rounded = [](int64_t bytes) { return static_cast<size_t>((bytes + 255) / 256 * 256); };
  const Schedule s = hopper_schedule<S>(p);
  const int64_t rows = (p.weight.n + 15) / 16 * 16;
  return {kCounterBytes, S::kDense ? rounded(rows * p.weight.k * 2) : 0,
          up_steps(p.up) == 0 ? 0 : rounded(p.m * padded_ranks(p.up) * 4),
          s.whole_tiles ? 0 : 2 * s.ctas * S::kCluster * sizeof(float) * S::Fragments::kPartial};
}

// The tensor maps of a problem; a CUDA status.
template <typename S>
int encode_maps(const Matmul& p, const void* dense, const void* left, HopperArguments* a) {
  const auto n = static_cast<uint64_t>(p.weight.n), k = static_cast<uint64_t>(p.weight.k);
  int status = encode_matrix(p.in, p.m, p.weight.k, S::kTokens / S::kCluster, &a->token_map);
  if (status != 0) return status;
  if (S::kDense) {
    // Of each 16 rows first the even, then the odd ones: the permutation of `HopperPlace`.
    status = encode({dense,
                     2,
                     4,
                     {k, 8, 2, (n + 15) / 16},
                     {k * 4, k * 2, k * 32},
                     {kHopperStep, 8, 2, kHopperRows / 16},
                     Swizzle::k128},
                    &a->weight_map);
  } else {
    status = encode(
        {p.weight.packed, 1, 2, {k / 2, n}, {k / 2}, {kHopperStep / 2, kHopperRows}, Swizzle::k32},
        &a->weight_map);
  }
  a->stores_boxes = p.weight.n % 8 == 0 && aligned16(p.out);
  if (status == 0 && a->stores_boxes) {
    status = encode_matrix(p.out, p.m, p.weight.n, 128, &a->y_map);
  }
  if (status != 0 || left == nullptr) return status;
  return encode_matrix(left, p.m, 2 * padded_ranks(p.up), S::kTokens / S::kCluster, &a->left_map);
}

template <typename T, typename S>
int forward(const Matmul& p, void* workspace, cudaStream_t stream) {
  const nf4_weight& w = p.weight;
  const Workspace parts = workspace_of<S>(p);
  auto* base = static_cast<unsigned char*>(workspace) + parts.counters;
  void* left = parts.left == 0 ? nullptr : base + parts.weights;
  DownWork work = down_work(p, S::kDownTiles, workspace);
  HopperArguments a = {};
  int status = encode_maps<S>(p, base, left, &a);
  if (status != 0) return status;
  a.scales = scales_of(w);
  a.bias = p.bias;
  a.y = p.out;
  a.partial = reinterpret_cast<float*>(base + parts.weights + parts.left);
  a.right = p.up.right;
  a.m = p.m, a.n = w.n, a.k = w.k;
  a.schedule = hopper_schedule<S>(p);
  a.row_tiles = row_tiles_of<S>(p);
  a.token_tiles = (p.m + S::kTokens - 1) / S::kTokens;
  a.band = band_tiles(a.token_tiles, w.k);
  a.k_steps = static_cast<int>((w.k + kHopperStep - 1) / kHopperStep);
  a.r = p.up.r, a.right_dtype = p.up.right_dtype;
  a.log2_block = log2_of(w.block_size), a.format = w.format;
  a.left = static_cast<uint16_t*>(left);
  a.padded = padded_ranks(p.up);
  a.left_scaling = p.up.scaling;

  if (S::kDense) status = nf4_cuda_dequantize(&w, w.n * w.k, base, p.dtype, stream);
  const bool own_down = S::kDense && work.tasks != 0;
  if (status == 0 && own_down) {
    status =
        launch(hopper_down_kernel<T, S>, dim3(static_cast<unsigned>(work.tasks)),
               dim3(32 * kDownWarps), kDownScratch<S::kDownTiles> * sizeof(float), stream, a, work);
    work = {};
  }
  if (status == 0) status = clear_counters(work, stream);
  if (status == 0 && left != nullptr && work.tasks == 0 && !own_down) {
    const auto blocks = static_cast<unsigned>((p.m * a.padded / 2 + 255) / 256);
    status = launch(hopper_split_kernel<T>, dim3(blocks), dim3(256), 0, stream, p.up,
                    static_cast<uint32_t*>(left), p.m, a.padded);
  }
  if (status != 0) return status;
  status = launch_clusters(hopper_tile_kernel<T, S>, dim3(a.schedule.ctas * S::kCluster),
                           dim3(S::kThreads), S::kCluster, S::kShared, stream, a, work);
  if (status != 0 || a.schedule.whole_tiles) return status;
  return launch(hopper_sum_kernel<T, S>,
                dim3(static_cast<unsigned>(a.schedule.tiles * S::kCluster)), dim3(S::kConsumers), 0,
                stream, a);
}

}  // namespace

bool hopper_forward_takes(const Matmul& p) {
#if defined(NF4_SM90A) || defined(NF4_EMULATE)
  const nf4_weight& w = p.weight;
  if (device().compute_capability != 90 || p.m < kHopperTokens) return false;
  if (p.dtype != NF4_FLOAT16 && p.dtype != NF4_BFLOAT16) return false;
  // TMA wants rows of x (and of dense weights) at multiples of 16 bytes, coordinates are 32-bit.
  constexpr int64_t kMost = int64_t{1} << 31;
  return w.n > 0 && w.k > 0 && w.k % 8 == 0 && aligned16(p.in) &&
         reinterpret_cast<uintptr_t>(p.out) % 4 == 0 && p.m < kMost && w.n < kMost && w.k < kMost;
#else
  static_cast<void>(p);
  return false;
#endif
}

size_t hopper_forward_workspace(const Matmul& p) {
  return with_hopper_tile(
      p, [&](auto, auto tile) -> size_t { return workspace_of<decltype(tile)>(p).total(); });
}

int hopper_forward(const Matmul& p, void* workspace, cudaStream_t stream) {
  return with_hopper_tile(p, [&](auto element, auto tile) -> int {
    return forward<decltype(element), decltype(tile)>(p, workspace, stream);
  });
}

}  // namespace nf4::cuda
