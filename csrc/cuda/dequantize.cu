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
constexpr int kBlocksPerSm = 3;
constexpr int kGroups = 4;      // 16-byte stores of a lane and tile
constexpr int kRowBytes = 256;  // of the table
// Sixteenths of the tiles that are dealt out evenly. SMs differ in the share of bandwidth that they
// get: the rest goes, tile by tile, to who is done first.
constexpr int kEvenShare = 12;
constexpr int kThreads8 = 512;  // of the 8-bit formats' kernel
// So many that the number of a block of 32 fits in 32 bits.
constexpr int64_t kMostElements = int64_t{1} << 37;

// The tile of a CTA, in elements.
template <typename T>
constexpr int kTile = kThreads * kGroups * 16 / static_cast<int>(sizeof(T));

// Row b of the table: 16 copies of the two float codes of byte b, one per lane of a half warp, as
// 8-byte reads go. No two lanes meet in a bank, and a row of 256 bytes, half of them unused, turns
// "shift, mask, add" into one byte permutation.
__device__ __forceinline__ void fill_table(unsigned char* table, int format) {
  static_assert(kThreads == 256);
  const int byte = threadIdx.x;
  const float first = kLaneCodes4[format][byte >> 4];
  const float second = kLaneCodes4[format][byte & 15];
  constexpr int kUsed = 16 * sizeof(float2);
#pragma unroll
  for (int i = 0; i < kUsed; i += 16) {
    // Neighbours write different columns of their rows, and so different banks.
    *reinterpret_cast<float4*>(table + byte * kRowBytes + (i + byte * 16) % kUsed) =
        make_float4(first, second, first, second);
  }
}

// The first `full` CTAs take `rounds` tiles in strides of `full`, all others one of the rest.
template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    dequantize_kernel(const uint8_t* __restrict__ packed, Scales scales, T* __restrict__ out,
                      int64_t numel, int log2_block, int format, int tiles, int full, int rounds) {
  constexpr int kPerLane = 16 / sizeof(T);  // neighbours, which one access of 16 bytes stores
  constexpr int kGroup = 32 * kPerLane;
  using Word = std::conditional_t<kPerLane == 8, uint32_t, uint16_t>;
  Carve carve;
  unsigned char* table = carve.take<unsigned char>(256 * kRowBytes, kRowBytes);
  const int lane = threadIdx.x % 32;
  const int warp_first = threadIdx.x / 32 * kGroups * kGroup;
  const int first = warp_first + lane * kPerLane;
  // `opaque`, or the compiler takes the sums apart again and adds in every iteration.
  const Word* words_at = opaque(reinterpret_cast<const Word*>(packed) + first / kPerLane);
  T* out_at = opaque(out + first);

  // The lanes that one block covers in a group are a segment, at least as long as there are groups.
  // Its lane i has the scale of group i: a shuffle within segments needs no index computed.
  const int covered = (1 << log2_block) / kPerLane;
  const int segment = covered < 32 ? covered : 32;
  const int in_segment = lane & (segment - 1);
  const int group = in_segment < kGroups ? in_segment : kGroups - 1;
  const int lane_block =
      (warp_first + group * kGroup + (lane - in_segment) * kPerLane) >> log2_block;
  const int log2_tile_blocks = log2_of(kTile<T>) - log2_block;
  const float offset = kNested ? scales.offset[0] : 0.0f;
  const auto* scales_at = opaque(
      static_cast<const std::conditional_t<kNested, uint8_t, float>*>(scales.absmax) + lane_block);

  // Of the next tile, which a thread loads one ahead.
  Word words[kGroups];
  uint32_t scale_code = 0;
  float scale = 0.0f;  // nested: that of the scales
  const auto load_scale = [&](int tile) {
    const uint32_t block = static_cast<uint32_t>(tile) << log2_tile_blocks;
    if constexpr (kNested) {
      static_assert(kTile<T> <= NF4_NESTED_BLOCK_SIZE * 32);  // one nested scale serves it
      scale_code = __ldg(scales_at + block);
      scale = scales.nested_absmax[block / NF4_NESTED_BLOCK_SIZE];
    } else {
      scale = __ldg(scales_at + block);
    }
  };
  const auto load_words = [&](int tile, int i) {
    words[i] = __ldg(words_at + int64_t{tile} * (kTile<T> / kPerLane) + i * 32);
  };

  const int cta = blockIdx.x;
  const bool early = cta < full;
  int tile = early ? cta : full * rounds + (cta - full);
  int step = early ? full : 0;
  int left = early ? rounds : tile < tiles;
  if (left > 0) {
    load_scale(tile);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) load_words(tile, i);
  }
  fill_table(table, format);  // while the first tile is on its way
  __syncthreads();
  const uint32_t column = lane % 16 * 8;
#pragma unroll 1
  for (; left > 0; --left) {
    T* to = out_at + int64_t{tile} * kTile<T>;
    // The last tile is loaded again, from L1, rather than every load made conditional.
    if (left == 1) step = 0;
    tile += step;
    float own = scale;
    if constexpr (kNested) own = kLaneCodes8[opaque(scale_code)] * own + offset;
    load_scale(tile);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float group_scale = __shfl_sync(0xffffffffu, own, i, segment);
      float v[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; j += 2) {
        // (byte j / 2 << 8) | column
        const uint32_t at = __byte_perm(words[i], column, 0x5504 | j / 2 << 4);
        const float2 pair = *reinterpret_cast<const float2*>(table + at);
        v[j] = pair.x * group_scale;
        v[j + 1] = pair.y * group_scale;
      }
      load_words(tile, i);
      stream16(to + i * kGroup, v);
    }
  }

  // What is left of the last tile, or everything when a pointer is not aligned.
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = int64_t{tiles} * kTile<T> + int64_t{blockIdx.x} * kThreads + threadIdx.x;
       i < numel; i += threads) {
    out[i] = from_float<T>(decode_element(packed, scales, i, log2_block, format));
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
  const bool aligned =
      aligned16(out) && reinterpret_cast<uintptr_t>(w.packed) % 8 == 0 && numel < kMostElements;
  const int log2_block = log2_of(w.block_size);
  const int64_t multiprocessors = device().multiprocessors;
  if (!is_4bit(w.format)) {
    // 49.5 us for 14336 x 4096 bf16 on an H200, 56.3 with two; of float32 117 us, 81.8 with two.
    const int64_t full = multiprocessors * (sizeof(T) == 4 ? 2 : 4);
    const int64_t needed = (numel + kThreads8 * 8 - 1) / (kThreads8 * 8);
    return launch(dequantize8_kernel<T>, static_cast<unsigned>(std::min(full, needed)), kThreads8,
                  256 * sizeof(float), stream, w.packed, scales_of(w), out, numel, log2_block,
                  w.format, aligned);
  }
  const int64_t wave = multiprocessors * kBlocksPerSm;
  const int64_t tiles = aligned ? numel / kTile<T> : 0;
  const int64_t rounds = tiles * kEvenShare / 16 / wave;
  const int64_t full = rounds > 0 ? wave : 0;
  const int64_t grid =
      tiles > 0 ? full + tiles - full * rounds : std::min(wave, (numel + kThreads - 1) / kThreads);
  const auto kernel =
      w.nested_absmax != nullptr ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
  return launch(kernel, static_cast<unsigned>(grid), kThreads, 256 * kRowBytes, stream, w.packed,
                scales_of(w), out, numel, log2_block, w.format, tiles, full, rounds);
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
