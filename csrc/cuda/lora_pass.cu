// What a backward pass wants of dY and of x, each read once: dS = dY B and dB = dY^T S in one pass
// over dY, dA = dS^T dropout(x) in one pass over x.
//
// A CTA walks over a run of tokens with 256 columns, 32 to a warp; steps of 32 tokens come by
// asynchronous copies. Ranks are the 16-row operand of mma.m16n8k16, for both products alike:
// ldmatrix gives the step's elements as columns by tokens or, transposed, as tokens by columns. The
// narrow operands are split into two 16-bit parts. The sums over runs of tokens and over columns
// are each finished by a second kernel, in order.
#include <algorithm>

#include "launch.cuh"
#include "lora_pass.cuh"
#include "shared.cuh"

namespace nf4::cuda {
namespace {

// acc[rank tile][column tile] += left^T in over the 32 tokens of a step.
template <typename T, int kRankTiles>
__device__ __forceinline__ void add_outer(float (&acc)[kRankTiles][kWarpColumns / 8][4],
                                          const unsigned char* stage, const unsigned char* left) {
  using S = PassShape<kRankTiles>;
  const int warp = threadIdx.x / 32, tile = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
#pragma unroll
  for (int ks = 0; ks < kTokens / 16; ++ks) {
    uint32_t b[kWarpColumns / 16][4];
#pragma unroll
    for (int np = 0; np < kWarpColumns / 16; ++np) {
      load_matrix_x4<true>(b[np], stage + (ks * 16 + tile % 2 * 8 + row) * kRow +
                                      (warp * kWarpColumns + np * 16 + tile / 2 * 8) * 2);
    }
#pragma unroll
    for (int rt = 0; rt < kRankTiles; ++rt) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t a[4];
        load_matrix_x4<true>(a, left + part * S::kLeftPart +
                                    (ks * 16 + tile / 2 * 8 + row) * S::kLeftRow +
                                    (rt * 16 + tile % 2 * 8) * 2);
#pragma unroll
        for (int nt = 0; nt < kWarpColumns / 8; ++nt) {
          const uint32_t x[2] = {b[nt / 2][nt % 2 * 2], b[nt / 2][nt % 2 * 2 + 1]};
          mma_m16n8k16<T>(acc[rt][nt], a, x);
        }
      }
    }
  }
}

// The A fragments of `right`^T for this warp's columns: [column step][part].
template <typename T>
__device__ __forceinline__ void load_right(uint32_t (&a)[kWarpColumns / 16][2][4],
                                           const PassArguments& p, int64_t column_block,
                                           int first_rank) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t base = column_block * kColumns + warp * kWarpColumns + 2 * t;
  const auto right = [&](int64_t column, int rank) {
    if (column >= p.c || rank >= p.r) return 0.0f;
    return element_of(p.right, p.right_dtype, column * p.r + rank);
  };
#pragma unroll
  for (int ks = 0; ks < kWarpColumns / 16; ++ks) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t column = base + ks * 16 + i / 2 * 8;
      const int rank = first_rank + g + i % 2 * 8;
      split2<T>(right(column, rank), right(column + 1, rank), a[ks][0][i], a[ks][1][i]);
    }
  }
}

// reduce[warp][rank][token] = this warp's columns' part of (in right)^T for 16 ranks.
template <typename T>
__device__ __forceinline__ void multiply_down(float* reduce, const unsigned char* stage,
                                              const uint32_t (&a)[kWarpColumns / 16][2][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = lane / 8, row = lane % 8;
  float acc[kTokens / 8][4] = {};
#pragma unroll
  for (int ks = 0; ks < kWarpColumns / 16; ++ks) {
#pragma unroll
    for (int tp = 0; tp < kTokens / 16; ++tp) {
      uint32_t b[4];
      load_matrix_x4<false>(b, stage + (tp * 16 + tile / 2 * 8 + row) * kRow +
                                   (warp * kWarpColumns + ks * 16 + tile % 2 * 8) * 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t x[2] = {b[half * 2], b[half * 2 + 1]};
        mma_m16n8k16<T>(acc[tp * 2 + half], a[ks][0], x);
        mma_m16n8k16<T>(acc[tp * 2 + half], a[ks][1], x);
      }
    }
  }
#pragma unroll
  for (int tt = 0; tt < kTokens / 8; ++tt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int rank = lane / 4 + half * 8, token = tt * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(reduce + (warp * 16 + rank) * kReduceRow + token) =
          make_float2(acc[tt][2 * half], acc[tt][2 * half + 1]);
    }
  }
}

