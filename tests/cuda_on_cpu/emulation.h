// Runs the kernels of csrc/cuda on a CPU: what g++ sees in place of CUDA.
//
// Every CUDA thread of a block is a fiber; blocks run one after the other, those of a cluster
// together. A fiber runs until it meets a collective (a barrier, a shuffle, an mma, ldmatrix); the
// last to arrive computes for all.
// Two builds watch the kernels. "asan": the kernel files under AddressSanitizer and UBSan, with
// red zones around every shared array. "race": the kernel files compiled with -fsanitize=thread,
// whose hooks feed a happens-before checker of our own (checker.cpp); libtsan is not linked.
#pragma once

// clang-format off: cuda_bf16.h needs the runtime types first.
#include <cuda_runtime_api.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// clang-format on

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "take shared memory from nf4::cuda::Carve")

namespace nf4::emulation {

struct Indices {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
// Of the running fiber; not thread_local, because fibers of one test share one OS thread.
const Indices& current();

// What a collective does once all threads of the warp have arrived.
using WarpFunction = void (*)(void* const (&payload)[32]);
void warp_collective(WarpFunction function, void* payload, const char* file, int line);
void block_barrier(const char* file, int line);
void named_barrier(int id, int threads, const char* file, int line);
void cluster_barrier(const char* file, int line);
void warp_barrier(const char* file, int line);

// Shared memory: the `index`-th array of the block, the same for every thread.
void* carve(size_t bytes, size_t alignment, const char* file, int line);

// 0 < valid <= bytes are copied and the rest zeroed; the data lands at the matching wait.
void cp_async(void* shared, const void* global, int bytes, int valid, const char* file, int line);
void cp_async_commit();
void cp_async_wait(int pending_groups);

// Fibers of one thread: nothing comes between.
void atomic_add(int64_t* counter, int64_t value);

// Counters by which blocks order each other's global memory. Blocks run one after the other, so a
// wait for one that has not run is a defect: with tickets none can happen.
int take_ticket(int* counter);
int take_turn(int* counter);
void publish(int* counter);
void wait_for(const int* counter, int value, const char* file, int line);
void clear(void* p, size_t bytes);

void check_shared_read(const void* address, size_t bytes, const char* what);

// `cluster` blocks, neighbours along x, form a cluster.
int run(dim3 grid, dim3 block, int cluster, size_t shared_bytes,
        const std::function<void()>& kernel);
int multiprocessors();
int compute_capability();

// Hopper (hopper.cpp). An address in shared memory as wgmma and mbarrier instructions take it.
uint32_t shared_offset(const void* pointer);
bool encode_tensor_map(void* map, const void* base, int element_bytes, int dims,
                       const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                       int swizzle_bytes);
void tma_load(void* shared, const void* map, void* barrier, const int* at, int dims,
              const char* file, int line);
// The same to the same place of each of the cluster's first `ctas` blocks.
void tma_load_all(void* shared, const void* map, void* barrier, const int* at, int dims, int ctas,
                  const char* file, int line);
// Stores land at the wait of the thread that started them.
void tma_store(const void* map, const void* shared, const int* at, int dims, const char* file,
               int line);
void tma_store_wait();
void mbarrier_init(void* barrier, int arrivals, const char* file, int line);
void mbarrier_arrive(void* barrier, int expected_bytes, const char* file, int line);
void mbarrier_arrive_at(void* barrier, int rank, const char* file, int line);
void mbarrier_wait(void* barrier, uint32_t parity, const char* file, int line);

struct Wgmma {
  float* d;           // [halves][16][4]
  const uint32_t* a;  // [4]; null: a_matrix
  uint64_t a_matrix, b_matrix;
  int halves;  // of 128 columns
  bool is_bf16;
  bool b_by_rows;
};
void wgmma(void* const (&payload)[32]);
void wgmma_fence(void* const (&payload)[32]);
void wgmma_commit(void* const (&payload)[32]);
void wgmma_wait(void* const (&payload)[32]);  // int: groups that may stay under way

struct Mma {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};
void mma_bf16(void* const (&payload)[32]);
void mma_fp16(void* const (&payload)[32]);

struct LoadMatrix {
  uint32_t* out;  // [4]
  const void* row;
  bool transpose;
};
void load_matrix(void* const (&payload)[32]);

struct Shuffle {
  uint32_t value, result;
  int lane_mask;
  bool up_from_lane;  // lane_mask is a source lane
};
void shuffle(void* const (&payload)[32]);

template <typename T>
T shuffle_value(T value, int lane_mask, bool from_lane, const char* file, int line) {
  static_assert(sizeof(T) == 4);
  Shuffle s{};
  std::memcpy(&s.value, &value, 4);
  s.lane_mask = lane_mask;
  s.up_from_lane = from_lane;
  warp_collective(shuffle, &s, file, line);
  std::memcpy(&value, &s.result, 4);
  return value;
}

}  // namespace nf4::emulation

#define threadIdx (::nf4::emulation::current().thread)
#define blockIdx (::nf4::emulation::current().block)
#define blockDim (::nf4::emulation::current().block_dim)
#define gridDim (::nf4::emulation::current().grid_dim)

#define __syncthreads() ::nf4::emulation::block_barrier(__FILE__, __LINE__)
#define __syncwarp() ::nf4::emulation::warp_barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) \
  ::nf4::emulation::shuffle_value(value, lane_mask, false, __FILE__, __LINE__)
#define __shfl_sync(mask, value, lane) \
  ::nf4::emulation::shuffle_value(value, lane, true, __FILE__, __LINE__)

template <typename T>
inline void __stcs(T* p, T v) {
  *p = v;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((low | static_cast<uint64_t>(high) << 32) >> (shift & 31));
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  }
  return out;
}
