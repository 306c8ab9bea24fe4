// Dequantization in one launch, nested scales included: float32 code * scale, rounded once.
#include <algorithm>
#include <type_traits>

#include "formats.cuh"
#include "launch.cuh"
#include "shared.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;
// Elements of a warp. 38.6 us for 14336 x 4096 bf16 on an H200; 39.1 with 1024, 40.7 with 2048.
constexpr int kWarpTile = 512;
constexpr int kThreads8 = 512;  // of the 8-bit formats' kernel

// A block's warps take one tile each. Lane l holds code l % 16 and, of the tile's blocks (at most
// 16), the scale of block l: shuffles look both up. That costs the shared-memory pipe no more than
// a table of byte values in as many copies as there are banks, which every block would have to fill
// first, and leaves room for as many warps as the registers do.
template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* __restrict__ packed, Scales scales, T* __restrict__ out,
                      int64_t numel, int log2_block, int format, bool aligned) {
  constexpr int kPerLane = 16 / sizeof(T);  // neighbours, which one access of 16 bytes stores
  constexpr int kGroups = kWarpTile / (32 * kPerLane);
  using Word = std::conditional_t<kPerLane == 8, uint32_t, uint16_t>;
  const int lane = threadIdx.x % 32;
  const int64_t tile =
      (static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kWarpTile;
  // Asked of the whole block: the compiler then knows that warps shuffle undivided.
  if (aligned && (blockIdx.x + int64_t{1}) * (kThreads / 32) * kWarpTile <= numel) {
    const int64_t first = tile + lane * kPerLane;
    Word words[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      words[i] = reinterpret_cast<const Word*>(packed + first / 2)[i * 32];
    }
    const float code = kLaneCodes4[format][lane % 16];
    // Lanes past the tile's last block read that one again.
    const int last = (kWarpTile - 1) >> log2_block;
    const int64_t block = (tile >> log2_block) + (lane < last ? lane : last);
    const float own_scale = kNested ? scales.nested(block) : scales.plain(block);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float scale =
          __shfl_sync(0xffffffffu, own_scale, (lane + i * 32) * kPerLane >> log2_block);
      float v[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        // The second half of byte j / 2 lies in its low bits. Lanes 16 to 31 hold the codes again,
        // so the bit above a code may be anything.
        const uint32_t index = static_cast<uint32_t>(words[i]) >> (j / 2 * 8 + (j % 2 == 0) * 4);
        v[j] = __shfl_sync(0xffffffffu, code, index) * scale;
      }
      stream16(out + first + i * 32 * kPerLane, v);
    }
    return;
  }
  for (int i = lane; i < kWarpTile; i += 32) {
    if (tile + i < numel) {
      out[tile + i] = from_float<T>(decode_element(packed, scales, tile + i, log2_block, format));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads8)
    dequantize8_kernel(const uint8_t* __restrict__ packed, Scales scales, T* __restrict__ out,
                       int64_t numel, int log2_block, int format, bool aligned) {
  Carve carve;
  float* table = carve.take<float>(256);
  for (int i = threadIdx.x; i < 256; i += kThreads8) {
    table[i] = kCodes8[format - NF4_FORMAT_DYNAMIC8][i];
  }
  __syncthreads();
  const int64_t groups = (numel + 7) / 8;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads8;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads8 + threadIdx.x; g < groups;
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
  const auto run = [&](auto kernel, int64_t grid, int threads, size_t shared_bytes) {
    return launch(kernel, static_cast<unsigned>(grid), threads, shared_bytes, stream, w.packed,
                  scales_of(w), out, numel, log2_block, w.format, aligned);
  };
  if (!is_4bit(w.format)) {
    // 49.5 us for 14336 x 4096 bf16 on an H200, 56.3 with two; of float32 117 us, 81.8 with two.
    const int64_t full = static_cast<int64_t>(device().multiprocessors) * (sizeof(T) == 4 ? 2 : 4);
    const int64_t needed = (numel + kThreads8 * 8 - 1) / (kThreads8 * 8);
    return run(dequantize8_kernel<T>, std::min(full, needed), kThreads8, 256 * sizeof(float));
  }
  constexpr int64_t kTile = kWarpTile * (kThreads / 32);
  const int64_t grid = (numel + kTile - 1) / kTile;
  return w.nested_absmax != nullptr ? run(dequantize_kernel<T, true>, grid, kThreads, 0)
                                    : run(dequantize_kernel<T, false>, grid, kThreads, 0);
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
