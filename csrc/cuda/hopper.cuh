// Hopper's asynchronous instructions: mbarrier, copies by tensor map (TMA), wgmma; and clusters,
// the CTAs that see each other's shared memory.
//
// The rules of ptx.cuh hold here: one PTX side for sm_90a, one side for tests/cuda_on_cpu. For
// other architectures NF4_HOPPER_CODE is not defined, and kernels leave their bodies out.
#pragma once

#include <type_traits>

#include "mbarrier.cuh"

#if defined(NF4_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NF4_HOPPER_CODE 1
#endif

namespace nf4::cuda {

// What cuTensorMapEncodeTiled fills (tensor_map.cuh); a kernel gets it as a __grid_constant__.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

#if defined(NF4_EMULATE)
inline uint32_t shared_address(const void* pointer) { return emulation::shared_offset(pointer); }
#endif

#if defined(NF4_HOPPER_CODE)

// fence.proxy.async: what this thread wrote to shared memory before what asynchronous units read.
__device__ __forceinline__ void fence_async_shared() {
#if !defined(NF4_EMULATE)
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// Between mbarrier_init and its __syncthreads, by the same thread, where copies use the barriers.
__device__ __forceinline__ void mbarrier_init_done() {
#if !defined(NF4_EMULATE)
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
  fence_async_shared();
}

// mbarrier.arrive.expect_tx: an arrival; the phase also waits for `bytes` from copies.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::mbarrier_arrive(barrier, bytes, file, line);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// mapa, mbarrier.arrive: an arrival at the same barrier of CTA `rank` of this cluster. It says that
// reads are done, and makes no writes visible there: with .release.cluster it would, and ptxas puts
// a fence of the whole GPU before each.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank, NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::mbarrier_arrive_at(barrier, rank, file, line);
#else
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// barrier.cluster: all threads of the cluster's CTAs have come, and see what the others wrote.
__device__ __forceinline__ void cluster_sync(NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::cluster_barrier(file, line);
#else
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
#endif
}

// fence.proxy.async: what this thread wrote to global memory, or has seen of others' writes, before
// what asynchronous copies read from now on.
__device__ __forceinline__ void fence_async_global() {
#if !defined(NF4_EMULATE)
  asm volatile("fence.proxy.async.global;\n" ::: "memory");
#endif
}

// cp.async.bulk.tensor: one thread starts the copy of the map's box at these coordinates (innermost
// first) into shared memory; elements outside the tensor become zero. The bytes of the whole box
// count towards the barrier's phase, whose end makes them visible to those who wait for it.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, Mbarrier* barrier,
                                         int c0, int c1, NF4_SITE) {
#if defined(NF4_EMULATE)
  const int at[2] = {c0, c1};
  emulation::tma_load(shared, &map, barrier, at, 2, file, line);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(c0), "r"(c1), "r"(shared_address(barrier))
      : "memory");
#endif
}
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, Mbarrier* barrier,
                                         int c0, int c1, int c2, int c3, NF4_SITE) {
#if defined(NF4_EMULATE)
  const int at[4] = {c0, c1, c2, c3};
  emulation::tma_load(shared, &map, barrier, at, 4, file, line);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier))
      : "memory");
#endif
}

// The same box for the first `ctas` CTAs of the cluster: to the same place in the shared memory of
// each, and its bytes count towards the same barrier of each.
__device__ __forceinline__ void tma_load_all(void* shared, const TensorMap& map, Mbarrier* barrier,
                                             int c0, int c1, int ctas, NF4_SITE) {
#if defined(NF4_EMULATE)
  const int at[2] = {c0, c1};
  emulation::tma_load_all(shared, &map, barrier, at, 2, ctas, file, line);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(c0), "r"(c1), "r"(shared_address(barrier)),
      "h"(static_cast<uint16_t>((1 << ctas) - 1))
      : "memory");
#endif
}

// cp.async.bulk.tensor: one thread starts the copy of a box in shared memory to the map's tensor;
// what lies outside of it is left out. tma_store_commit ends a group of such copies, and
// tma_store_wait waits until this thread's have read shared memory. What other threads wrote there
// before needs their fence_async_shared and a barrier; the end of the kernel makes the copies
// visible.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int c0, int c1,
                                          NF4_SITE) {
#if defined(NF4_EMULATE)
  const int at[2] = {c0, c1};
  emulation::tma_store(&map, shared, at, 2, file, line);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(&map),
      "r"(c0), "r"(c1), "r"(shared_address(shared))
      : "memory");
