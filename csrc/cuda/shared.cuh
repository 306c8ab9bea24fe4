// The one way to take shared memory.
#pragma once

#include "ptx.cuh"

namespace nf4::cuda {

// Bytes that a block may ask for on the architecture compiled for: a kernel that wants more leaves
// its body out there, and its launcher asks device().shared_bytes.
#if defined(NF4_EMULATE) || !defined(__CUDA_ARCH__)
constexpr int kMostShared = 227 * 1024;
#elif __CUDA_ARCH__ == 750
constexpr int kMostShared = 64 * 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kMostShared = 163 * 1024;
#elif __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int kMostShared = 227 * 1024;
#else
constexpr int kMostShared = 99 * 1024;
#endif

// Cuts arrays from the block's dynamic shared memory, in the same order in every thread. The
// launcher passes the sum of the sizes; every array's size is a multiple of the next's alignment.
class Carve {
 public:
#if defined(NF4_EMULATE)
  // Red zones lie between the arrays, so offsets differ from the device's.
  template <typename T>
  T* take(int count, int alignment = 16, NF4_SITE) {
    return static_cast<T*>(emulation::carve(count * sizeof(T), alignment, file, line));
  }
  void align(int) {}
#else
  __device__ __forceinline__ Carve() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    next_ = dynamic_shared_memory;
  }
  template <typename T>
  __device__ __forceinline__ T* take(int count, int = 16) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += count * sizeof(T);
    return array;
  }
  // The next array begins at an address in shared memory that is a multiple of this power of two.
  __device__ __forceinline__ void align(uint32_t power) {
    next_ += (power - shared_address(next_) % power) % power;
  }

 private:
  unsigned char* next_;
#endif
};

}  // namespace nf4::cuda
