// What a backward pass wants of dY and of x, each read once: dS = dY B and dB = dY^T S in one pass
// over dY, dA = dS^T dropout(x) in one pass over x.
//
// A warp walks over a run of tokens with 64 columns, 16 tokens at a time, which come by
// asynchronous copies of its own: warps wait for each other only where they share sums, or `left`.
// Ranks are the 16-row operand of mma.m16n8k16 in dB and dA, and its 8 columns in dS: ldmatrix
// gives the elements as columns by tokens, transposed, or as tokens by columns. The narrow operands
// are split into two 16-bit parts. The sums over runs of tokens and over column blocks are finished
// by a second kernel, in order.
#include <algorithm>

#include "launch.cuh"
#include "lora_pass.cuh"
#include "shared.cuh"

namespace nf4::cuda {
namespace {

// acc[column tile] += left^T in over the 16 tokens of a step.
template <typename T, typename S>
__device__ __forceinline__ void add_outer(float (&acc)[kWarpColumns / 8][4],
                                          const unsigned char* stage, const unsigned char* left) {
  const int tile = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
  uint32_t a[2][4];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    load_matrix_x4<true>(
        a[part], left + part * S::kLeftPart + (tile / 2 * 8 + row) * kLeftRow + tile % 2 * 8 * 2);
  }
#pragma unroll
  for (int np = 0; np < kColumnSteps; ++np) {
    uint32_t b[4];
    load_matrix_x4<true>(b, stage + (tile % 2 * 8 + row) * kRow + (np * 16 + tile / 2 * 8) * 2);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t x[2] = {b[half * 2], b[half * 2 + 1]};
        mma_m16n8k16<T>(acc[np * 2 + half], a[part], x);
      }
    }
  }
}

// Where the sums of a token and a pair of ranks are in a warp's part of the reduction: neighbouring
// tokens use other banks.
__device__ __forceinline__ int sum_place(int token, int pair) {
  constexpr int kRowsOfBanks = 32 / kRanks;
  const int turn = token / kRowsOfBanks % (4 / kRowsOfBanks) * 4;
  return token * kRanks + 2 * (pair ^ turn);
}

// sums[token][rank] = this warp's columns' part of in right over the 16 tokens of a step, which is
// the `step`-th since a barrier.
template <typename T>
__device__ __forceinline__ void multiply_down(float* sums, const unsigned char* stage,
                                              const Right<T>& right, int step) {
  const int lane = threadIdx.x % 32, tile = lane / 8, row = lane % 8;
  float acc[kRankTiles][4] = {};
#pragma unroll
  for (int ks = 0; ks < kColumnSteps; ++ks) {
    uint32_t a[4];
    load_matrix_x4<false>(a, stage + (tile % 2 * 8 + row) * kRow + (ks * 16 + tile / 2 * 8) * 2);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int rank = 0; rank < kRankTiles; ++rank) {
        mma_m16n8k16<T>(acc[rank], a, right.b[ks][rank][part]);
      }
    }
  }
#pragma unroll
  for (int rank = 0; rank < kRankTiles; ++rank) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = step * kStep + lane / 4 + half * 8, pair = rank * 4 + lane % 4;
      *reinterpret_cast<float2*>(sums + sum_place(token, pair)) =
          make_float2(acc[rank][2 * half], acc[rank][2 * half + 1]);
    }
  }
}

// Adds the warps' sums of the tokens since a barrier, in warp order: a thread has two ranks.
template <typename S>
__device__ __forceinline__ void store_down(const PassArguments& p, const float* reduce,
                                           int64_t column_block, int64_t first_token, int64_t end,
                                           int first_rank) {
  static_assert(S::kSums == 2 * kThreads);
  const int within = threadIdx.x / (kRanks / 2), pair = threadIdx.x % (kRanks / 2);
  const int64_t token = first_token + within;
  const int rank = first_rank + 2 * pair;
  if (token >= end || rank >= p.r) return;
  float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const auto v =
        *reinterpret_cast<const float2*>(reduce + w * S::kSums + sum_place(within, pair));
    total.x += v.x, total.y += v.y;
  }
  float* to = p.down + (column_block * p.m + token) * p.r + rank;
  to[0] = total.x;
  if (rank + 1 < p.r) to[1] = total.y;
}