#endif
}
__device__ __forceinline__ void tma_store_commit() {
#if !defined(NF4_EMULATE)
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void tma_store_wait() {
#if defined(NF4_EMULATE)
  emulation::tma_store_wait();
#else
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
#endif
}

// bar.sync: a barrier of one warpgroup, whose number gives the barrier's: 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_sync(NF4_SITE) {
  const int id = 1 + static_cast<int>(threadIdx.x / 128);
#if defined(NF4_EMULATE)
  emulation::named_barrier(id, 128, file, line);
#else
  asm volatile("bar.sync %0, 128;\n" ::"r"(id) : "memory");
#endif
}

// The descriptor of 16 columns of 16-bit elements in shared memory, from rows of 128 bytes that
// TMA swizzled by 128 bytes: start address / 16; 1024 bytes from one group of 8 rows to the next;
// layout 1. The tile is aligned to 1024, the columns start at a multiple of 32 bytes of its rows.
__device__ __forceinline__ uint64_t shared_matrix(const void* columns) {
  return (shared_address(columns) & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// The descriptor of 16 rows in shared memory, of 128 columns, whose reduction runs over the rows
// (the PTX ISA calls it MN-major): blocks of 64 columns, each from rows of 128 bytes as above, with
// `to_next` bytes from one block to the next. Such a matrix has both offsets: the leading one from
// block to block, the stride one, 1024 bytes, from one group of 8 rows to the next. So say the PTX
// ISA ("Major-ness supported by Strides", canonical layout of the 128-byte swizzle
// ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)) with T = 8) and, in the same words, CUTLASS's
// make_gmma_desc<Major::MN>; ThunderKittens' MN-major descriptors hold the same two numbers. 16
// rows on are 2048 bytes on.
__device__ __forceinline__ uint64_t shared_matrix_by_rows(const void* rows, int to_next) {
  return (shared_address(rows) & 0x3ffff) >> 4 |
         uint64_t{static_cast<uint32_t>(to_next) >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// The same matrix `bytes` further on, without touching the high half of its descriptor.
__device__ __forceinline__ uint64_t moved(uint64_t matrix, int bytes) {
  const auto low = static_cast<uint32_t>(matrix) + static_cast<uint32_t>(bytes / 16);
  return matrix >> 32 << 32 | low;
}

// setmaxnreg: from here on each thread of this warpgroup has kCount registers; a warpgroup that
// takes more waits for another to give some back. Without meaning on a CPU.
template <int kCount>
__device__ __forceinline__ void give_registers() {
#if !defined(NF4_EMULATE)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
#if !defined(NF4_EMULATE)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
#endif
}

// wgmma.fence: before the first wgmma, and again after registers of one were written.
__device__ __forceinline__ void wgmma_fence(NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::warp_collective(emulation::wgmma_fence, nullptr, file, line);
#else
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// wgmma.commit_group: ends the group of products that wgmma_wait counts.
__device__ __forceinline__ void wgmma_commit(NF4_SITE) {
#if defined(NF4_EMULATE)
  emulation::warp_collective(emulation::wgmma_commit, nullptr, file, line);
#else
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// wgmma.wait_group: waits until at most kPending of this warp's groups are under way. Until then
// neither accumulators nor fragments nor the operands in shared memory may be touched.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(NF4_SITE) {
#if defined(NF4_EMULATE)
  int pending = kPending;
  emulation::warp_collective(emulation::wgmma_wait, &pending, file, line);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

// No instruction: a fragment is complete at this point and its registers hold nothing else. Belongs
// before the fence, so that no part of it is computed between the products (ptxas then waits after
// each, C7513), and after the wait, so that its registers are not used again too early.
__device__ __forceinline__ void wgmma_pin(uint32_t (&a)[4]) {
#if defined(NF4_EMULATE)
  static_cast<void>(a);
#else
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
#endif
}

#define NF4_F4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define NF4_F16(d, i) NF4_F4(d, i), NF4_F4(d, i + 1), NF4_F4(d, i + 2), NF4_F4(d, i + 3)
#define NF4_F64(d) NF4_F16(d, 0), NF4_F16(d, 4), NF4_F16(d, 8), NF4_F16(d, 12)
#define NF4_F128(d) NF4_F64(d[0]), NF4_F64(d[1])
// clang-format off
#define NF4_R64                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "    \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "    \
  "%56, %57, %58, %59, %60, %61, %62, %63}"
#define NF4_R128                                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "    \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "    \
  "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "    \
  "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "    \
  "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "      \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "    \
  "%123, %124, %125, %126, %127}"
// clang-format on

// No instruction: what follows sees the accumulators as the wait before it left them.
__device__ __forceinline__ void wgmma_results(float (&d)[16][4]) {
#if defined(NF4_EMULATE)
  static_cast<void>(d);
#else
  asm volatile("" : NF4_F64(d)::"memory");
#endif
}

// wgmma.m64n128k16 and m64n256k16, fp32 accumulators: d += a b^T for a warpgroup of 128 threads,
// asynchronously. Warp w has rows 16 w to 16 w + 15 of a and d, in the layout of mma.m16n8k16
// (ptx.cuh): d[h][j] is the fragment of columns 128 h + 8 j to 128 h + 8 j + 7. a comes from
// registers or, like b [columns of d, 16], as a shared_matrix [64 rows of 16]; then b may also be a
// shared_matrix_by_rows [16, columns of d].
#define NF4_WGMMA(columns, type, registers, sums, a_operand, b_operand, transposes, ...)           \
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type "." type " " registers ", " a_operand ", " b_operand                \
               ", p, 1, 1, " transposes ";\n}\n"                                                   \
               : sums                                                                              \
               : __VA_ARGS__                                                                       \
               : "memory")
#define NF4_WGMMA_REGISTERS(type)                                                                 \
  if constexpr (kHalves == 1) {                                                                   \
    NF4_WGMMA("128", type, NF4_R64, NF4_F64(d[0]), "{%64, %65, %66, %67}", "%68", "0", "r"(a[0]), \
              "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
  } else {                                                                                        \
    NF4_WGMMA("256", type, NF4_R128, NF4_F128(d), "{%128, %129, %130, %131}", "%132", "0",        \
              "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                \
  }
// The last two immediates: a by rows, b by rows.
#define NF4_WGMMA_SHARED(type, transposes)                                                     \
  if constexpr (kHalves == 1) {                                                                \
    NF4_WGMMA("128", type, NF4_R64, NF4_F64(d[0]), "%64", "%65", transposes, "l"(a), "l"(b));  \
  } else {                                                                                     \
    NF4_WGMMA("256", type, NF4_R128, NF4_F128(d), "%128", "%129", transposes, "l"(a), "l"(b)); \
  }
template <typename T, int kHalves>
__device__ __forceinline__ void wgmma(float (&d)[kHalves][16][4], const uint32_t (&a)[4],
                                      uint64_t b, NF4_SITE) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
#if defined(NF4_EMULATE)
  emulation::Wgmma payload{&d[0][0][0], a, 0, b, kHalves, kBf16, false};
  emulation::warp_collective(emulation::wgmma, &payload, file, line);
#else
  if constexpr (kBf16) {
    NF4_WGMMA_REGISTERS("bf16")
  } else {
    NF4_WGMMA_REGISTERS("f16")
  }
#endif
}
template <typename T, bool kByRows = false, int kHalves>
__device__ __forceinline__ void wgmma(float (&d)[kHalves][16][4], uint64_t a, uint64_t b,
                                      NF4_SITE) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
#if defined(NF4_EMULATE)
  emulation::Wgmma payload{&d[0][0][0], nullptr, a, b, kHalves, kBf16, kByRows};
  emulation::warp_collective(emulation::wgmma, &payload, file, line);
#else
  if constexpr (kBf16 && kByRows) {
    NF4_WGMMA_SHARED("bf16", "0, 1")
  } else if constexpr (kBf16) {
    NF4_WGMMA_SHARED("bf16", "0, 0")
  } else if constexpr (kByRows) {
    NF4_WGMMA_SHARED("f16", "0, 1")
  } else {
    NF4_WGMMA_SHARED("f16", "0, 0")
  }
#endif
}

#undef NF4_WGMMA_SHARED
#undef NF4_WGMMA_REGISTERS
#undef NF4_WGMMA
#undef NF4_F4
#undef NF4_F16
#undef NF4_F64
#undef NF4_F128
#undef NF4_R128
#undef NF4_R64

#endif  // NF4_HOPPER_CODE

}  // namespace nf4::cuda
