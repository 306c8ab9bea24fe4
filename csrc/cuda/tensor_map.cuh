// The host side of TMA: tensor maps, encoded by the driver without linking to it.
#pragma once

#include "hopper.cuh"
#include "launch.cuh"

#if !defined(NF4_EMULATE)
#include <cuda.h>
#endif

namespace nf4::cuda {

// How the 16-byte pieces of a row are spread over shared memory's banks; the box is as wide.
enum class Swizzle { k32 = 32, k128 = 128 };

// A tensor of up to four dimensions, innermost first, and the box that one copy moves.
struct TensorBox {
  const void* base;   // aligned to 16
  int element_bytes;  // 1 or 2; for copies and their zero padding the type does not matter
  int dims;
  uint64_t size[4];
  uint64_t stride[3];  // bytes, of the outer dimensions; multiples of 16
  uint32_t box[4];
  Swizzle swizzle;
};

// Fills `map`; cudaErrorNotSupported where the driver has no tensor maps or refuses this one.
inline int encode(const TensorBox& t, TensorMap* map) {
#if defined(NF4_EMULATE)
  return emulation::encode_tensor_map(map, t.base, t.element_bytes, t.dims, t.size, t.stride, t.box,
                                      static_cast<int>(t.swizzle))
             ? cudaSuccess
             : cudaErrorNotSupported;
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode driver = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol,
                                                                12000, cudaEnableDefault, &found);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &found);
#endif
    const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<Encode>(usable ? symbol : nullptr);
  }();
  if (driver == nullptr) return cudaErrorNotSupported;
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      driver(reinterpret_cast<CUtensorMap*>(map),
             t.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
             static_cast<cuuint32_t>(t.dims), const_cast<void*>(t.base), t.size, t.stride, t.box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             t.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_128B,
             // The steps after this one want the bytes beside: 256 at a time from DRAM into L2.
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorNotSupported;
#endif
}

// The map of a 16-bit matrix [rows, columns] whose box is box_rows by 64 columns: 128 bytes,
// swizzled.
inline int encode_matrix(const void* base, int64_t rows, int64_t columns, int box_rows,
                         TensorMap* map) {
  const auto height = static_cast<uint64_t>(rows), width = static_cast<uint64_t>(columns);
  const auto box = static_cast<uint32_t>(box_rows);
  return encode({base, 2, 2, {width, height}, {width * 2}, {64, box}, Swizzle::k128}, map);
}

}  // namespace nf4::cuda
