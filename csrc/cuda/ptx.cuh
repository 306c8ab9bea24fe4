// Every instruction that CUDA C++ has no name for. Kernel files contain no inline assembly.
//
// Each wrapper has two sides: PTX for nvcc, and a call into tests/cuda_on_cpu for g++, where the
// same kernel files run on a CPU. tests/test_cuda_golden.py pins the PTX sides on a GPU.
#pragma once

#if defined(NF4_EMULATE)
#include "emulation.h"
#define NF4_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define NF4_SITE int = 0
#endif

#include <cstdint>
#include <type_traits>

#if !defined(NF4_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define NF4_BEFORE_SM80 1
#endif

namespace nf4::cuda {

#if !defined(NF4_EMULATE)
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// lop3: (value & mask) | bits in one instruction, which the compiler otherwise splits in two where
// it finds the first half useful elsewhere.
__device__ __forceinline__ uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) {
#if defined(NF4_EMULATE)
  return (value & mask) | bits;
#else
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(out) : "r"(value), "r"(mask), "r"(bits));
  return out;
#endif
}

// The square root and the quotient, rounded as IEEE wants, by the sequences that nvcc uses for
// operands of moderate size, without its branch to one for all others: several can then be under
// way at once.
__device__ __forceinline__ float sqrt_moderate(float x) {
#if defined(NF4_EMULATE)
  return sqrtf(x);
#else
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;\n" : "=f"(inverse) : "f"(x));
  const float root = x * inverse;
  return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
#endif
}
__device__ __forceinline__ float divide_moderate(float a, float b) {
#if defined(NF4_EMULATE)
  return a / b;
#else
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(inverse) : "f"(b));
  inverse = fmaf(inverse, fmaf(-b, inverse, 1.0f), inverse);
  float quotient = a * inverse;
  quotient = fmaf(inverse, fmaf(-b, quotient, a), quotient);
  return fmaf(inverse, fmaf(-b, quotient, a), quotient);
#endif
}

// Tells the compiler that a pointer read from memory is a global one: ld.global instead of ld.
template <typename T>
__device__ __forceinline__ T* in_global(T* pointer) {
#if !defined(NF4_EMULATE)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// prefetch.global.L2: the 128 bytes around an address are wanted soon; no data reaches the thread.
__device__ __forceinline__ void prefetch_to_l2(const void* from) {
#if defined(NF4_EMULATE)
  static_cast<void>(from);
#else
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(from)));
#endif
}

// shfl.sync: the value that lane `lane` of this lane's quad holds.
__device__ __forceinline__ float from_quad_lane(float value, int lane) {
#if defined(NF4_EMULATE)
  return __shfl_sync(0xffffffffu, value, static_cast<int>(threadIdx.x & 28) + lane);
#else
  return __shfl_sync(0xffffffffu, value, lane, 4);
#endif
}

// redux.sync: the largest of the warp's 32 values, in every lane.
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if defined(NF4_EMULATE) || defined(NF4_BEFORE_SM80)
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, lanes);
    value = other > value ? other : value;
  }
  return value;
#else
  return __reduce_max_sync(0xffffffffu, value);
#endif
}

// max.NaN.xorsign.abs: of each half of two the larger magnitude, or a NaN. Its sign means nothing.
template <typename T>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
#if !defined(NF4_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
  uint32_t out;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b));
  }
  return out;
#else
  a &= 0x7fff7fffu, b &= 0x7fff7fffu;
  const uint32_t low_a = a & 0xffffu, low_b = b & 0xffffu;
  return ((a > b ? a : b) & 0xffff0000u) | (low_a > low_b ? low_a : low_b);
#endif
}

// red.add to a counter that nothing reads during the launch.
__device__ __forceinline__ void atomic_add(int64_t* counter, int64_t value) {
#if defined(NF4_EMULATE)
  emulation::atomic_add(counter, value);
#else
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
#endif
}

// The value of a counter, which becomes one more; of several blocks each gets another.
__device__ __forceinline__ int take_ticket(int* counter) {
#if defined(NF4_EMULATE)
  return emulation::take_ticket(counter);
#else
  return atomicAdd(counter, 1);
#endif
}