// Adds the token groups' accumulators in order; the first group has the result.
template <typename S, typename Acc>
__device__ __forceinline__ void add_token_groups(Acc& acc, float* shared) {
  const int group = threadIdx.x / 32 / S::kColumnGroups;
  const int thread = threadIdx.x % (32 * S::kColumnGroups);
  constexpr int kGroupThreads = 32 * S::kColumnGroups;
  float* own = &acc[0][0];
  __syncthreads();  // all have left the stages
  if (group > 0) {
#pragma unroll
    for (int i = 0; i < S::kOuterFloats; ++i) {
      shared[((group - 1) * S::kOuterFloats + i) * kGroupThreads + thread] = own[i];
    }
  }
  __syncthreads();
  if (group > 0) return;
#pragma unroll
  for (int other = 0; other < S::kTokenGroups - 1; ++other) {
#pragma unroll
    for (int i = 0; i < S::kOuterFloats; ++i) {
      own[i] += shared[(other * S::kOuterFloats + i) * kGroupThreads + thread];
    }
  }
}

template <typename T, bool kDown, bool kOuter>
__global__ void __launch_bounds__(kThreads, kCtas) pass_kernel(const PassArguments p) {
  using S = PassShape<kDown>;
  constexpr bool kMasked = kOuter && !kDown;  // grad_y, which both are wanted of, has no dropout
  Carve carve;
  unsigned char* stages = carve.take<unsigned char>(kWarps * kStages * kStage);
  unsigned char* lefts = carve.take<unsigned char>(S::kLeft);
  float* reduce = carve.take<float>(S::kReduce);
  const int warp = threadIdx.x / 32;
  const int token_group = warp / S::kColumnGroups;
  const unsigned column_block = blockIdx.x / p.groups;
  const int64_t first_column =
      static_cast<int64_t>(column_block) * S::kColumns + warp % S::kColumnGroups * kWarpColumns;
  const int64_t begin = blockIdx.y * p.run;
  const int64_t end = begin + p.run < p.m ? begin + p.run : p.m;
  const int first_rank = blockIdx.x % p.groups * kRanks;
  constexpr int kStepTokens = kStep * S::kTokenGroups;
  const int steps = static_cast<int>((end - begin + kStepTokens - 1) / kStepTokens);

  unsigned char* own = stages + warp * kStages * kStage;
  PassLoader<T, S> loader(p, first_column, begin + token_group * kStep, end, own);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) loader.load(p, stage);
    cp_async_commit();
  }
  LeftLoader<T, S> left;
  if constexpr (kOuter) left.load(p, begin, end, first_rank);
  Right<T> right;
  if constexpr (kDown) {
    if (p.right_dtype == NF4_FLOAT32) {
      right.template load<float>(p, first_column, first_rank);
    } else if (p.right_dtype == NF4_FLOAT16) {
      right.template load<__half>(p, first_column, first_rank);
    } else {
      right.template load<__nv_bfloat16>(p, first_column, first_rank);
    }
  }
  const int64_t seed = kMasked && p.dropout.seed != nullptr ? *p.dropout.seed : 0;
  float acc[kWarpColumns / 8][4] = {};
  if constexpr (kOuter) {
    left.store(lefts);
    __syncthreads();
  }
  int stage = 0, buffer = 0;
  int64_t token = begin;
