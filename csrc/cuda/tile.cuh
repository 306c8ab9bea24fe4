// What the tensor-core matmuls share, forward (linear_tile.cu) and backward (backward_tile.cu):
// where fragments lie, the main loop over the units of a CTA, partial sums, and the launch.
//
// Weights are the 16-row operand of mma.m16n8k16 and tokens its 8 columns. A CTA tile is S::kRows
// output columns of the weight ("rows": n forward, k backward) times S::kTokens tokens.
#pragma once

#include "launch.cuh"
#include "matmul.cuh"
#include "schedule.cuh"
#include "shared.cuh"
#include "vector.cuh"

namespace nf4::cuda {

struct TileArguments {
  const void* in;
  const uint8_t* packed;
  Scales scales;
  const void* bias;
  void* out;
  float* partial;
  int64_t m, n, k;
  int log2_block;
  Up up;
  int* counters;  // of the down-projection that the same launch computes; null: none
  int tasks;
  Schedule schedule;
  int64_t row_tiles, token_tiles;
};

// Up to kMaxMembers weights that share `in` and k, as one problem: member i has the tiles from
// first[i] to first[i + 1], and every member holds the schedule of all. Which tile is whose is
// data, so one launch fills the SMs even where each member alone has few rows (k and v of grouped
// attention).
struct GroupArguments {
  int count;
  int64_t first[kMaxMembers + 1];
  TileArguments members[kMaxMembers];
};

// A tile as its own weight sees it.
struct OwnTile {
  const TileArguments& p;
  int64_t tile;
};
__device__ __forceinline__ OwnTile own_tile(const TileArguments& p, int64_t tile) {
  return {p, tile};
}
__device__ __forceinline__ OwnTile own_tile(const GroupArguments& g, int64_t tile) {
  int i = 0;
  while (i + 1 < g.count && tile >= g.first[i + 1]) ++i;
  return {g.members[i], tile - g.first[i]};
}
// For what all members share: in, m, k, partial, schedule.
__device__ __forceinline__ const TileArguments& shared_part(const TileArguments& p) { return p; }
__device__ __forceinline__ const TileArguments& shared_part(const GroupArguments& g) {
  return g.members[0];
}

template <typename S>
using Accumulators = float[S::kRowTiles][S::kTokenTiles][4];

template <typename S>
__device__ __forceinline__ TilePosition position(const TileArguments& p, int64_t tile) {
  if constexpr (!S::kManyTokens) return {tile, 0};
  return tile_position(tile, p.row_tiles, p.token_tiles);
}

// Where the fragments of this thread lie in the output. The rows of a warp are permuted so that a
// thread owns 2 * kRowTiles consecutive ones.
template <typename S>
struct Place {
  int row_tile, token_tile;
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  __device__ explicit Place(const TilePosition& at)
      : row_tile(static_cast<int>(at.row_tile)), token_tile(static_cast<int>(at.token_tile)) {}
  __device__ Place(const TileArguments& p, int64_t tile) : Place(position<S>(p, tile)) {}
  // Of the warp. Worked out anew where they are asked for: as 64 bits each they would lie in
  // registers through the main loop.
  __device__ __forceinline__ int64_t row_base() const {
    return static_cast<int64_t>(row_tile) * S::kRows +
           threadIdx.x / 32 / S::kWarpsToken * S::kWarpRows;
  }
  __device__ __forceinline__ int64_t token_base() const {
    return static_cast<int64_t>(token_tile) * S::kTokens +
           threadIdx.x / 32 % S::kWarpsToken * (8 * S::kTokenTiles);
  }
  __device__ int64_t first_token() const { return token_base() + 2 * t; }
  __device__ int64_t row(int rt, int half) const {
    return row_base() + g * 2 * S::kRowTiles + 2 * rt + half;
  }
};

// The scale of one block as it is stored, loaded a step before it is decoded.
struct RawScale {
  uint32_t code;  // or the bits of a float
  float nested;

  __device__ __forceinline__ void clear() {
    code = 0;
    nested = 0.0f;
  }
  __device__ __forceinline__ void load(const Scales& scales, int64_t block) {
    if (scales.nested_absmax == nullptr) {
      code = static_cast<const uint32_t*>(scales.absmax)[block];
    } else {
      code = static_cast<const uint8_t*>(scales.absmax)[block];
      nested = scales.nested_absmax[block / NF4_NESTED_BLOCK_SIZE];
    }
  }
  // `map` is the 8-bit map in shared memory.
  __device__ __forceinline__ float decode(const float* map, float offset, bool is_nested) const {
    return is_nested ? map[code] * nested + offset : __uint_as_float(code);
  }
};

// The body of a tile kernel. Kernel::Loader starts the copies of one step after the other,
// Kernel::TileScales gives the scales of each step of a tile; start, step and finish work on the
// accumulators before, in and after the reduction, and store writes a tile that is complete.
// `phase(scratch, ticket)` comes first of all, with the table's and the map's memory to use.
template <typename Kernel, typename Arguments, typename Phase>
__device__ __forceinline__ void run_tiles(const Arguments& all, int format, const Phase& phase) {
  using S = typename Kernel::S;
  const TileArguments& common = shared_part(all);
  Carve carve;
  auto* table = carve.take<typename Kernel::Entry>(S::kTable / sizeof(typename Kernel::Entry), 128);
  float* map = carve.take<float>(S::kMap / 4);
  unsigned char* weights = carve.take<unsigned char>(S::kStages * S::kWeightStage);
  unsigned char* tokens = carve.take<unsigned char>(S::kStages * S::kTokenStage);

  const int64_t cta = blockIdx.x;
  // Units to do. 32 bits: registers are short here, and 2^31 units would take an SM half an hour.
  auto left = static_cast<int>(common.schedule.count(cta));
  typename Kernel::Loader loader(all, cta);
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) {
    if (stage < left) {
      loader.load(all, weights + stage * S::kWeightStage, tokens + stage * S::kTokenStage);
    }
    cp_async_commit();
  }
  phase(reinterpret_cast<float*>(table), reinterpret_cast<int*>(map));
  Kernel::fill_table(table, format);
  for (int i = threadIdx.x; i < 256; i += S::kThreads) map[i] = kCodes8[0][i];

