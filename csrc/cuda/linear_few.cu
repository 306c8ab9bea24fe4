// The launcher of linear_few.cuh, for one weight or several that share x.
#include <algorithm>

#include "linear_few.cuh"

namespace nf4::cuda {
namespace {

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    linear_few_kernel(const __grid_constant__ GroupArguments all, int format,
                      const __grid_constant__ FewDown down) {
  if constexpr (S::kShared <= kMostShared) run_few<T, S>(all, format, down);
}

template <bool kGroup>
using Few8 = FewShape<1, 11, 2, kGroup>;
template <bool kGroup>
using Few16 = FewShape<2, 11, 2, kGroup>;
template <bool kGroup>
using Few32 = FewShape<4, 7, 3, kGroup>;

template <typename Body>
auto with_few_shape(int64_t m, int dtype, int count, const Body& body) {
  const auto by_count = [&](auto element, auto one, auto several) {
    return count == 1 ? body(element, one) : body(element, several);
  };
  const auto by_shape = [&](auto element) {
    if (m <= 8) return by_count(element, Few8<false>(), Few8<true>());
    if (m <= 16) return by_count(element, Few16<false>(), Few16<true>());
    return by_count(element, Few32<false>(), Few32<true>());
  };
  return dtype == NF4_FLOAT16 ? by_shape(__half()) : by_shape(__nv_bfloat16());
}

}  // namespace

bool few_forward_takes(const Matmul* members, int count) {
  if (count < 1 || count > kMaxMembers || device().compute_capability < 80) return false;
  const size_t shared = with_few_shape(members[0].m, members[0].dtype, count,
                                       [](auto, auto shape) -> size_t { return shape.kShared; });
  if (shared > static_cast<size_t>(device().shared_bytes)) return false;
  for (int i = 0; i < count; ++i) {
    const Matmul& p = members[i];
    const nf4_weight& w = p.weight;
    if (!tile_forward_takes(p) || p.m > kFewTokens || w.k % kUnit != 0) return false;
    // Chunks of a weight and tiles of a launch are counted in 32 bits.
    if (w.n * (w.k / kChunk) >= int64_t{1} << 31) return false;
    if (reinterpret_cast<uintptr_t>(w.absmax) % 4 != 0) return false;
    if (w.k != members[0].weight.k || w.format != members[0].weight.format) return false;
  }
  return true;
}

size_t few_forward_workspace(const Matmul* members, int count) {
  int groups = 0;
  for (int i = 0; i < count; ++i) groups += (members[i].up.r + kDownRanks - 1) / kDownRanks;
  return groups == 0 ? 0 : few_down_bytes(members[0].m, members[0].weight.k, groups);
}

int few_forward(const Matmul* members, int count, void* workspace, cudaStream_t stream) {
  return with_few_shape(
      members[0].m, members[0].dtype, count, [&](auto element, auto shape) -> int {
        using T = decltype(element);
        using S = decltype(shape);
        const FewDown down = few_down_work(members[0], workspace);
        GroupArguments g = {};
        g.count = count;
        for (int i = 0; i < count; ++i) {
          const Matmul& p = members[i];
          const nf4_weight& w = p.weight;
          TileArguments& a = g.members[i];
          a.in = p.in, a.packed = w.packed, a.scales = scales_of(w);
          a.bias = p.bias, a.out = p.out;
          a.m = p.m, a.n = w.n, a.k = w.k;
          a.log2_block = log2_of(w.block_size);
          a.up = p.up;
          a.counters = down.work.counters, a.tasks = down.work.tasks;
          g.first[i + 1] = g.first[i] + (w.n + S::kRows - 1) / S::kRows;
        }
        if (down.work.tasks != 0) {
          const int status = clear(workspace, kCounterBytes, stream);
          if (status != 0) return status;
        }
        const int64_t ctas = std::min<int64_t>(g.first[count], device().multiprocessors);
        return launch(linear_few_kernel<T, S>, dim3(static_cast<unsigned>(ctas)), dim3(S::kThreads),
                      S::kShared, stream, g, members[0].weight.format, down);
      });
}

}  // namespace nf4::cuda