#pragma unroll 1
  for (int first = 0; first < steps; first += S::kSteps) {
    if constexpr (kOuter) {
      if (first + S::kSteps < steps) left.load(p, token + S::kTokens, end, first_rank);
    }
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      const int i = first + s;
      if (i >= steps) break;
      unsigned char* here = own + stage * kStage;
#if !defined(NF4_PLANT_MISSING_PASS_WAIT)
      cp_async_wait<kStages - 2>();
#endif
      if constexpr (kMasked) {
        if (p.dropout.seed != nullptr) {
          const int loaded = i + kStages - 1 < steps ? i + kStages - 1 : steps;
          loader.drop(p, seed, loaded - i, stage);
        }
      }
      __syncwarp();  // the step has landed for all lanes, and all have left the one loaded next
      if (i + kStages - 1 < steps) loader.load(p, stage == 0 ? kStages - 1 : stage - 1);
      cp_async_commit();
      if constexpr (kDown) {
        multiply_down<T>(reduce + (buffer * kWarps + warp) * S::kSums, here, right, s);
      }
      if constexpr (kOuter) {
        add_outer<T, S>(acc, here,
                        lefts + buffer * 2 * S::kLeftPart +
                            (s * S::kTokenGroups + token_group) * kStep * kLeftRow);
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if constexpr (kOuter) left.store(lefts + (buffer ^ 1) * 2 * S::kLeftPart);
#if !defined(NF4_PLANT_MISSING_PASS_BARRIER)
    // Sums and `left` are there. Both have two buffers, so all are done with the one used next.
    __syncthreads();
#endif
    if constexpr (kDown) {
      store_down<S>(p, reduce + buffer * kWarps * S::kSums, column_block, token, end, first_rank);
    }
    buffer ^= 1;
    token += S::kTokens;
  }
  cp_async_wait<0>();

  if constexpr (kOuter) {
    if constexpr (S::kTokenGroups > 1) {
      add_token_groups<S>(acc, reinterpret_cast<float*>(stages));
      if (token_group > 0) return;
    }
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int rank = first_rank + g + half * 8;
      if (rank >= p.r) continue;
      float* row = p.outer + (static_cast<int64_t>(blockIdx.y) * p.r + rank) * p.c;
#pragma unroll
      for (int nt = 0; nt < kWarpColumns / 8; ++nt) {
        const int64_t column = first_column + nt * 8 + 2 * t;
        if (column < p.c) {
          *reinterpret_cast<float2*>(row + column) =
              make_float2(acc[nt][2 * half], acc[nt][2 * half + 1]);
        }
      }
    }
  }
}

// out = scaling * the sum of partial [count][size], in order, rounded once. With columns, partial
// is [count][r][columns] and out [columns, r].
struct Sum {
  const float* partial;
  void* out;
  int64_t size;
  int count, r;
  float scaling;
  uint32_t columns;  // 0: as it is
};

template <typename O>
__device__ __forceinline__ void add_parts(const Sum& s, int64_t i) {
  if (i >= s.size) return;
  float total = 0.0f;
  // The loads of eight parts are under way at once.
#pragma unroll 8
  for (int part = 0; part < s.count; ++part) total += s.partial[part * s.size + i];
  int64_t to = i;
  if (s.columns > 0) {  // in 32 bits: a division in 64 takes longer than the sum
    const auto at = static_cast<uint32_t>(i);
    to = static_cast<int64_t>(at % s.columns) * s.r + at / s.columns;
  }
  static_cast<O*>(s.out)[to] = from_float<O>(s.scaling * total);
}

// Both sums of a pass: blocks from `down_blocks` on do the outer product's.
template <typename O>
__global__ void __launch_bounds__(kThreads)
    pass_sum_kernel(const Sum down, const Sum outer, unsigned down_blocks) {
  if (blockIdx.x < down_blocks) {
    add_parts<float>(down, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  } else {
    add_parts<O>(outer, static_cast<int64_t>(blockIdx.x - down_blocks) * kThreads + threadIdx.x);
  }
}

// Column blocks and runs of tokens: as many CTAs as the SMs hold at once, but runs of at least 64
// tokens.
struct PassGrid {
  int64_t blocks, runs, run;
};
int rank_groups(int r) { return (r + kRanks - 1) / kRanks; }
template <typename S>
PassGrid shape_grid(const Pass& p) {
  const int64_t blocks = (p.c + S::kColumns - 1) / S::kColumns;
  const int64_t slots = device().multiprocessors * kCtas;
  const int64_t wanted = std::max<int64_t>(1, slots / (blocks * rank_groups(p.r)));
  const int64_t most = std::max<int64_t>(1, std::min(wanted, p.m / 64));
  constexpr int64_t kUnit = kStep * S::kTokenGroups;
  const int64_t run = (p.m + most * kUnit - 1) / (most * kUnit) * kUnit;
  return {blocks, (p.m + run - 1) / run, run};
}
PassGrid pass_grid(const Pass& p) {
  return p.down_out != nullptr ? shape_grid<PassShape<true>>(p) : shape_grid<PassShape<false>>(p);
}

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }
size_t down_bytes(const Pass& p, const PassGrid& g) {
  return p.down_out == nullptr ? 0 : rounded(g.blocks * p.r * p.m * sizeof(float));
}

