// The ring of stages between the thread that loads and the warps that multiply, of hopper_tile.cu
// and hopper_backward.cu.
#pragma once

#include "hopper.cuh"

namespace nf4::cuda {

// The roles in a CTA: two warpgroups multiply, one thread of a third loads. Threads start with 168
// registers each; the third group gives most of its own to the others, which hold up to 128 sums.
struct HopperRoles {
  static constexpr int kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
  static_assert(kConsumers * kConsumerRegisters + 128 * kProducerRegisters <= 65536);
};

#if defined(NF4_HOPPER_CODE)

// Where a ring of stages stands, and the parity of the phase that its barriers go through.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One thread: `full` ends a phase when a stage has landed, `empty` when all consumers have left it:
// those of every CTA of the cluster, since what this CTA loads next may go to all of them.
template <typename S>
__device__ __forceinline__ void init_ring(Mbarrier* full, Mbarrier* empty) {
  for (int i = 0; i < S::kStages; ++i) {
    mbarrier_init(full + i, 1);
    mbarrier_init(empty + i, S::kCluster * (S::kConsumers / 32));
  }
  mbarrier_init_done();
}

// All threads: barriers are ready before other CTAs of the cluster copy or arrive there.
template <typename S>
__device__ __forceinline__ void sync_ring() {
  if constexpr (S::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

// The producer: waits until a stage is free.
template <typename S>
__device__ __forceinline__ void wait_empty(Mbarrier* empty, const Ring<S::kStages>& at) {
  mbarrier_wait(empty + at.stage, at.parity ^ 1);
}

// The producer, at the end: a CTA's shared memory has to outlive what others do there. Copies from
// them are consumed here; after their last arrivals every stage is free.
template <typename S>
__device__ __forceinline__ void outlive_cluster(Mbarrier* empty, Ring<S::kStages> at) {
  if constexpr (S::kCluster > 1) {
    for (int i = 0; i < S::kStages; ++i) {
      wait_empty<S>(empty, at);
      at.advance();
    }
  }
}

// The producer: loads its CTA's share of a box of `rows` rows that the whole cluster needs, and
// sends it to all. The map's box has rows / kCluster rows.
template <typename S>
__device__ __forceinline__ void load_shared(unsigned char* to, const TensorMap& map,
                                            Mbarrier* barrier, int c0, int c1, int rows) {
  if constexpr (S::kCluster > 1) {
    const int share = rows / S::kCluster;
    const int first = static_cast<int>(blockIdx.x % S::kCluster) * share;
    tma_load_all(to + first * 128, map, barrier, c0, c1 + first, S::kCluster);
  } else {
    tma_load(to, map, barrier, c0, c1);
  }
}

// What a consumer thread works on: a ring of stages in shared memory.
template <typename S>
struct Stages {
  const unsigned char *tokens, *weights;
  Mbarrier *full, *empty;
  Ring<S::kStages> ring;

  __device__ __forceinline__ void wait(const Ring<S::kStages>& at) const {
#if defined(NF4_PLANT_WRONG_PHASE)
    mbarrier_wait(full + at.stage, at.parity ^ 1);
#elif !defined(NF4_PLANT_MISSING_MBARRIER_WAIT)
    mbarrier_wait(full + at.stage, at.parity);
#endif
  }
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();  // all lanes have read
    const int lane = threadIdx.x % 32;
    if constexpr (S::kCluster > 1) {
#if defined(NF4_PLANT_LOCAL_RELEASE)
      if (lane < S::kCluster) mbarrier_arrive(empty + stage);
#else
      if (lane < S::kCluster) mbarrier_arrive_at(empty + stage, lane);
#endif
    } else {
      if (lane == 0) mbarrier_arrive(empty + stage);
    }
  }
  __device__ __forceinline__ const unsigned char* tokens_at(int stage) const {
    return tokens + stage * S::kTokenStage;
  }
  __device__ __forceinline__ const unsigned char* weights_at(int stage) const {
    return weights + stage * S::kWeightStage;
  }
};

// `steps` steps whose operands both lie in shared memory, the products of two steps under way:
// `issue(tokens, weights)` asks for those of one stage.
template <typename S, typename Issue>
__device__ __forceinline__ void multiply_steps(Stages<S>& in, int steps, const Issue& issue) {
  int before = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    const int stage = in.ring.stage;
    in.wait(in.ring);
    wgmma_fence();
    issue(in.tokens_at(stage), in.weights_at(stage));
    wgmma_commit();
#if !defined(NF4_PLANT_MISSING_WGMMA_WAIT)
    wgmma_wait<1>();
#endif
    if (i > 0) in.release(before);
    before = stage;
    in.ring.advance();
  }
  wgmma_wait<0>();
  if (steps > 0) in.release(before);
}

#endif  // NF4_HOPPER_CODE

}  // namespace nf4::cuda
