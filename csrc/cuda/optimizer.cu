// The AdamW step over many parameters in one launch; nf4/optim/adamw.py states the arithmetic.
//
// A warp steps one block of 256 elements. Dtypes and precisions are looked up per parameter, not
// compiled in, so that one launch takes any mixture: a copy of the code for each dtype was no
// shorter. Built without fma contraction and with IEEE division and square root.
#include <algorithm>
#include <cstring>

#include "launch.cuh"
#include "optimizer_access.cuh"
#include "optimizer_codes.cuh"
#include "philox.cuh"

namespace nf4::cuda {
namespace {

constexpr int kBlock = NF4_NESTED_BLOCK_SIZE;
constexpr int kThreads = kTableThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerMultiprocessor = 3;

// A parameter, as the kernel finds it in the workspace.
struct Row {
  nf4_adamw_param param;
  int32_t first_block;  // blocks of 256 in the parameters before
  int32_t aligned;      // whether quads may be accessed whole
};

// Rows travel in kernel arguments, of which 4 KiB fit: a copy from host memory would have to be
// pinned, and kept until a captured graph is gone.
constexpr int kRowWords = sizeof(Row) / 8;
constexpr int kRowsPerLaunch = 4000 / sizeof(Row);
struct Rows {
  uint64_t words[kRowsPerLaunch * kRowWords];
};

__global__ void __launch_bounds__(kThreads)
    write_rows_kernel(const Rows rows, uint64_t* __restrict__ table, int words) {
  for (int i = threadIdx.x; i < words; i += kThreads) table[i] = rows.words[i];
}

// Between these magnitudes a square root, the sum it enters, and m over that are far from where
// results or remainders of the short sequences in ptx.cuh would underflow. Those saved 3 % of a
// step of 100 M float32 parameters (514 to 499 us, H200).
constexpr uint32_t kLeastM = (127u - 60) << 23, kLargestM = (127u + 60) << 23;
constexpr uint32_t kLeastV = (127u - 80) << 23, kLargestV = (127u + 80) << 23;

__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

__device__ __forceinline__ void decode(uint32_t word, const float* values, float scale, float* v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = values[word >> (8 * i) & 255] * scale;
}

// x cut to the 16-bit type after adding the low bits of word below its last bit, as
// nf4.backends.reference_optim.stochastic_round does.
__device__ __forceinline__ float round_stochastically(float x, uint32_t word, int dtype) {
  const bool half = dtype == NF4_FLOAT16;
  const uint32_t cut = half ? 0x1fffu : 0xffffu;
  const uint32_t size = magnitude(x);
  // Below 2^-14 the spacing of float16 stays what it is there.
  const float base = half && size < 0x38800000u ? 0x1p-14f : 0.0f;
  const uint32_t raised = (__float_as_uint(__uint_as_float(size) + base) + (word & cut)) & ~cut;
  const uint32_t rounded = __float_as_uint(__uint_as_float(raised) - base);
  const uint32_t sign = __float_as_uint(x) & 0x80000000u;
  return size < 0x7f800000u ? __uint_as_float(rounded | sign) : x;
}

__device__ __forceinline__ void step_block(const Row& row, int64_t block, const int64_t* seed,
                                           int64_t* skipped, const Tables& tables) {
  const nf4_adamw_param& t = row.param;
  const Hyper& h = *tables.hyper;
  const int lane = threadIdx.x % 32;
  const int64_t first = block * kBlock + lane * 4;
  const bool quantized = t.absmax1 != nullptr;
#if !defined(NF4_PLANT_OUT_OF_BOUNDS)
  const bool whole = row.aligned != 0 && (block + 1) * kBlock <= t.numel;
#else
  const bool whole = row.aligned != 0;
#endif
  auto* codes1 = static_cast<uint8_t*>(in_global(t.state1));
  auto* codes2 = static_cast<uint8_t*>(in_global(t.state2));
  float p[kPerLane], g[kPerLane], m[kPerLane], v[kPerLane];
  if (whole) {
    // All loads before the first conversion, which waits.
    const Raw raw_p = load_raw(in_global(t.param), first, t.param_dtype == NF4_FLOAT32);
    const Raw raw_g = load_raw(in_global(t.grad), first, t.grad_dtype == NF4_FLOAT32);
    if (quantized) {
      uint32_t word1[2], word2[2];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        word1[q] = reinterpret_cast<const uint32_t*>(codes1)[first / 4 + q * 32];
        word2[q] = reinterpret_cast<const uint32_t*>(codes2)[first / 4 + q * 32];
      }
      const float scale1 = in_global(t.absmax1)[block], scale2 = in_global(t.absmax2)[block];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        decode(word1[q], tables.values1, scale1, m + 4 * q);
        decode(word2[q], tables.values2, scale2, v + 4 * q);
      }
    } else {
      unpack(load_raw(in_global(t.state1), first, true), NF4_FLOAT32, m);
      unpack(load_raw(in_global(t.state2), first, true), NF4_FLOAT32, v);
    }
    unpack(raw_g, t.grad_dtype, g);
    unpack(raw_p, t.param_dtype, p);
  } else {
    load_each(in_global(t.param), first, t.numel, t.param_dtype, p);
    load_each(in_global(t.grad), first, t.numel, t.grad_dtype, g);
    if (quantized) {
      const float scale1 = in_global(t.absmax1)[block], scale2 = in_global(t.absmax2)[block];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int64_t index = first + place(i);
        m[i] = index < t.numel ? tables.values1[codes1[index]] * scale1 : 0.0f;
        v[i] = index < t.numel ? tables.values2[codes2[index]] * scale2 : 0.0f;
      }
    } else {
      load_each(in_global(t.state1), first, t.numel, NF4_FLOAT32, m);
      load_each(in_global(t.state2), first, t.numel, NF4_FLOAT32, v);
    }
  }

  uint32_t bits_m = 0, bits_v = 0, least_m = ~0u, least_v = ~0u;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    m[i] = h.beta1 * m[i] + h.gain1 * g[i];
    v[i] = h.beta2 * v[i] + h.gain2 * g[i] * g[i];
    bits_m = larger(bits_m, magnitude(m[i]));
    bits_v = larger(bits_v, magnitude(v[i]));
    least_m = smaller(least_m, magnitude(m[i]));
    least_v = smaller(least_v, magnitude(v[i]));
  }
  const bool moderate = least_m >= kLeastM && bits_m <= kLargestM && least_v >= kLeastV &&
                        bits_v <= kLargestV && h.inverse_c2 >= 0x1p-20f &&
                        h.inverse_c2 <= 0x1p20f && h.eps >= 0.0f && h.eps <= 0x1p20f;
  bits_m = warp_max(bits_m);
  bits_v = warp_max(bits_v);
  if (larger(bits_m, bits_v) >= 0x7f800000u) {
    if (lane == 0) atomic_add(skipped, 1);
    return;
  }

  if (moderate) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float ratio = divide_moderate(m[i], sqrt_moderate(v[i]) * h.inverse_c2 + h.eps);
      p[i] = p[i] * h.decay - h.step_size * ratio;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float ratio = m[i] / (sqrtf(v[i]) * h.inverse_c2 + h.eps);
      p[i] = p[i] * h.decay - h.step_size * ratio;
    }
  }
  if (seed != nullptr && t.param_dtype != NF4_FLOAT32) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const uint4 words = philox(*seed, (t.offset + first) / 4 + q * 32);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[4 * q + i] = round_stochastically(p[4 * q + i], word[i], t.param_dtype);
      }
    }
  }
  if (whole) {
    store_quads(in_global(t.param), first, t.param_dtype, p);
  } else {
    store_each(in_global(t.param), first, t.numel, t.param_dtype, p);
  }
  if (!quantized) {
    if (whole) {
      store_quads(in_global(t.state1), first, NF4_FLOAT32, m);
      store_quads(in_global(t.state2), first, NF4_FLOAT32, v);
    } else {
      store_each(in_global(t.state1), first, t.numel, NF4_FLOAT32, m);
      store_each(in_global(t.state2), first, t.numel, NF4_FLOAT32, v);
    }
    return;
  }
  const float largest_m = __uint_as_float(bits_m), largest_v = __uint_as_float(bits_v);
  const float inverse_m = 1.0f / at_least_floor(largest_m);
  const float inverse_v = 1.0f / at_least_floor(largest_v);
  uint32_t code1[kPerLane], code2[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    code1[i] = tables.rank1(m[i] * inverse_m);
    // A positive second moment never becomes zero: rank2 counts any positive value above code 0,
    // and the minimum stands in for a product that vanishes.
    code2[i] = tables.rank2(fmaxf(v[i] * inverse_v, fminf(v[i], NF4_ABSMAX_FLOOR)));
  }
  if (whole) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const uint32_t *a = code1 + 4 * q, *b = code2 + 4 * q;
      reinterpret_cast<uint32_t*>(codes1)[first / 4 + q * 32] =
          a[0] | a[1] << 8 | a[2] << 16 | a[3] << 24;
      reinterpret_cast<uint32_t*>(codes2)[first / 4 + q * 32] =
          b[0] | b[1] << 8 | b[2] << 16 | b[3] << 24;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t index = first + place(i);
      if (index < t.numel) {
        codes1[index] = static_cast<uint8_t>(code1[i]);
        codes2[index] = static_cast<uint8_t>(code2[i]);
      }
    }
  }
  if (lane == 0) {
    in_global(t.absmax1)[block] = largest_m;
    in_global(t.absmax2)[block] = largest_v;
  }
}

