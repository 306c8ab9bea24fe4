// The launcher of linear_tile.cuh for weights that share x: their tiles in one launch.
#include "linear_tile.cuh"

namespace nf4::cuda {
namespace {

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kCtasPerSm)
    linear_group_kernel(const __grid_constant__ GroupArguments g, int format,
                        const __grid_constant__ DownWork work) {
  run_tiles<Forward<T, S>>(
      g, format, [&](float* scratch, int* ticket) { down_before<T, S>(work, scratch, ticket); });
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads)
    linear_group_sum_kernel(const __grid_constant__ GroupArguments g) {
  run_sums<Forward<T, S>>(g);
}

template <typename S>
GroupArguments group_arguments(const Matmul* members, int count, void* workspace) {
  GroupArguments g = {};
  g.count = count;
  for (int i = 0; i < count; ++i) {
    const Matmul& p = members[i];
    g.members[i] = tile_arguments<S>(p, p.weight.n, p.weight.k, workspace);
    g.first[i + 1] = g.first[i] + g.members[i].row_tiles * g.members[i].token_tiles;
  }
  const Schedule all = make_schedule(g.first[count], g.members[0].schedule.steps, S::kCtasPerSm);
  for (int i = 0; i < count; ++i) g.members[i].schedule = all;
  return g;
}

}  // namespace

bool group_forward_takes(const Matmul* members, int count) {
  if (count < 2 || count > kMaxMembers) return false;
  for (int i = 0; i < count; ++i) {
    if (!tile_forward_takes(members[i])) return false;
    if (members[i].weight.format != members[0].weight.format) return false;
  }
  return true;
}

size_t group_forward_workspace(const Matmul* members, int count) {
  return with_forward_shape(members[0].m, members[0].dtype, [&](auto, auto shape) -> size_t {
    using S = decltype(shape);
    return counter_bytes(members[0]) +
           partial_bytes<S>(group_arguments<S>(members, count, nullptr).members[0].schedule);
  });
}

int group_forward(const Matmul* members, int count, void* workspace, cudaStream_t stream) {
  return with_forward_shape(members[0].m, members[0].dtype, [&](auto element, auto shape) -> int {
    using T = decltype(element);
    using S = decltype(shape);
    auto* partial = static_cast<unsigned char*>(workspace) + counter_bytes(members[0]);
    const DownWork work = down_work(members[0], kDownTiles<S>, workspace);
    GroupArguments g = group_arguments<S>(members, count, partial);
    for (int i = 0; i < count; ++i) {
      g.members[i].counters = work.counters;
      g.members[i].tasks = work.tasks;
    }
    const int status = clear_counters(work, stream);
    if (status != 0) return status;
    return launch_tiles<S>(linear_group_kernel<T, S>, linear_group_sum_kernel<T, S>, g,
                           g.members[0].schedule, members[0].weight.format, stream, work);
  });
}

}  // namespace nf4::cuda