template <typename T, int kRankTiles, bool kDown, bool kOuter>
__global__ void __launch_bounds__(kThreads, kRankTiles == 1 ? 2 : 1)
    pass_kernel(const PassArguments p) {
  using S = PassShape<kRankTiles>;
  constexpr bool kMasked = kOuter && !kDown;  // grad_y, which both are wanted of, has no dropout
  Carve carve;
  unsigned char* stages = carve.take<unsigned char>(kStages * kStage);
  unsigned char* lefts = carve.take<unsigned char>(S::kLeft);
  float* reduce = carve.take<float>(S::kReduce);
  const unsigned column_block = blockIdx.x / p.groups;
  const int64_t begin = blockIdx.y * p.run;
  const int64_t end = begin + p.run < p.m ? begin + p.run : p.m;
  const int first_rank = blockIdx.x % p.groups * S::kRanks;
  const int64_t seed = kMasked && p.dropout.seed != nullptr ? *p.dropout.seed : 0;
  const int steps = static_cast<int>((end - begin + kTokens - 1) / kTokens);

  PassLoader<T> loader(p, column_block, begin, end);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) loader.load(p, stages + stage * kStage);
    cp_async_commit();
  }
  LeftLoader<T, kRankTiles> left;
  if constexpr (kOuter) left.load(p, begin, end, first_rank);
  uint32_t right[kDown ? kRankTiles : 1][kWarpColumns / 16][2][4];
  if constexpr (kDown) {
#pragma unroll
    for (int rt = 0; rt < kRankTiles; ++rt)
      load_right<T>(right[rt], p, column_block, first_rank + rt * 16);
  }
  float acc[kOuter ? kRankTiles : 1][kWarpColumns / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    unsigned char* here = stages + stage * kStage;
    unsigned char* left_here = lefts + i % 2 * 2 * S::kLeftPart;
#if !defined(NF4_PLANT_MISSING_PASS_WAIT)
    cp_async_wait<kStages - 2>();
#endif
    if constexpr (kMasked) {
      if (p.dropout.seed != nullptr) {
        const int loaded = i + kStages - 1 < steps ? i + kStages - 1 : steps;
        loader.drop(p, seed, loaded - i, here);
      }
    }
    if constexpr (kOuter) {
      left.store(left_here);
    }
#if !defined(NF4_PLANT_MISSING_PASS_BARRIER)
    __syncthreads();  // the step has landed for all, and all have left the one loaded next
#endif
    if (i + kStages - 1 < steps) {
      loader.load(p, stages + (stage == 0 ? kStages - 1 : stage - 1) * kStage);
    }
    cp_async_commit();
    if constexpr (kDown) {
#pragma unroll
      for (int rt = 0; rt < kRankTiles; ++rt) {
        if (rt > 0) __syncthreads();  // all have read the sums of the ranks before
        multiply_down<T>(reduce, here, right[rt]);
        __syncthreads();
        const int64_t token = begin + static_cast<int64_t>(i) * kTokens + threadIdx.x % kTokens;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int within = threadIdx.x / kTokens + half * 8, rank = first_rank + rt * 16 + within;
          float total = 0.0f;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            total += reduce[(w * 16 + within) * kReduceRow + threadIdx.x % kTokens];
          }
          if (token < end && rank < p.r) {
            p.down[(static_cast<int64_t>(column_block) * p.r + rank) * p.m + token] = total;
          }
        }
      }
    }
    if constexpr (kOuter) {
      if (i + 1 < steps) left.load(p, begin + (i + 1) * kTokens, end, first_rank);
      add_outer<T, kRankTiles>(acc, here, left_here);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();

  if constexpr (kOuter) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int rt = 0; rt < kRankTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int rank = first_rank + rt * 16 + g + half * 8;
        if (rank >= p.r) continue;
        float* row = p.outer + (static_cast<int64_t>(blockIdx.y) * p.r + rank) * p.c;
#pragma unroll
        for (int nt = 0; nt < kWarpColumns / 8; ++nt) {
          const int64_t column =
              static_cast<int64_t>(column_block) * kColumns + warp * kWarpColumns + nt * 8 + 2 * t;
          if (column < p.c) {
            *reinterpret_cast<float2*>(row + column) =
                make_float2(acc[rt][nt][2 * half], acc[rt][nt][2 * half + 1]);
          }
        }
      }
    }
  }
}

// out [columns, r] (transposed: [r, columns]) = scaling * the sum of partial [count][r][columns],
// in order, rounded once.
template <typename O>
__global__ void __launch_bounds__(kThreads)
    pass_sum_kernel(const float* __restrict__ partial, O* __restrict__ out, int64_t columns, int r,
                    int count, float scaling, bool transposed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= columns * r) return;
  float total = 0.0f;
  for (int part = 0; part < count; ++part) total += partial[part * columns * r + i];
  out[transposed ? i : i % columns * r + i / columns] = from_float<O>(scaling * total);
}

