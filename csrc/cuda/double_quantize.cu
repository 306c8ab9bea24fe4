// Double quantization of the scales: their mean as offset, then blocks of 256 by the 8-bit map.
#include <algorithm>

#include "formats.cuh"
#include "launch.cuh"
#include "shared.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = NF4_OFFSET_CHUNK;
constexpr int kSumThreads = 64;  // chunks per block of the first kernel
constexpr int kStrip = 32;       // elements of each chunk staged at a time

// chunk_sums[c] = the fp64 sum of 256 elements in index order. One thread a chunk; the block
// stages strips through shared memory so that the loads are coalesced.
__global__ void __launch_bounds__(kSumThreads)
    chunk_sums_kernel(const float* __restrict__ absmax, double* __restrict__ chunk_sums,
                      int64_t count) {
  Carve carve;
  float* strip = carve.take<float>(kSumThreads * (kStrip + 1));  // + 1: no bank conflict
  const int64_t first_chunk = static_cast<int64_t>(blockIdx.x) * kSumThreads;
  double sum = 0.0;
  for (int start = 0; start < kChunk; start += kStrip) {
    for (int i = threadIdx.x; i < kSumThreads * kStrip; i += kSumThreads) {
      const int64_t index = (first_chunk + i / kStrip) * kChunk + start + i % kStrip;
      strip[i / kStrip * (kStrip + 1) + i % kStrip] = index < count ? absmax[index] : 0.0f;
    }
    __syncthreads();
    for (int i = 0; i < kStrip; ++i) sum += strip[threadIdx.x * (kStrip + 1) + i];
    __syncthreads();
  }
  const int64_t chunk = first_chunk + threadIdx.x;
  if (chunk * kChunk < count) chunk_sums[chunk] = sum;
}

// Every block adds the chunk sums in order for itself, which costs less than a launch of its own,
// then quantizes blocks of 256 scales, one element a thread.
__global__ void __launch_bounds__(kThreads)
    double_quantize_kernel(const float* __restrict__ absmax, const double* __restrict__ chunk_sums,
                           uint8_t* __restrict__ codes, float* __restrict__ nested_absmax,
                           float* __restrict__ offset_out, int64_t count) {
  using Encode = Encoder<NF4_FORMAT_DYNAMIC8>;
  Carve carve;
  float* table = carve.take<float>(Encode::kSharedWords);
  double* staged = carve.take<double>(kThreads);
  float* shared_offset = carve.take<float>(4);
  uint32_t* maxima = carve.take<uint32_t>(kThreads / 32);  // of each warp
  Encode::fill(table, threadIdx.x, kThreads);

  const int64_t chunks = (count + kChunk - 1) / kChunk;
  double total = 0.0;
  for (int64_t start = 0; start < chunks; start += kThreads) {
    __syncthreads();
    if (start + threadIdx.x < chunks) staged[threadIdx.x] = chunk_sums[start + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      const int here = chunks - start < kThreads ? static_cast<int>(chunks - start) : kThreads;
      for (int i = 0; i < here; ++i) total += staged[i];
    }
  }
  if (threadIdx.x == 0)
    shared_offset[0] = static_cast<float>(total / static_cast<double>(count > 0 ? count : 1));
  __syncthreads();
  const float offset = shared_offset[0];
  if (blockIdx.x == 0 && threadIdx.x == 0) offset_out[0] = offset;

  const Encode encode{table};
  for (int64_t block = blockIdx.x; block * kThreads < count; block += gridDim.x) {
    const int64_t index = block * kThreads + threadIdx.x;
    const float v = index < count ? absmax[index] - offset : 0.0f;
    uint32_t bits = magnitude(v);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      bits = larger(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
    }
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = bits;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) bits = larger(bits, maxima[warp]);
    __syncthreads();
    const float m = __uint_as_float(bits);
    if (threadIdx.x == 0) nested_absmax[block] = m;
    if (index < count) {
      codes[index] = static_cast<uint8_t>(encode(v * (1.0f / at_least_floor(m))));
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
  const int64_t tile = kSumThreads * kChunk;
  const auto sum_grid = static_cast<unsigned>((count + tile - 1) / tile);
  int status =
      launch(chunk_sums_kernel, sum_grid, kSumThreads, kSumThreads * (kStrip + 1) * sizeof(float),
             stream, absmax, chunk_sums, count);
  if (status != 0) return status;
  // One block even without scales: it stores the offset.
  const int64_t blocks = std::max<int64_t>((count + kThreads - 1) / kThreads, 1);
  const auto grid =
      static_cast<unsigned>(std::min(blocks, static_cast<int64_t>(device().multiprocessors) * 4));
  constexpr size_t kShared = Encoder<NF4_FORMAT_DYNAMIC8>::kSharedWords * sizeof(float) +
                             kThreads * sizeof(double) + (4 + kThreads / 32) * sizeof(float);
  return launch(double_quantize_kernel, grid, kThreads, kShared, stream, absmax,
                static_cast<const double*>(chunk_sums), codes, nested_absmax, offset, count);
}