template <typename T, bool kDown, bool kOuter>
int launch_shape(const PassArguments& a, const PassGrid& g, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(g.blocks) * a.groups, static_cast<unsigned>(g.runs));
  return launch(pass_kernel<T, kDown, kOuter>, grid, dim3(kThreads), PassShape<kDown>::kShared,
                stream, a);
}

template <typename T>
int launch_pass(const PassArguments& a, const PassGrid& g, cudaStream_t stream) {
  if (a.down == nullptr) return launch_shape<T, false, true>(a, g, stream);
  return a.outer == nullptr ? launch_shape<T, true, false>(a, g, stream)
                            : launch_shape<T, true, true>(a, g, stream);
}

unsigned sum_blocks(const Sum& s) {
  return static_cast<unsigned>((s.size + kThreads - 1) / kThreads);
}

}  // namespace

bool pass_takes(const Pass& p) {
  if (p.in_dtype != NF4_FLOAT16 && p.in_dtype != NF4_BFLOAT16) return false;
  const bool masked = p.dropout.seed != nullptr;
  if (p.m >= int64_t{1} << 31 || p.c * p.r >= int64_t{1} << 31) return false;
  if (masked && p.down_out != nullptr) return false;
  return device().compute_capability >= 80 && p.m > 0 && p.c % 8 == 0 && aligned16(p.in);
}

size_t tile_pass_workspace(const Pass& p) {
  const PassGrid g = pass_grid(p);
  return down_bytes(p, g) + (p.outer_out == nullptr ? 0 : g.runs * p.r * p.c * sizeof(float));
}

int tile_pass(const Pass& p, void* workspace, cudaStream_t stream) {
  const PassGrid g = pass_grid(p);
  auto* base = static_cast<unsigned char*>(workspace);
  PassArguments a = {};
  a.in = p.in, a.right = p.right, a.left = p.left;
  a.m = p.m, a.c = p.c, a.run = g.run;
  a.r = p.r, a.right_dtype = p.right_dtype;
  a.groups = static_cast<unsigned>(rank_groups(p.r));
  a.dropout = p.dropout;
  if (p.down_out != nullptr) a.down = reinterpret_cast<float*>(base);
  if (p.outer_out != nullptr) a.outer = reinterpret_cast<float*>(base + down_bytes(p, g));
  const int status = p.in_dtype == NF4_FLOAT16 ? launch_pass<__half>(a, g, stream)
                                               : launch_pass<__nv_bfloat16>(a, g, stream);
  if (status != 0) return status;
  // What is kept of `in` after dropout is multiplied here.
  const float scaling = p.outer_scaling * (p.dropout.seed ? p.dropout.keep_scale : 1.0f);
  const Sum down = {a.down,
                    p.down_out,
                    a.down == nullptr ? 0 : p.m * p.r,
                    static_cast<int>(g.blocks),
                    p.r,
                    p.down_scaling,
                    0};
  const Sum outer = {a.outer,
                     p.outer_out,
                     a.outer == nullptr ? 0 : p.c * p.r,
                     static_cast<int>(g.runs),
                     p.r,
                     scaling,
                     p.outer_transposed ? static_cast<uint32_t>(p.c) : 0};
  return with_dtype(p.outer_out == nullptr ? NF4_FLOAT32 : p.outer_dtype, [&](auto element) {
    return launch(pass_sum_kernel<decltype(element)>, dim3(sum_blocks(down) + sum_blocks(outer)),
                  dim3(kThreads), 0, stream, down, outer, sum_blocks(down));
  });
}

}  // namespace nf4::cuda
