// One wrapper of ptx.cuh or hopper.cuh a function, on plain inputs: what tests/test_cuda_golden.py
// compares with arithmetic, on a GPU (nvcc) and under emulation (g++) alike.
#include "shared.cuh"
#include "tensor_map.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

template <typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  uint32_t a_own[4], b_own[2];
  float c_own[4];
  for (int i = 0; i < 4; ++i) a_own[i] = a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) b_own[i] = b[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) c_own[i] = c[threadIdx.x * 4 + i];
  mma_m16n8k16<T>(c_own, a_own, b_own);
  for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = c_own[i];
}

template <bool kTranspose>
__global__ void load_matrix_kernel(const uint4* rows, uint32_t* out) {
  Carve carve;
  uint4* shared = carve.take<uint4>(32);
  shared[threadIdx.x] = rows[threadIdx.x];
  __syncthreads();
  uint32_t own[4];
  load_matrix_x4<kTranspose>(own, shared + threadIdx.x);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = own[i];
}

// Thread i copies 16 bytes of which i % 17 count; out is what shared memory holds afterwards.
__global__ void cp_async_kernel(const uint4* in, uint4* out) {
  Carve carve;
  uint4* shared = carve.take<uint4>(64);
  for (int group = 0; group < 2; ++group) {
    const int i = group * 32 + threadIdx.x;
    cp_async16(shared + i, in + i, i % 17);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  out[31 - threadIdx.x] = shared[31 - threadIdx.x];
  cp_async_wait<0>();
  __syncthreads();
  out[63 - threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void and_or_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* own = in + 3 * threadIdx.x;
  out[threadIdx.x] = and_or(own[0], own[1], own[2]);
}

// out[i] = [square root of in[i][0], in[i][1] / in[i][0]].
__global__ void moderate_kernel(const float* in, float* out) {
  const int i = 2 * (blockIdx.x * 32 + threadIdx.x);
  out[i] = sqrt_moderate(in[i]);
  out[i + 1] = divide_moderate(in[i + 1], in[i]);
}

template <typename T>
__global__ void larger_magnitudes_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t* own = in + 2 * threadIdx.x;
  out[threadIdx.x] = larger_magnitudes<T>(own[0], own[1]) & 0x7fff7fffu;
}

// Two warps hand each other a number, phase after phase: out[phase][warp] is the other's.
__global__ void mbarrier_kernel(const int* in, int* out, int phases) {
#if defined(NF4_HOPPER_CODE)
  Carve carve;
  int* slots = carve.take<int>(4);
  auto* barrier = carve.take<Mbarrier>(2);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 2);
    mbarrier_init_done();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  for (int phase = 0; phase < phases; ++phase) {
    slots[phase % 2 * 2 + warp] = in[phase * 2 + warp];
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, phase % 2);
    out[phase * 2 + warp] = slots[phase % 2 * 2 + 1 - warp];
  }
#endif
}

// One box as it lies in shared memory.
__global__ void tma_kernel(const __grid_constant__ TensorMap map, uint4* out, int bytes, int dims,
                           int c0, int c1, int c3) {
#if defined(NF4_HOPPER_CODE)
  Carve carve;
  auto* box = carve.take<unsigned char>(16384, 1024);
  auto* barrier = carve.take<Mbarrier>(2);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, bytes);
    if (dims == 2) {
      tma_load(box, map, barrier, c0, c1);
    } else {
      tma_load(box, map, barrier, c0, 0, 0, c3);
    }
  }
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes / 16; i += 32) out[i] = reinterpret_cast<uint4*>(box)[i];
#endif
}

// Two warpgroups write boxes of 8 rows of 64 elements, `steps` of them one after the other through
// the same shared memory, to rows 8 * warpgroup of their columns.
__global__ void __launch_bounds__(256)
    tma_store_kernel(const __grid_constant__ TensorMap map, const uint4* in, int steps, int c1) {
#if defined(NF4_HOPPER_CODE)
  constexpr int kBox = 1024;
  Carve carve;
  auto* boxes = carve.take<unsigned char>(2 * kBox, 1024);
  const int group = static_cast<int>(threadIdx.x / 128), lane = static_cast<int>(threadIdx.x % 128);
  auto* own = reinterpret_cast<uint4*>(boxes + group * kBox);
  for (int step = 0; step < steps; ++step) {
    if (lane == 0) tma_store_wait();
    warpgroup_sync();
    if (lane < kBox / 16) own[lane] = in[(step * 2 + group) * (kBox / 16) + lane];
    fence_async_shared();
    warpgroup_sync();
    if (lane == 0) {
      tma_store(map, own, step * 64, c1 + group * 8);
      tma_store_commit();
    }
  }
  if (lane == 0) tma_store_wait();
#endif
}

