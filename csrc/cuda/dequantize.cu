// Dequantization in one launch, nested scales included: float32 code * scale, rounded once.
#include <algorithm>

#include "formats.cuh"
#include "launch.cuh"
#include "shared.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 2;
// What the compiler must make room for: with two blocks, 64 registers a thread, it spills two to
// four of them for sm_100 and sm_120.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLeastBlocks = 1;
#else
constexpr int kLeastBlocks = 2;
#endif
constexpr int kGroups = 8;                   // groups of 8 elements that a thread has in flight
constexpr int kWarpTile = 32 * 8 * kGroups;  // elements of one warp and iteration
constexpr int kRowBytes = 256;               // one table row per byte value
constexpr int kShared = 256 * kRowBytes;

// Row b of the table: 16 copies of the two float codes of byte b (one per lane of a half warp, as
// 8-byte reads go), then 32 copies of entry b of the 8-bit map that nested scales use. No two lanes
// meet in a bank, and a row of 256 bytes turns "shift, mask, add" into one byte permutation.
__device__ __forceinline__ void fill_table(unsigned char* table, int format) {
  const float* codes = kCodes4[format];
  for (int i = threadIdx.x; i < 256 * 16; i += kThreads) {
    const int byte = i / 16;
    *reinterpret_cast<float2*>(table + byte * kRowBytes + i % 16 * 8) =
        make_float2(codes[byte >> 4], codes[byte & 15]);
  }
  for (int i = threadIdx.x; i < 256 * 32; i += kThreads) {
    *reinterpret_cast<float*>(table + i / 32 * kRowBytes + 128 + i % 32 * 4) = kCodes8[0][i / 32];
  }
}

// kLog2Block is 0 where the block size is known only at run time. Only the strides between groups
// use it: with a constant shift too, nvcc 13 adds the table's address to every look-up by an
// instruction of its own (4.4 issue slots an element on sm_90a, not 3.9).
template <typename T, bool kNested, int kLog2Block>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    dequantize_kernel(const uint8_t* __restrict__ packed, Scales scales, T* __restrict__ out,
                      int64_t numel, int log2_block, int format, bool aligned) {
  Carve carve;
  unsigned char* table = carve.take<unsigned char>(kShared, 256);
  fill_table(table, format);
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const uint32_t code_column = lane % 16 * 8;
  const uint32_t map_column = 128 + lane * 4;
  const float offset = kNested ? scales.offset[0] : 0.0f;
  const auto* absmax = static_cast<const float*>(scales.absmax);
  const auto* absmax_codes = static_cast<const uint8_t*>(scales.absmax);

  const int64_t tiles = aligned ? numel / kWarpTile : 0;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
       tile < tiles; tile += warps) {
    const int64_t first = tile * kWarpTile + lane * 8;
    const auto* words = reinterpret_cast<const uint32_t*>(packed + first / 2);
    const int64_t block = first >> log2_block;
    uint32_t bytes[kGroups];
    float scale[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) bytes[i] = words[i * 32];
    if constexpr (kNested) {
      // A warp's tile is aligned and at most 64 blocks long: one nested scale serves it.
      const float nested = scales.nested_absmax[block / NF4_NESTED_BLOCK_SIZE];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const uint32_t code =
            absmax_codes[kLog2Block != 0 && kLog2Block <= 8 ? block + (i << (8 - kLog2Block))
                                                            : (first + i * 256) >> log2_block];
        scale[i] =
            *reinterpret_cast<const float*>(table + (code * kRowBytes + map_column)) * nested +
            offset;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        scale[i] = absmax[kLog2Block != 0 && kLog2Block <= 8 ? block + (i << (8 - kLog2Block))
                                                             : (first + i * 256) >> log2_block];
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float v[8];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        // (byte b << 8) | column
        const uint32_t at = __byte_perm(bytes[i], code_column, 0x5504 | b << 4);
        const float2 pair = *reinterpret_cast<const float2*>(table + at);
        v[2 * b] = pair.x * scale[i];
        v[2 * b + 1] = pair.y * scale[i];
      }
      store8(out + first + i * 256, v);
    }
  }

  // What is left of the last tile, or everything when a pointer is not aligned.
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = tiles * kWarpTile + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < numel; i += threads) {
    out[i] = from_float<T>(decode_element(packed, scales, i, log2_block, format));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize8_kernel(const uint8_t* __restrict__ packed, Scales scales, T* __restrict__ out,
                       int64_t numel, int log2_block, int format, bool aligned) {
  Carve carve;
  float* table = carve.take<float>(256);
  for (int i = threadIdx.x; i < 256; i += kThreads) {
    table[i] = kCodes8[format - NF4_FORMAT_DYNAMIC8][i];
  }
  __syncthreads();
  const int64_t groups = (numel + 7) / 8;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < groups;
       g += threads) {
    const int64_t first = g * 8;
    const float scale = scales(first >> log2_block);
    if (aligned && first + 8 <= numel) {
      const uint2 bytes = *reinterpret_cast<const uint2*>(packed + first);
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = table[((i < 4 ? bytes.x : bytes.y) >> (8 * (i % 4))) & 255] * scale;
      }
      store8(out + first, v);
    } else {
      for (int64_t i = first; i < numel && i < first + 8; ++i) {
        out[i] = from_float<T>(table[packed[i]] * scale);
      }
    }
  }
}

template <typename T>
int dequantize(const nf4_weight& w, int64_t numel, T* out, cudaStream_t stream) {
  const bool aligned = aligned16(out) && reinterpret_cast<uintptr_t>(w.packed) % 8 == 0;
  const int log2_block = log2_of(w.block_size);
  const int64_t full = static_cast<int64_t>(device().multiprocessors) * kBlocksPerSm;
  const auto grid = [&](int64_t per_block) {
    return static_cast<unsigned>(std::min(full, (numel + per_block - 1) / per_block));
  };
  const auto run = [&](auto kernel, int64_t per_block, int shared_bytes) {
    return launch(kernel, grid(per_block), kThreads, shared_bytes, stream, w.packed, scales_of(w),
                  out, numel, log2_block, w.format, aligned);
  };
  if (!is_4bit(w.format)) return run(dequantize8_kernel<T>, kThreads * 8, 256 * sizeof(float));
  constexpr int64_t kTile = kWarpTile * (kThreads / 32);
  if (w.nested_absmax != nullptr) {
    return w.block_size == 64 ? run(dequantize_kernel<T, true, 6>, kTile, kShared)
                              : run(dequantize_kernel<T, true, 0>, kTile, kShared);
  }
  return w.block_size == 64 ? run(dequantize_kernel<T, false, 6>, kTile, kShared)
                            : run(dequantize_kernel<T, false, 0>, kTile, kShared);
}

}  // namespace
}  // namespace nf4::cuda

extern "C" int nf4_cuda_dequantize(const nf4_weight* weight, int64_t numel, void* out, int dtype,
                                   cudaStream_t stream) {
  using namespace nf4::cuda;
  if (!valid_layout(weight->block_size, weight->format)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto element) {
    return dequantize(*weight, numel, static_cast<decltype(element)*>(out), stream);
  });
}
