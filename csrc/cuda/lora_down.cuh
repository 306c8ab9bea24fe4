// s = dropout(x) A^T on tensor cores, as tasks of 16 ranks by a few tokens each.
//
// A matmul's CTAs do the tasks before their own tiles, and wait for all before they add the
// up-projection.
// Operands go from global memory straight into fragments: lane t of a quad owns 8 consecutive
// elements of K of each row, in both operands alike, which permutes K and changes no sum's terms.
// The adapter is split into two 16-bit parts, so float32 adapters lose nothing that x's dtype
// keeps.
#pragma once

#include "launch.cuh"
#include "matmul.cuh"
#include "up.cuh"

namespace nf4::cuda {

constexpr int kDownWarps = 8;
constexpr int kDownRanks = 16;
constexpr size_t kCounterBytes = 256;  // of workspace, for DownWork::counters

// Shared memory of a task in floats.
template <int kTokenTiles>
constexpr int kDownScratch = kDownWarps * kDownRanks * 8 * kTokenTiles;

// Clears what the mask drops of the 8 elements from `first` on, a multiple of 8. What is left is
// still to be multiplied by keep_scale.
__device__ __forceinline__ void drop8(uint4& x, const Dropout& d, int64_t seed, int64_t first) {
  uint32_t* pair = &x.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 w = philox(seed, first / 4 + half);
    const uint32_t low = (is_kept(d, w.x) ? 0xffffu : 0) | (is_kept(d, w.y) ? 0xffff0000u : 0);
    const uint32_t high = (is_kept(d, w.z) ? 0xffffu : 0) | (is_kept(d, w.w) ? 0xffff0000u : 0);
    pair[2 * half] &= low;
    pair[2 * half + 1] &= high;
  }
}

// What a lane loads of 256 elements of K that the 8 warps split: 8 elements of each of its tokens,
// and of two ranks.
template <typename T, int kTokenTiles>
class DownStep {
 public:
  __device__ __forceinline__ void load(const Down& p, int64_t m, int64_t first_token,
                                       int first_rank, int64_t i) {
    const int g = threadIdx.x % 32 / 4;
    const bool inside = i < p.c;  // all 8 or none: c % 8 == 0
#pragma unroll
    for (int tt = 0; tt < kTokenTiles; ++tt) {
      const int64_t token = first_token + tt * 8 + g;
      x_[tt] = make_uint4(0, 0, 0, 0);
      if (inside && token < m) {
        x_[tt] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.in) + token * p.c + i);
      }
    }
    const bool wide = p.right_dtype == NF4_FLOAT32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int rank = first_rank + g + 8 * half;
      const bool valid = inside && rank < p.r;
      const auto* at =
          static_cast<const unsigned char*>(p.right) + (rank * p.c + i) * (wide ? 4 : 2);
      w_[half][0] = w_[half][1] = make_uint4(0, 0, 0, 0);
      if (valid) w_[half][0] = reinterpret_cast<const uint4*>(at)[0];
      if (valid && wide) w_[half][1] = reinterpret_cast<const uint4*>(at)[1];
    }
  }
  // acc[token tile] += right in^T.
  __device__ __forceinline__ void multiply(float (&acc)[kTokenTiles][4], const Down& p,
                                           int64_t first_token, int64_t seed, int64_t i) {
    const int g = threadIdx.x % 32 / 4;
    uint32_t high[2][4], low[2][4];  // elements 4 s to 4 s + 3 of a lane are k16 step s
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float w[8];
      unpack8(w_[half], p.right_dtype, w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        split2<T>(w[2 * j], w[2 * j + 1], high[j / 2][j % 2 * 2 + half],
                  low[j / 2][j % 2 * 2 + half]);
      }
    }
    if (p.dropout.seed != nullptr) {
#pragma unroll
      for (int tt = 0; tt < kTokenTiles; ++tt) {
        drop8(x_[tt], p.dropout, seed, (first_token + tt * 8 + g) * p.c + i);
      }
    }
#pragma unroll
    for (int tt = 0; tt < kTokenTiles; ++tt) {
      const uint32_t first[2] = {x_[tt].x, x_[tt].y}, second[2] = {x_[tt].z, x_[tt].w};
      mma_m16n8k16<T>(acc[tt], high[0], first);
      mma_m16n8k16<T>(acc[tt], high[1], second);
      mma_m16n8k16<T>(acc[tt], low[0], first);
      mma_m16n8k16<T>(acc[tt], low[1], second);
    }
  }

 private:
  static __device__ __forceinline__ void unpack8(const uint4 (&raw)[2], int dtype, float (&v)[8]) {
    const uint32_t words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                               raw[1].x, raw[1].y, raw[1].z, raw[1].w};
    if (dtype == NF4_FLOAT32) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = __uint_as_float(words[j]);
    } else if (dtype == NF4_FLOAT16) {
#pragma unroll
      for (int j = 0; j < 4; ++j) unpack2<__half>(words[j], v[2 * j], v[2 * j + 1]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) unpack2<__nv_bfloat16>(words[j], v[2 * j], v[2 * j + 1]);
    }
  }

  uint4 x_[kTokenTiles];
  uint4 w_[2][2];
};

