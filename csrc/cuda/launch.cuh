// The one way to launch a kernel, and what a launcher may ask of the device.
#pragma once

#include <cstddef>
#include <tuple>

#include "ptx.cuh"

namespace nf4::cuda {

// Launches `kernel` on `stream`, `cluster` CTAs next to each other as a cluster, and returns the
// CUDA status (0 is success). Asks for the kernel's dynamic shared memory where it is above the
// default 48 KiB. Capturable: no synchronization.
template <typename... Parameters, typename... Arguments>
int launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, int cluster,
                    size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  std::tuple<Parameters...> converted(static_cast<Parameters>(arguments)...);
#if defined(NF4_EMULATE)
  static_cast<void>(stream);
  return emulation::run(grid, block, cluster, shared_bytes, [&] { std::apply(kernel, converted); });
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  void* pointers[sizeof...(Parameters)];
  std::apply(
      [&](auto&... value) {
        int i = 0;
        ((pointers[i++] = const_cast<void*>(static_cast<const void*>(&value))), ...);
      },
      converted);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster != 1;
  return cudaLaunchKernelExC(&config, function, pointers);
#endif
}

// The same without clusters.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           cudaStream_t stream, Arguments... arguments) {
  return launch_clusters(kernel, grid, block, 1, shared_bytes, stream, arguments...);
}

// Zeroes device memory in stream order.
inline int clear(void* p, size_t bytes, cudaStream_t stream) {
#if defined(NF4_EMULATE)
  static_cast<void>(stream);
  emulation::clear(p, bytes);
  return cudaSuccess;
#else
  return cudaMemsetAsync(p, 0, bytes, stream);
#endif
}

struct Device {
  int multiprocessors;
  int compute_capability;  // 10 * major + minor
  int shared_bytes;        // that a block may ask for
};

// Of the current device, asked once per device.
inline Device device() {
#if defined(NF4_EMULATE)
  const int capability = emulation::compute_capability();
  return {emulation::multiprocessors(), capability, (capability >= 90 ? 227 : 163) * 1024};
#else
  constexpr int kMaxDevices = 64;
  static Device known[kMaxDevices] = {};
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index >= kMaxDevices) return {1, 0, 0};
  if (known[index].multiprocessors == 0) {
    int count = 1, major = 0, minor = 0, shared = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
    // Two threads may both come here; they write the same values, the count last.
    known[index].compute_capability = 10 * major + minor;
    known[index].shared_bytes = shared;
    known[index].multiprocessors = count;
  }
  return known[index];
#endif
}

}  // namespace nf4::cuda
