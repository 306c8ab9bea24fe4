// Double quantization of the scales: their mean as offset, then blocks of 256 by the 8-bit map.
#include <algorithm>

#include "formats.cuh"
#include "launch.cuh"
#include "shared.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 512;  // 11.8 us for 917504 scales, 12.7 with 256 (H200)
constexpr int kWarps = kThreads / 32;
constexpr int kPerLane = 8;
// What a warp takes: a chunk of the sum, then a nested block.
constexpr int kChunk = NF4_OFFSET_CHUNK;
static_assert(kChunk == 32 * kPerLane && NF4_NESTED_BLOCK_SIZE == 32 * kPerLane);

__device__ __forceinline__ double shuffle_xor(double v, int lanes) {
  uint2 words = *reinterpret_cast<const uint2*>(&v);
  words.x = __shfl_xor_sync(0xffffffffu, words.x, lanes);
  words.y = __shfl_xor_sync(0xffffffffu, words.y, lanes);
  return *reinterpret_cast<const double*>(&words);
}

// The offset is an fp64 sum in index order: a chain of dependent additions. But if no summand is
// negative, all are multiples of some 2^e and the sum is at most 2^(e + 53), then no addition
// rounds and every order gives that sum. The scales of a weight hardly ever break this; whoever
// finds it broken adds in index order.
struct Sum {
  double total = 0.0;
  double unit = INFINITY;  // the least 2^e, the lowest bit of a summand

  __device__ __forceinline__ void add(double v) {
    const uint64_t bits = *reinterpret_cast<const uint64_t*>(&v);
    const uint64_t cleared = bits & (bits - 1);  // the lowest bit, unless it is the implicit one
    const double lowest = bits << 12 == 0 ? v : v - *reinterpret_cast<const double*>(&cleared);
    total += v;
    if (v != 0.0) unit = v < 0.0 ? -INFINITY : lowest < unit ? lowest : unit;
  }
  __device__ __forceinline__ void merge(double other_total, double other_unit) {
    total += other_total;
    unit = other_unit < unit ? other_unit : unit;
  }
  __device__ __forceinline__ void reduce_warp() {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      merge(shuffle_xor(total, lanes), shuffle_xor(unit, lanes));
    }
  }
  // 2^52: a bit to spare, because a sum that is not exact may have been rounded down.
  __device__ __forceinline__ bool exact() const { return total <= unit * 0x1p52; }
};

__device__ __forceinline__ void load8_padded(const float* absmax, int64_t first, int64_t count,
                                             bool aligned, float padding, float (&v)[8]) {
  if (aligned && first + kPerLane <= count) {
    load8(absmax + first, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) v[i] = first + i < count ? absmax[first + i] : padding;
}

// chunk_sums[c] = the fp64 sum of 256 elements in index order, by a warp.
__global__ void __launch_bounds__(kThreads)
    chunk_sums_kernel(const float* __restrict__ absmax, double* __restrict__ chunk_sums,
                      int64_t count, bool aligned) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float v[kPerLane];
  load8_padded(absmax, chunk * kChunk + lane * kPerLane, count, aligned, 0.0f, v);
  Sum sum;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum.add(v[i]);
  sum.reduce_warp();
  if (lane != 0 || chunk * kChunk >= count) return;
  double total = sum.total;
  if (!sum.exact()) {
    total = 0.0;
    for (int64_t i = chunk * kChunk; i < (chunk + 1) * kChunk && i < count; ++i) total += absmax[i];
  }
  chunk_sums[chunk] = total;
}

// Every block adds the chunk sums for itself, which costs less than a launch of its own; then a
// warp quantizes a nested block.
__global__ void __launch_bounds__(kThreads)
    double_quantize_kernel(const float* __restrict__ absmax, const double* __restrict__ chunk_sums,
                           uint8_t* __restrict__ codes, float* __restrict__ nested_absmax,
                           float* __restrict__ offset_out, int64_t count, bool aligned) {
  using Encode = Encoder<NF4_FORMAT_DYNAMIC8>;
  Carve carve;
  float* table = carve.take<float>(Encode::kSharedWords);
  double* totals = carve.take<double>(kWarps);
  double* units = carve.take<double>(kWarps);
  const int lane = threadIdx.x % 32;

  const int64_t chunks = (count + kChunk - 1) / kChunk;
  Sum sum;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum.add(chunk_sums[i]);
  sum.reduce_warp();
  if (lane == 0) {
    totals[threadIdx.x / 32] = sum.total;
    units[threadIdx.x / 32] = sum.unit;
  }
  const Encode encode(table);  // with a barrier
  sum = Sum();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum.merge(totals[warp], units[warp]);
  double total = sum.total;
  if (!sum.exact()) {
    total = 0.0;
    for (int64_t i = 0; i < chunks; ++i) total += chunk_sums[i];
  }
  const float offset = static_cast<float>(total / static_cast<double>(count > 0 ? count : 1));
  if (blockIdx.x == 0 && threadIdx.x == 0) offset_out[0] = offset;

  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; block < chunks;
       block += step) {
    const int64_t first = block * kChunk + lane * kPerLane;
    float v[kPerLane];
    load8_padded(absmax, first, count, aligned, offset, v);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      v[i] -= offset;
      bits = larger(bits, magnitude(v[i]));
    }
    const float m = __uint_as_float(warp_max(bits));
    if (lane == 0) nested_absmax[block] = m;
    const float scale = 1.0f / at_least_floor(m);
    uint32_t code[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) code[i] = encode(v[i] * scale);
    if (aligned && first + kPerLane <= count) {
      *reinterpret_cast<uint2*>(codes + first) =
          make_uint2(code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                     code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (first + i < count) codes[first + i] = static_cast<uint8_t>(code[i]);
      }
    }
  }
}

}  // namespace
}  // namespace nf4::cuda

extern "C" size_t nf4_cuda_double_quantize_workspace(int64_t count) {
  return (count + NF4_OFFSET_CHUNK - 1) / NF4_OFFSET_CHUNK * sizeof(double);
}

extern "C" int nf4_cuda_double_quantize(const float* absmax, int64_t count, uint8_t* codes,
                                        float* nested_absmax, float* offset, void* workspace,
                                        cudaStream_t stream) {
  using namespace nf4::cuda;
  auto* chunk_sums = static_cast<double*>(workspace);
  const bool aligned = aligned16(absmax) && reinterpret_cast<uintptr_t>(codes) % 8 == 0;
  const int64_t tile = kWarps * kChunk;
  const int64_t blocks = (count + tile - 1) / tile;
  const int status = launch(chunk_sums_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream,
                            absmax, chunk_sums, count, aligned);
  if (status != 0) return status;
  // One block even without scales: it stores the offset.
  const int64_t full = static_cast<int64_t>(device().multiprocessors) * 4;
  const auto grid = static_cast<unsigned>(std::max<int64_t>(std::min(blocks, full), 1));
  constexpr size_t kShared =
      Encoder<NF4_FORMAT_DYNAMIC8>::kSharedWords * sizeof(float) + 2 * kWarps * sizeof(double);
  return launch(double_quantize_kernel, grid, kThreads, kShared, stream, absmax,
                static_cast<const double*>(chunk_sums), codes, nested_absmax, offset, count,
                aligned);
}