// s of tokens [first_token, first_token + 8 kTokenTiles) and ranks [first_rank, first_rank + 16):
// calls `store(token, rank, value)` for each, ranks past r included, where it is zero. The first 8
// warps share the reduction, their sums are added in warp order; every thread of the block has to
// call, and `scratch` is free again at the next barrier.
// `kAhead`: while one step is multiplied the next is on its way.
template <typename T, int kTokenTiles, bool kAhead, typename Store>
__device__ __forceinline__ void down_task(const Down& p, int64_t m, int64_t first_token,
                                          int first_rank, float* scratch, const Store& store) {
  constexpr int kTokens = 8 * kTokenTiles;
  constexpr int64_t kWide = kDownWarps * 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t seed = p.dropout.seed != nullptr ? *p.dropout.seed : 0;
  if (warp < kDownWarps) {
    float acc[kTokenTiles][4] = {};
    DownStep<T, kTokenTiles> even, odd;
    int64_t i = warp * 32 + t * 8;
    if constexpr (kAhead) even.load(p, m, first_token, first_rank, i);
    for (; i - t * 8 < p.c; i += (kAhead ? 2 : 1) * kWide) {
      if constexpr (kAhead) {
        odd.load(p, m, first_token, first_rank, i + kWide);
        even.multiply(acc, p, first_token, seed, i);
        even.load(p, m, first_token, first_rank, i + 2 * kWide);
        odd.multiply(acc, p, first_token, seed, i + kWide);
      } else {
        even.load(p, m, first_token, first_rank, i);
        even.multiply(acc, p, first_token, seed, i);
      }
    }
#pragma unroll
    for (int tt = 0; tt < kTokenTiles; ++tt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tt * 8 + 2 * t + i % 2, rank = g + i / 2 * 8;
        scratch[(warp * kTokens + token) * kDownRanks + rank] = acc[tt][i];
      }
    }
  }
  __syncthreads();
  const float scale = p.dropout.seed != nullptr ? p.scaling * p.dropout.keep_scale : p.scaling;
  for (int i = threadIdx.x; i < kTokens * kDownRanks; i += blockDim.x) {
    const int64_t token = first_token + i / kDownRanks;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kDownWarps; ++w) total += scratch[w * kTokens * kDownRanks + i];
    if (token < m) store(token, first_rank + i % kDownRanks, scale * total);
  }
}

// The tasks of one launch, over all weights that share x.
struct DownWork {
  int tasks;  // 0: s is there already
  int rank_tasks;
  int first[kMaxMembers + 1];  // rank tasks of the members before
  int count;
  int* counters;  // [tasks taken, tasks finished], zero when the launch begins
  int64_t m;
  Down members[kMaxMembers];
};

// The member and its first rank of the `task`-th of all rank tasks.
struct RankTask {
  const Down& p;
  int first_rank;
};
__device__ __forceinline__ RankTask rank_task_of(const DownWork& w, int task) {
  int i = 0;
  while (i + 1 < w.count && task >= w.first[i + 1]) ++i;
  return {w.members[i], (task - w.first[i]) * kDownRanks};
}

// One task of all; `store(member, token, rank, value)`.
template <typename T, int kTokenTiles, bool kAhead, typename Store>
__device__ __forceinline__ void do_task(const DownWork& w, int task, float* scratch,
                                        const Store& store) {
  const RankTask own = rank_task_of(w, task % w.rank_tasks);
  const int64_t first_token = static_cast<int64_t>(task / w.rank_tasks) * (8 * kTokenTiles);
  down_task<T, kTokenTiles, kAhead>(
      own.p, w.m, first_token, own.first_rank, scratch,
      [&](int64_t token, int rank, float value) { store(own.p, token, rank, value); });
}

// Does tasks until none is left. Whoever asks first gets the next, so every task is with a CTA that
// runs, and waiting for them (wait_for_tasks) needs no CTA to start: no matter how many fit the GPU
// at once. `ticket` is an int in shared memory.
template <typename T, int kTokenTiles, typename Store, typename Written>
__device__ __forceinline__ void down_phase(const DownWork& w, float* scratch, int* ticket,
                                           const Store& store, const Written& written) {
  if (w.tasks == 0) return;
  while (true) {
    if (threadIdx.x == 0) *ticket = take_ticket(w.counters);
    __syncthreads();
    const int task = *ticket;
    if (task >= w.tasks) break;
    // The other numbers of tokens are those of linear_tile.cuh, which has no registers left for it.
    do_task<T, kTokenTiles, kTokenTiles == 2>(w, task, scratch, store);
    written();
    __syncthreads();
    if (threadIdx.x == 0) publish(w.counters + 1);
  }
  __syncthreads();  // all have read the ticket
}

// To be called by every thread that reads s, before it does.
__device__ __forceinline__ void wait_for_tasks(const int* counters, int tasks) {
#if !defined(NF4_PLANT_MISSING_TASK_WAIT)
  wait_for(counters + 1, tasks);
#endif
}

// Whether the tasks can compute a down-projection.
inline bool down_takes(const Down& d, int dtype, int64_t m) {
  return m > 0 && m < int64_t{1} << 24 && d.c % 8 == 0 && dtype != NF4_FLOAT32 && aligned16(d.in) &&
         aligned16(d.right);
}

inline DownWork down_work(const Matmul& p, int token_tiles, void* counters) {
  DownWork w = {};
  if (p.down_count == 0) return w;
  w.count = p.down_count;
  w.counters = static_cast<int*>(counters);
  w.m = p.m;
  for (int i = 0; i < w.count; ++i) {
    w.members[i] = p.downs[i];
    w.first[i + 1] = w.first[i] + (p.downs[i].r + kDownRanks - 1) / kDownRanks;
  }
  w.rank_tasks = w.first[w.count];
  w.tasks = static_cast<int>((w.m + 8 * token_tiles - 1) / (8 * token_tiles)) * w.rank_tasks;
  return w;
}
inline int clear_counters(const DownWork& w, cudaStream_t stream) {
  return w.tasks == 0 ? 0 : clear(w.counters, 2 * sizeof(int), stream);
}

}  // namespace nf4::cuda