// Warps take the blocks of all parameters in turn, so that what the GPU works on at a time lies
// together: with a share of its own for each thread block, 100 M float32 parameters took 6 % longer
// (545 against 514 us, H200).
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    adamw_kernel(const Row* __restrict__ rows, int count, int blocks,
                 const float* __restrict__ hyper, const int64_t* __restrict__ seed,
                 int64_t* __restrict__ skipped) {
  const Tables tables = make_tables(hyper);
#if !defined(NF4_PLANT_MISSING_BARRIER)
  __syncthreads();
#endif
  const int begin = blockIdx.x * kWarps + threadIdx.x / 32;
  const int stride = gridDim.x * kWarps;
  // The last parameter that begins at or before `begin` does.
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (rows[middle].first_block <= begin ? low : high) = middle;
  }
  for (int b = begin; b < blocks; b += stride) {
    // A lane looks at each of the next 32 parameters.
    uint32_t begun;
    do {
      const int next = low + 1 + threadIdx.x % 32;
      const bool has_begun = next < count && rows[next].first_block <= b;
      begun = warp_max(has_begun ? threadIdx.x % 32 + 1 : 0);
      low += static_cast<int>(begun);
    } while (begun == 32);
    step_block(rows[low], b - rows[low].first_block, seed, skipped, tables);
  }
}

