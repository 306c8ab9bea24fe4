// The launcher of linear_tile.cuh for one weight.
#include "linear_tile.cuh"

namespace nf4::cuda {
namespace {

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kCtasPerSm)
    linear_tile_kernel(const TileArguments p, int format, const __grid_constant__ DownWork work) {
  run_tiles<Forward<T, S>>(
      p, format, [&](float* scratch, int* ticket) { down_before<T, S>(work, scratch, ticket); });
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads) linear_sum_kernel(const TileArguments p) {
  run_sums<Forward<T, S>>(p);
}

}  // namespace

bool tile_forward_takes(const Matmul& p) { return tiles_take(p); }

size_t tile_forward_workspace(const Matmul& p) {
  return with_forward_shape(p.m, p.dtype, [&](auto, auto shape) -> size_t {
    using S = decltype(shape);
    return counter_bytes(p) +
           partial_bytes<S>(tile_arguments<S>(p, p.weight.n, p.weight.k, nullptr).schedule);
  });
}

int tile_forward(const Matmul& p, void* workspace, cudaStream_t stream) {
  return with_forward_shape(p.m, p.dtype, [&](auto element, auto shape) -> int {
    using T = decltype(element);
    using S = decltype(shape);
    auto* partial = static_cast<unsigned char*>(workspace) + counter_bytes(p);
    const DownWork work = down_work(p, kDownTiles<S>, workspace);
    TileArguments a = tile_arguments<S>(p, p.weight.n, p.weight.k, partial);
    a.counters = work.counters;
    a.tasks = work.tasks;
    const int status = clear_counters(work, stream);
    if (status != 0) return status;
    return launch_tiles<S>(linear_tile_kernel<T, S>, linear_sum_kernel<T, S>, a, a.schedule,
                           p.weight.format, stream, work);
  });
}

}  // namespace nf4::cuda