// Two CTAs load the halves of 8 rows of 64 elements for both, two stages in turn, `steps` steps of
// K: out[CTA][step] is the stage as it lies in the shared memory of each.
__global__ void __launch_bounds__(64)
    cluster_kernel(const __grid_constant__ TensorMap map, uint4* out, int steps) {
#if defined(NF4_HOPPER_CODE)
  constexpr int kStage = 2048, kHalf = 1024;
  Carve carve;
  auto* stages = carve.take<unsigned char>(2 * kStage, 1024);
  auto* full = carve.take<Mbarrier>(4);
  Mbarrier* empty = full + 2;
  const int rank = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 2);
    }
    mbarrier_init_done();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2;
      mbarrier_wait(empty + stage, (step / 2 + 1) % 2);
      mbarrier_arrive_expect(full + stage, kStage);
      tma_load_all(stages + stage * kStage + rank * kHalf, map, full + stage, step * 64, rank * 8,
                   2);
    }
  } else if (threadIdx.x >= 32) {
    const int lane = threadIdx.x - 32;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2;
      mbarrier_wait(full + stage, step / 2 % 2);
      for (int i = lane; i < kStage / 16; i += 32) {
        out[(rank * steps + step) * (kStage / 16) + i] =
            reinterpret_cast<const uint4*>(stages + stage * kStage)[i];
      }
      __syncwarp();
      if (lane < 2) mbarrier_arrive_at(empty + stage, lane);
    }
  }
  cluster_sync();
#endif
}

// Where wgmma takes its operands from.
enum class Source { kFragments, kShared, kSharedByRows };

// d [128 threads][64 kHalves] = w [64, k] times x over steps of 64 of k that reuse one stage. x is
// [columns, k] or, by rows, [k, columns], of 128 kHalves columns; w comes from shared memory or as
// fragments a [step][4][128 threads][4].
template <typename T, Source kSource, int kHalves>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                 const uint32_t* a, float* d, int steps) {
#if defined(NF4_HOPPER_CODE)
  constexpr bool kFragments = kSource == Source::kFragments;
  constexpr int kStage = kHalves * 16384;
  Carve carve;
  auto* x = carve.take<unsigned char>(kStage, 1024);
  auto* w = carve.take<unsigned char>(8192, 1024);
  auto* barrier = carve.take<Mbarrier>(2);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_done();
  }
  __syncthreads();
  float acc[kHalves][16][4] = {};
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, kStage + 8192);
      if constexpr (kSource == Source::kSharedByRows) {
        for (int block = 0; block < 2 * kHalves; ++block) {
          tma_load(x + block * 8192, x_map, barrier, block * 64, step * 64);
        }
      } else {
        tma_load(x, x_map, barrier, step * 64, 0);
      }
      tma_load(w, w_map, barrier, step * 64, 0);
    }
    uint32_t own[4][4] = {};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < 4 && kFragments; ++i) {
        own[c][i] = a[((step * 4 + c) * 128 + threadIdx.x) * 4 + i];
      }
      wgmma_pin(own[c]);
    }
    mbarrier_wait(barrier, step % 2);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint64_t b = moved(shared_matrix(x), c * 32);
      const uint64_t from_shared = moved(shared_matrix(w), c * 32);
      if constexpr (kFragments) {
        wgmma<T>(acc, own[c], b);
      } else if constexpr (kSource == Source::kShared) {
        wgmma<T>(acc, from_shared, b);
      } else {
        wgmma<T, true>(acc, from_shared, moved(shared_matrix_by_rows(x, 8192), c * 2048));
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int c = 0; c < 4; ++c) wgmma_pin(own[c]);
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    wgmma_results(acc[h]);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      d[(threadIdx.x * kHalves + h) * 64 + i] = acc[h][i / 4][i % 4];
    }
  }
#endif
}

template <typename T, int kHalves>
int wgmma_probe(const void* x, const void* w, const uint32_t* a, float* d, int64_t k,
                bool by_rows) {
  TensorMap x_map, w_map;
  int status = by_rows ? encode_matrix(x, k, 128 * kHalves, 64, &x_map)
                       : encode_matrix(x, 128 * kHalves, k, 128 * kHalves, &x_map);
  if (status == 0) status = encode_matrix(w, 64, k, 64, &w_map);
  if (status != 0) return status;
  return launch(by_rows        ? wgmma_kernel<T, Source::kSharedByRows, kHalves>
                : a != nullptr ? wgmma_kernel<T, Source::kFragments, kHalves>
                               : wgmma_kernel<T, Source::kShared, kHalves>,
                dim3(1), dim3(128), kHalves * 16384 + 8192 + 16, nullptr, x_map, w_map, a, d,
                static_cast<int>((k + 63) / 64));
}

// d [128 threads][64] = a [64, 16] b [16, 128] of a shared memory that holds `image` as it is, b in
// its first 16 KiB: where shared_matrix_by_rows says that b's elements lie, without TMA.
__global__ void __launch_bounds__(128)
    wgmma_image_kernel(const uint4* image, float* d, int to_next) {
#if defined(NF4_HOPPER_CODE)
  Carve carve;
  auto* shared = carve.take<uint4>(1536, 1024);
  for (int i = threadIdx.x; i < 1536; i += 128) shared[i] = image[i];
  fence_async_shared();
  __syncthreads();
  float acc[1][16][4] = {};
  wgmma_fence();
  wgmma<__nv_bfloat16, true>(acc, shared_matrix(shared + 1024),
                             shared_matrix_by_rows(shared, to_next));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_results(acc[0]);
#pragma unroll
  for (int i = 0; i < 64; ++i) d[threadIdx.x * 64 + i] = acc[0][i / 4][i % 4];
#endif
}

}  // namespace
}  // namespace nf4::cuda