bool aligned_to(const void* pointer, int dtype) {
  return reinterpret_cast<uintptr_t>(pointer) % (dtype == NF4_FLOAT32 ? 16 : 8) == 0;
}

bool has_aligned_quads(const nf4_adamw_param& p) {
  const bool states = p.absmax1 == nullptr ? aligned16(p.state1) && aligned16(p.state2)
                                           : reinterpret_cast<uintptr_t>(p.state1) % 4 == 0 &&
                                                 reinterpret_cast<uintptr_t>(p.state2) % 4 == 0;
  return states && aligned_to(p.param, p.param_dtype) && aligned_to(p.grad, p.grad_dtype);
}

}  // namespace
}  // namespace nf4::cuda

extern "C" size_t nf4_cuda_adamw_step_workspace(int64_t count) {
  return static_cast<size_t>(count) * sizeof(nf4::cuda::Row);
}

extern "C" int nf4_cuda_adamw_step(const nf4_adamw_param* params, int64_t count, const float* hyper,
                                   const int64_t* seed, int64_t* skipped, void* workspace,
                                   cudaStream_t stream) {
  using namespace nf4::cuda;
  auto* table = static_cast<uint64_t*>(workspace);
  int64_t blocks = 0;
  for (int64_t start = 0; start < count; start += kRowsPerLaunch) {
    Rows rows = {};
    const int64_t here = std::min<int64_t>(kRowsPerLaunch, count - start);
    for (int64_t i = 0; i < here; ++i) {
      const nf4_adamw_param& p = params[start + i];
      for (const int dtype : {p.param_dtype, p.grad_dtype}) {
        if (dtype < NF4_FLOAT32 || dtype > NF4_BFLOAT16) return cudaErrorNotSupported;
      }
      const Row row = {p, static_cast<int32_t>(blocks), has_aligned_quads(p)};
      std::memcpy(rows.words + i * kRowWords, &row, sizeof row);
      blocks += (p.numel + kBlock - 1) / kBlock;
    }
    const int status = launch(write_rows_kernel, 1, kThreads, 0, stream, rows,
                              table + start * kRowWords, static_cast<int>(here * kRowWords));
    if (status != 0) return status;
  }
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t most = static_cast<int64_t>(device().multiprocessors) * kBlocksPerMultiprocessor;
  const auto grid = static_cast<unsigned>(std::min((blocks + kWarps - 1) / kWarps, most));
  return launch(adamw_kernel, grid, kThreads, kSharedBytes, stream,
                static_cast<const Row*>(workspace), count, blocks, hyper, seed, skipped);
}
