// s = dropout(x) A^T for few tokens, on tensor cores: a warp a task, and so many tasks that no SM
// reads much of A.
//
// A group of tasks has 16 ranks and 8 tokens, and each task of it 256 elements of the reduction.
// Who finishes the last task of a group adds the parts of all, in their order. As in lora_down.cuh
// whoever asks first gets the next task, so waiting for all of them needs no CTA to start.
#pragma once

#include "lora_down.cuh"

namespace nf4::cuda {

constexpr int kFewSlice = 256;
constexpr int kFewGroups = static_cast<int>(kCounterBytes / sizeof(int)) - 2;

struct FewDown {
  DownWork work;  // tasks: groups. counters: [tasks taken, groups finished, tasks of each group]
  float4* parts;  // [group][slice][lane], as fragments
  int slices;
};

// The part of a task: 16 ranks by 8 tokens over one slice.
template <typename T>
__device__ __forceinline__ float4 few_down_part(const Down& p, int64_t m, int64_t token, int rank,
                                                int slice) {
  constexpr int kAtOnce = 2;  // loads of 32 elements under way
  const int64_t seed = p.dropout.seed != nullptr ? *p.dropout.seed : 0;
  const int64_t first = static_cast<int64_t>(slice) * kFewSlice + threadIdx.x % 4 * 8;
  float acc[1][4] = {};
#pragma unroll 1
  for (int i = 0; i < kFewSlice / 32; i += kAtOnce) {
    DownStep<T, 1> steps[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) steps[j].load(p, m, token, rank, first + (i + j) * 32);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      steps[j].multiply(acc, p, token, seed, first + (i + j) * 32);
    }
  }
  return make_float4(acc[0][0], acc[0][1], acc[0][2], acc[0][3]);
}

// Does tasks until none is left; for one warp of each CTA.
template <typename T>
__device__ __forceinline__ void few_down(const FewDown& f) {
  const DownWork& w = f.work;
  const int lane = threadIdx.x % 32;
  const auto for_all = [](int value) { return __shfl_sync(0xffffffffu, value, 0); };
#pragma unroll 1
  while (w.tasks != 0) {
    const int task = for_all(lane == 0 ? take_ticket(w.counters) : 0);
    if (task >= w.tasks * f.slices) break;
    const int group = task / f.slices;
    const auto [p, rank] = rank_task_of(w, group % w.rank_tasks);
    const int64_t token = static_cast<int64_t>(group / w.rank_tasks) * 8;
    float4* parts = f.parts + static_cast<int64_t>(group) * f.slices * 32 + lane;
    parts[task % f.slices * 32] = few_down_part<T>(p, w.m, token, rank, task % f.slices);
    __syncwarp();
    const int before = for_all(lane == 0 ? take_turn(w.counters + 2 + group) : 0);
    if (before + 1 < f.slices) continue;
    __syncwarp();
    float4 sum = make_float4(0, 0, 0, 0);
    for (int slice = 0; slice < f.slices; ++slice) {
      const float4 part = parts[slice * 32];
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    const float scale = p.dropout.seed != nullptr ? p.scaling * p.dropout.keep_scale : p.scaling;
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t row = token + lane % 4 * 2 + e % 2;
      const int column = rank + lane / 4 + e / 2 * 8;
      if (row < w.m && column < p.r) p.out[row * p.r + column] = scale * values[e];
    }
    __syncwarp();
    if (lane == 0) publish(w.counters + 1);
  }
}

// Whether the tasks can compute the down-projections of a launch over few tokens of `count`
// weights.
inline bool few_down_takes(const Matmul& p, int count) {
  if (p.down_count > count) return false;  // workspace is for those of this launch
  int groups = 0;
  for (int i = 0; i < p.down_count; ++i) {
    if (!down_takes(p.downs[i], p.dtype, p.m) || p.downs[i].c % kFewSlice != 0) return false;
    groups += (p.downs[i].r + kDownRanks - 1) / kDownRanks;
  }
  return groups * ((p.m + 7) / 8) <= kFewGroups;
}

// Workspace: the counters, then the parts. `groups_of_ranks`: of all members.
inline size_t few_down_bytes(int64_t m, int64_t c, int groups_of_ranks) {
  return kCounterBytes + (m + 7) / 8 * groups_of_ranks * (c / kFewSlice) * 32 * sizeof(float4);
}
inline FewDown few_down_work(const Matmul& p, void* workspace) {
  const DownWork work = down_work(p, 1, workspace);
  return {work, reinterpret_cast<float4*>(static_cast<unsigned char*>(workspace) + kCounterBytes),
          static_cast<int>(p.weight.k / kFewSlice)};
}

}  // namespace nf4::cuda