using namespace nf4::cuda;

extern "C" {
int probe_mma(const void* a, const void* b, void* c, int is_bf16) {
  return launch(is_bf16 ? mma_kernel<__nv_bfloat16> : mma_kernel<__half>, dim3(1), dim3(32), 0,
                nullptr, static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b),
                static_cast<float*>(c));
}
int probe_load_matrix(const void* rows, void* out, int transpose) {
  return launch(transpose ? load_matrix_kernel<true> : load_matrix_kernel<false>, dim3(1), dim3(32),
                512, nullptr, static_cast<const uint4*>(rows), static_cast<uint32_t*>(out));
}
int probe_cp_async(const void* in, void* out) {
  return launch(cp_async_kernel, dim3(1), dim3(32), 1024, nullptr, static_cast<const uint4*>(in),
                static_cast<uint4*>(out));
}
int probe_and_or(const void* in, void* out) {
  return launch(and_or_kernel, dim3(1), dim3(32), 0, nullptr, static_cast<const uint32_t*>(in),
                static_cast<uint32_t*>(out));
}
int probe_moderate(const void* in, void* out, int blocks) {
  return launch(moderate_kernel, dim3(blocks), dim3(32), 0, nullptr, static_cast<const float*>(in),
                static_cast<float*>(out));
}
int probe_larger_magnitudes(const void* in, void* out, int is_bf16) {
  return launch(
      is_bf16 ? larger_magnitudes_kernel<__nv_bfloat16> : larger_magnitudes_kernel<__half>, dim3(1),
      dim3(32), 0, nullptr, static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out));
}
int probe_mbarrier(const void* in, void* out, int phases) {
  return launch(mbarrier_kernel, dim3(1), dim3(64), 32, nullptr, static_cast<const int*>(in),
                static_cast<int*>(out), phases);
}
// A box of 32 bytes by 128 rows (uint8) at (c0, c1) of in [rows, columns].
int probe_tma_32(const void* in, void* out, int64_t rows, int64_t columns, int c0, int c1) {
  TensorMap map;
  const auto width = static_cast<uint64_t>(columns), height = static_cast<uint64_t>(rows);
  const int status = encode({in, 1, 2, {width, height}, {width}, {32, 128}, Swizzle::k32}, &map);
  return status != 0 ? status
                     : launch(tma_kernel, dim3(1), dim3(32), 16384 + 16, nullptr, map,
                              static_cast<uint4*>(out), 32 * 128, 2, c0, c1, 0);
}
// 64 elements of 2 bytes by 128 rows of in [rows, columns], of each 16 rows the even ones first.
int probe_tma_128(const void* in, void* out, int64_t rows, int64_t columns, int c0, int c3) {
  TensorMap map;
  const auto width = static_cast<uint64_t>(columns), height = static_cast<uint64_t>(rows);
  const int status = encode({in,
                             2,
                             4,
                             {width, 8, 2, height / 16},
                             {width * 4, width * 2, width * 32},
                             {64, 8, 2, 8},
                             Swizzle::k128},
                            &map);
  return status != 0 ? status
                     : launch(tma_kernel, dim3(1), dim3(32), 16384 + 16, nullptr, map,
                              static_cast<uint4*>(out), 16384, 4, c0, 0, c3);
}
int probe_cluster(const void* in, void* out, int64_t k) {
  TensorMap map;
  const int status = encode_matrix(in, 16, k, 8, &map);
  return status != 0
             ? status
             : launch_clusters(cluster_kernel, dim3(2), dim3(64), 2, 4096 + 32, nullptr, map,
                               static_cast<uint4*>(out), static_cast<int>((k + 63) / 64));
}
int probe_tma_store(void* out, const void* in, int64_t rows, int64_t columns, int c1) {
  TensorMap map;
  const int status = encode_matrix(out, rows, columns, 8, &map);
  return status != 0
             ? status
             : launch(tma_store_kernel, dim3(1), dim3(256), 2048, nullptr, map,
                      static_cast<const uint4*>(in), static_cast<int>((columns + 63) / 64), c1);
}
int probe_wgmma(const void* x, const void* w, const void* a, void* d, int64_t k, int is_bf16,
                int by_rows, int halves) {
  const auto* fragments = static_cast<const uint32_t*>(a);
  auto* out = static_cast<float*>(d);
  const auto probe = halves == 1
                         ? (is_bf16 ? wgmma_probe<__nv_bfloat16, 1> : wgmma_probe<__half, 1>)
                         : (is_bf16 ? wgmma_probe<__nv_bfloat16, 2> : wgmma_probe<__half, 2>);
  return probe(x, w, fragments, out, k, by_rows);
}
int probe_wgmma_image(const void* image, void* d, int to_next) {
  return launch(wgmma_image_kernel, dim3(1), dim3(128), 24576, nullptr,
                static_cast<const uint4*>(image), static_cast<float*>(d), to_next);
}
}