  Cursor at(common.schedule, cta);
  int stage = 0;
  while (left > 0) {
    const OwnTile own = own_tile(all, at.tile);
    const TileArguments& p = own.p;
    const Place<S> place(p, own.tile);
    const bool from_start = at.step == 0;
    const int last = at.step + left;
    Accumulators<S> acc = {};
    if (from_start) Kernel::start(acc, p, place);  // first: with dropout it needs all registers
    const bool is_nested = p.scales.nested_absmax != nullptr;
    const float offset = is_nested ? p.scales.offset[0] : 0.0f;
    typename Kernel::TileScales scales(p, place, at.step);
    scales.load(p, at.step);
    const auto more = [&](int step) { return step < at.steps && step < last; };
#pragma unroll 1
    for (; more(at.step); ++at.step) {
#if !defined(NF4_PLANT_MISSING_WAIT)
      cp_async_wait<S::kStages - 2>();
#endif
#if !defined(NF4_PLANT_MISSING_BARRIER)
      __syncthreads();  // the stage has landed for all, and all have left the one loaded next
#endif
      if (at.step + S::kStages - 1 < last) {
        const int to = stage == 0 ? S::kStages - 1 : stage - 1;
        loader.load(all, weights + to * S::kWeightStage, tokens + to * S::kTokenStage);
      }
      cp_async_commit();
      typename Kernel::Scale scale;
      scales.decode(map, offset, is_nested, scale);
      if (more(at.step + 1)) scales.load(p, at.step + 1);
      Kernel::step(acc, table, weights + stage * S::kWeightStage, tokens + stage * S::kTokenStage,
                   scale);
      stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }

    const bool to_end = at.step == at.steps;
    if (to_end) Kernel::finish(acc, p, place);
    if (from_start && to_end) {
      Kernel::store(acc, p, place);
    } else {
      store_partial<S>(acc, p.partial, partial_slot(cta, !from_start), place.first_token(), p.m);
    }
    left = last - at.step;
    at.leave();
  }
  cp_async_wait<0>();
}

// The body of the second kernel: adds the partial results of one tile in CTA order.
template <typename Kernel, typename Arguments>
__device__ __forceinline__ void run_sums(const Arguments& all) {
  using S = typename Kernel::S;
  Accumulators<S> acc = {};
  const int64_t tile = blockIdx.x;
  const OwnTile own = own_tile(all, tile);
  const TileArguments& p = own.p;
  const Place<S> place(p, own.tile);
  if (sum_partials<S>(acc, p.schedule, p.partial, tile, place.first_token(), p.m)) {
    Kernel::store(acc, p, place);
  }
}

// `rows` and `reduced` are n and k forward, k and n backward.
template <typename S>
TileArguments tile_arguments(const Matmul& p, int64_t rows, int64_t reduced, void* workspace) {
  const nf4_weight& w = p.weight;
  const int64_t row_tiles = (rows + S::kRows - 1) / S::kRows;
  const int64_t token_tiles = (p.m + S::kTokens - 1) / S::kTokens;
  const Schedule schedule =
      make_schedule(row_tiles * token_tiles, (reduced + S::kStep - 1) / S::kStep, S::kCtasPerSm);
  return {p.in,
          w.packed,
          scales_of(w),
          p.bias,
          p.out,
          static_cast<float*>(workspace),
          p.m,
          w.n,
          w.k,
          log2_of(w.block_size),
          p.up,
          nullptr,
          0,
          schedule,
          row_tiles,
          token_tiles};
}

template <typename S>
size_t partial_bytes(const Schedule& s) {
  return s.whole_tiles ? 0 : 2 * s.ctas * sizeof(float) * S::kPartial;
}

// `more`: what the tile kernel gets after its first two arguments.
template <typename S, typename Arguments, typename... More>
int launch_tiles(void (*tile_kernel)(Arguments, int, More...), void (*sum_kernel)(Arguments),
                 const Arguments& a, const Schedule& schedule, int format, cudaStream_t stream,
                 const More&... more) {
  const dim3 threads(S::kThreads);
  const int status =
      launch(tile_kernel, dim3(schedule.ctas), threads, S::kShared, stream, a, format, more...);
  if (status != 0 || schedule.whole_tiles) return status;
  return launch(sum_kernel, dim3(static_cast<unsigned>(schedule.tiles)), threads, 0, stream, a);
}

// Whether the tensor-core kernels take the operands, forward or backward.
inline bool tiles_take(const Matmul& p) {
  const nf4_weight& w = p.weight;
  if (!is_4bit(w.format) || w.block_size < 64 || w.k % 64 != 0) return false;
  if (p.dtype != NF4_FLOAT16 && p.dtype != NF4_BFLOAT16) return false;
  if (p.dtype == NF4_BFLOAT16 && device().compute_capability < 80) return false;
  return p.m > 0 && w.n > 0 && w.k > 0 && aligned16(p.in) && aligned16(w.packed) &&
         aligned16(p.out);
}

}  // namespace nf4::cuda