// Column blocks and runs of tokens: enough CTAs for two an SM, runs of at least 128 tokens.
struct PassGrid {
  int64_t blocks, runs, run;
};
PassGrid pass_grid(const Pass& p) {
  const int64_t blocks = (p.c + kColumns - 1) / kColumns;
  const int64_t wanted = (2 * device().multiprocessors + blocks - 1) / blocks;
  const int64_t most = std::max<int64_t>(1, std::min(wanted, (p.m + 127) / 128));
  const int64_t run = (p.m + most * kTokens - 1) / (most * kTokens) * kTokens;
  return {blocks, (p.m + run - 1) / run, run};
}

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }
size_t down_bytes(const Pass& p, const PassGrid& g) {
  return p.down_out == nullptr ? 0 : rounded(g.blocks * p.r * p.m * sizeof(float));
}

template <typename T, int kRankTiles>
int launch_pass(PassArguments a, const PassGrid& g, cudaStream_t stream) {
  using S = PassShape<kRankTiles>;
  a.groups = (a.r + S::kRanks - 1) / S::kRanks;
  const dim3 grid(static_cast<unsigned>(g.blocks) * a.groups, static_cast<unsigned>(g.runs));
  const auto run = [&](auto kernel) {
    return launch(kernel, grid, dim3(kThreads), S::kShared, stream, a);
  };
  if (a.down == nullptr) return run(pass_kernel<T, kRankTiles, false, true>);
  return a.outer == nullptr ? run(pass_kernel<T, kRankTiles, true, false>)
                            : run(pass_kernel<T, kRankTiles, true, true>);
}

int sum(const float* partial, void* out, int dtype, int64_t columns, int r, int64_t count,
        float scaling, bool transposed, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((columns * r + kThreads - 1) / kThreads);
  return with_dtype(dtype, [&](auto element) {
    using O = decltype(element);
    return launch(pass_sum_kernel<O>, dim3(blocks), dim3(kThreads), 0, stream, partial,
                  static_cast<O*>(out), columns, r, static_cast<int>(count), scaling, transposed);
  });
}

}  // namespace

bool pass_takes(const Pass& p) {
  if (p.in_dtype != NF4_FLOAT16 && p.in_dtype != NF4_BFLOAT16) return false;
  const bool masked = p.dropout.seed != nullptr;
  if (p.m >= int64_t{1} << 31 || (masked && p.down_out != nullptr)) return false;
  return device().compute_capability >= 80 && p.m > 0 && p.c % 8 == 0 && aligned16(p.in);
}

size_t tile_pass_workspace(const Pass& p) {
  const PassGrid g = pass_grid(p);
  return down_bytes(p, g) + (p.outer_out == nullptr ? 0 : g.runs * p.r * p.c * sizeof(float));
}

int tile_pass(const Pass& p, void* workspace, cudaStream_t stream) {
  const PassGrid g = pass_grid(p);
  auto* base = static_cast<unsigned char*>(workspace);
  PassArguments a = {p.in, p.right, p.left, nullptr,       nullptr, p.m,
                     p.c,  g.run,   p.r,    p.right_dtype, 0,       p.dropout};
  if (p.down_out != nullptr) a.down = reinterpret_cast<float*>(base);
  if (p.outer_out != nullptr) a.outer = reinterpret_cast<float*>(base + down_bytes(p, g));
  const auto by_ranks = [&](auto element) {
    using T = decltype(element);
    return p.r <= 16 ? launch_pass<T, 1>(a, g, stream) : launch_pass<T, 2>(a, g, stream);
  };
  int status = p.in_dtype == NF4_FLOAT16 ? by_ranks(__half()) : by_ranks(__nv_bfloat16());
  if (status == 0 && a.down != nullptr) {
    status =
        sum(a.down, p.down_out, NF4_FLOAT32, p.m, p.r, g.blocks, p.down_scaling, false, stream);
  }
  if (status == 0 && a.outer != nullptr) {
    // What is kept of `in` after dropout is multiplied here.
    const float scaling = p.outer_scaling * (p.dropout.seed ? p.dropout.keep_scale : 1.0f);
    status = sum(a.outer, p.outer_out, p.outer_dtype, p.c, p.r, g.runs, scaling,
                 !p.outer_transposed, stream);
  }
  return status;
}

}  // namespace nf4::cuda