// Adds one to a counter after everything that this thread, or another before a barrier, wrote: who
// has seen the counter by wait_for sees that too.
__device__ __forceinline__ void publish(int* counter) {
#if defined(NF4_EMULATE)
  emulation::publish(counter);
#else
  __threadfence();
  atomicAdd(counter, 1);
#endif
}

// A ticket that whoever gets the next one sees the writes of: everything that this thread, or
// another before a barrier, wrote comes before, and everything that it reads after.
__device__ __forceinline__ int take_turn(int* counter) {
#if defined(NF4_EMULATE)
  return emulation::take_turn(counter);
#else
  __threadfence();
  const int ticket = atomicAdd(counter, 1);
  __threadfence();
  return ticket;
#endif
}

// ld.acquire until a counter is at least `value`.
__device__ __forceinline__ void wait_for(const int* counter, int value, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::wait_for(counter, value, file, line);
#else
  int seen;
  while (true) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n"
                 : "=r"(seen)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    if (seen >= value) return;
    __nanosleep(64);
  }
#endif
}

// cp.async: starts a copy of 16 bytes from global to shared memory, of which `valid` (0 to 16) are
// read and the rest become zero. Both addresses are multiples of 16. The data is there after
// cp_async_wait by the same thread, and for other threads after a barrier on top of that.
// Before sm_80 the copy happens at once.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int valid, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::cp_async(shared, global, 16, valid, file, line);
#elif defined(NF4_BEFORE_SM80)
  uint4 data = make_uint4(0, 0, 0, 0);
  if (valid == 16) {
    data = *static_cast<const uint4*>(global);
  } else {
    for (int i = 0; i < valid; ++i) {
      reinterpret_cast<unsigned char*>(&data)[i] = static_cast<const unsigned char*>(global)[i];
    }
  }
  *static_cast<uint4*>(shared) = data;
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid)
               : "memory");
#endif
}

// cp.async.commit_group: ends the group of copies that cp_async_wait counts.
__device__ __forceinline__ void cp_async_commit() {
#if defined(NF4_EMULATE)
  emulation::cp_async_commit();
#elif !defined(NF4_BEFORE_SM80)
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// cp.async.wait_group: waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(NF4_EMULATE)
  emulation::cp_async_wait(kPending);
#elif !defined(NF4_BEFORE_SM80)
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// ldmatrix.x4: four 8x8 tiles of 16-bit elements; lane 8i + j passes row j of tile i (16 bytes).
// Lane 4g + t gets, of each tile, row g, columns 2t and 2t + 1; transposed, rows 2t and 2t + 1 of
// column g.
template <bool kTranspose>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&out)[4], const void* row, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::LoadMatrix payload{out, row, kTranspose};
  emulation::warp_collective(emulation::load_matrix, &payload, file, line);
#else
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

// mma.m16n8k16, fp32 accumulators: c += a b. Lane 4g + t holds of a (16x16) rows g and g + 8,
// of b (16x8) column g: a[0] = a(g; 2t, 2t+1), a[1] = a(g+8; 2t, 2t+1), a[2] = a(g; 2t+8, 2t+9),
// a[3] = a(g+8; 2t+8, 2t+9); b[0] = b(2t, 2t+1; g), b[1] = b(2t+8, 2t+9; g);
// c[0], c[1] = c(g; 2t, 2t+1), c[2], c[3] = c(g+8; 2t, 2t+1).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], NF4_SITE);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2],
#if defined(NF4_EMULATE)
                                                     const char* file, int line) {
  emulation::Mma payload{c, a, b};
  emulation::warp_collective(emulation::mma_fp16, &payload, file, line);
#else
                                                     int) {
#if defined(NF4_BEFORE_SM80)
  // sm_75 has m16n8k8 only; its two fragments are the two halves of the k16 ones.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
#endif
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2],
#if defined(NF4_EMULATE)
                                                            const char* file, int line) {
  emulation::Mma payload{c, a, b};
  emulation::warp_collective(emulation::mma_bf16, &payload, file, line);
#else
                                                            int) {
#if !defined(NF4_BEFORE_SM80)  // launchers send bfloat16 on sm_75 to the general kernels
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
#endif
}

}  // namespace nf4::cuda
