// mbarrier: threads and copies that wait for each other without all having to meet (sm_80).
#pragma once

#include "ptx.cuh"

namespace nf4::cuda {

struct alignas(8) Mbarrier {
  uint64_t state;
};

// mbarrier.init: a phase ends after `arrivals` arrivals and all bytes that they expect. One thread
// initializes; a __syncthreads comes before any use.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::mbarrier_init(barrier, arrivals, file, line);
#elif !defined(NF4_BEFORE_SM80)
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#endif
}

// mbarrier.arrive: releases what this thread did before, and others before a barrier.
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::mbarrier_arrive(barrier, 0, file, line);
#elif !defined(NF4_BEFORE_SM80)
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(
                   shared_address(barrier))
               : "memory");
#endif
}

// mbarrier.try_wait.parity (test_wait before sm_90): returns when the phase of this parity has
// ended. The first phase has parity 0, and "the phase before it" parity 1: a wait for 1 on a fresh
// barrier returns at once. With NF4_BOUND_WAITS a wait that does not end becomes an error of the
// launch.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, uint32_t parity, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::mbarrier_wait(barrier, parity, file, line);
#elif !defined(NF4_BEFORE_SM80)
#if __CUDA_ARCH__ >= 900
#define NF4_WAIT "mbarrier.try_wait"
#else
#define NF4_WAIT "mbarrier.test_wait"
#endif
  uint32_t ended;
#if defined(NF4_BOUND_WAITS)
  int tries = 0;
#endif
  do {
    asm volatile("{\n.reg .pred p;\n" NF4_WAIT
                 ".parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#if defined(NF4_BOUND_WAITS)
    if (++tries > NF4_BOUND_WAITS) asm volatile("trap;\n");
#endif
  } while (ended == 0);
#undef NF4_WAIT
#endif
}

}  // namespace nf4::cuda
