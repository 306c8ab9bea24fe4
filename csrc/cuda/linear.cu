// The launchers of linear, linear_lora and their backward passes: choose kernels, cut workspace.
#include <algorithm>

#include "launch.cuh"
#include "matmul.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr size_t kAlign = 256;
size_t rounded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

size_t forward_workspace(const Matmul& p) {
  const size_t hopper = hopper_forward_takes(p) ? hopper_forward_workspace(p) : 0;
  const size_t tile = tile_forward_takes(p) ? tile_forward_workspace(p) : 0;
  return hopper > tile ? hopper : tile;
}
int forward(const Matmul& p, void* workspace, cudaStream_t stream) {
  if (p.m == 0 || p.weight.n == 0) return 0;
  if (hopper_forward_takes(p)) {
    const int status = hopper_forward(p, workspace, stream);
    if (status != cudaErrorNotSupported) return status;
  }
  return tile_forward_takes(p) ? tile_forward(p, workspace, stream) : general_forward(p, stream);
}
size_t backward_workspace(const Matmul& p) {
  return tile_backward_takes(p) ? tile_backward_workspace(p) : 0;
}
int backward(const Matmul& p, void* workspace, cudaStream_t stream) {
  if (p.m == 0 || p.weight.k == 0) return 0;
  return tile_backward_takes(p) ? tile_backward(p, workspace, stream) : general_backward(p, stream);
}

// Members of a group, and the work of each as the single launchers see it.
struct Group {
  Matmul matmuls[kMaxMembers];
  Down downs[kMaxMembers];
};

Matmul member_matmul(const void* x, const nf4_member& member, int64_t m, int dtype) {
  const nf4_lora& lora = member.lora;
  const Up up{member.s,
              lora.b,
              lora.dtype,
              static_cast<int>(lora.r),
              static_cast<float>(lora.scaling),
              dropout_of(0.0, nullptr)};
  return {x, member.weight, member.bias, member.y, m, dtype, up};
}

Group group_of(const void* x, const nf4_member* members, int count, int64_t m, int dtype) {
  Group g = {};
  for (int i = 0; i < count; ++i) {
    const nf4_lora& lora = members[i].lora;
    g.matmuls[i] = member_matmul(x, members[i], m, dtype);
    g.downs[i] = {x,
                  lora.a,
                  members[i].s,
                  members[i].weight.k,
                  static_cast<int>(lora.r),
                  1.0f,
                  dropout_of(lora.dropout_p, lora.seed)};
  }
  return g;
}

// One launch for all matmuls, unless Hopper's kernels take them: those are for so many tokens that
// every member fills the SMs by itself.
bool in_one_launch(const Matmul* matmuls, int count) {
  return !hopper_forward_takes(matmuls[0]) && group_forward_takes(matmuls, count);
}

bool valid(const nf4_weight& w) { return valid_layout(w.block_size, w.format); }

// da and db; `ds` carries the scaling already.
Outer gradient_a(const void* x, const float* ds, const nf4_weight& w, const nf4_lora& lora,
                 void* da, int64_t m, int dtype) {
  const auto r = static_cast<int>(lora.r);
  return {
      x, dtype, ds, da, lora.dtype, false, m, w.k, r, 1.0f, dropout_of(lora.dropout_p, lora.seed)};
}
Outer gradient_b(const void* grad_y, const float* s, const nf4_weight& w, const nf4_lora& lora,
                 void* db, int64_t m, int dtype) {
  const auto r = static_cast<int>(lora.r);
  return {grad_y,
          dtype,
          s,
          db,
          lora.dtype,
          true,
          m,
          w.n,
          r,
          static_cast<float>(lora.scaling),
          dropout_of(0.0, nullptr)};
}

}  // namespace
}  // namespace nf4::cuda

using namespace nf4::cuda;

extern "C" size_t nf4_cuda_linear_workspace(const nf4_weight* weight, int64_t m, int dtype) {
  return forward_workspace({nullptr, *weight, nullptr, nullptr, m, dtype, {}});
}

extern "C" int nf4_cuda_linear(const void* x, const nf4_weight* weight, const void* bias, void* y,
                               int64_t m, int dtype, void* workspace, cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  return forward({x, *weight, bias, y, m, dtype, {}}, workspace, stream);
}

extern "C" size_t nf4_cuda_linear_backward_workspace(const nf4_weight* weight, int64_t m,
                                                     int dtype) {
  return backward_workspace({nullptr, *weight, nullptr, nullptr, m, dtype, {}});
}

extern "C" int nf4_cuda_linear_backward(const void* grad_y, const nf4_weight* weight, void* dx,
                                        int64_t m, int dtype, void* workspace,
                                        cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  return backward({grad_y, *weight, nullptr, dx, m, dtype, {}}, workspace, stream);
}

extern "C" size_t nf4_cuda_linear_lora_workspace(const nf4_weight* weight, const nf4_lora* lora,
                                                 int64_t m, int dtype) {
  Up up = {};
  up.r = static_cast<int>(lora->r);
  return forward_workspace({nullptr, *weight, nullptr, nullptr, m, dtype, up});
}

extern "C" int nf4_cuda_linear_lora(const void* x, const nf4_weight* weight, const void* bias,
                                    const nf4_lora* lora, void* y, float* s, int64_t m, int dtype,
                                    void* workspace, cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  const nf4_member member{*weight, bias, *lora, y, s};
  const Group g = group_of(x, &member, 1, m, dtype);
  const int status = lora_down(g.downs, 1, {dtype, lora->dtype, false, m}, stream);
  return status != 0 ? status : forward(g.matmuls[0], workspace, stream);
}

extern "C" size_t nf4_cuda_linear_lora_group_workspace(const nf4_member* members, int count,
                                                       int64_t m, int dtype) {
  size_t most = 0;
  for (int start = 0; start < count; start += kMaxMembers) {
    const int here = count - start < kMaxMembers ? count - start : kMaxMembers;
    const Group g = group_of(nullptr, members + start, here, m, dtype);
    if (group_forward_takes(g.matmuls, here)) {
      most = std::max(most, group_forward_workspace(g.matmuls, here));
    }
    for (int i = 0; i < here; ++i) most = std::max(most, forward_workspace(g.matmuls[i]));
  }
  return most;
}

extern "C" int nf4_cuda_linear_lora_group(const void* x, const nf4_member* members, int count,
                                          int64_t m, int dtype, void* workspace,
                                          cudaStream_t stream) {
  for (int i = 0; i < count; ++i) {
    if (!valid(members[i].weight) || members[i].lora.dtype != members[0].lora.dtype) {
      return cudaErrorInvalidValue;
    }
  }
  int status = 0;
  for (int start = 0; start < count && status == 0; start += kMaxMembers) {
    const int here = count - start < kMaxMembers ? count - start : kMaxMembers;
    const Group g = group_of(x, members + start, here, m, dtype);
    status = lora_down(g.downs, here, {dtype, members[0].lora.dtype, false, m}, stream);
    if (status == 0 && in_one_launch(g.matmuls, here)) {
      status = group_forward(g.matmuls, here, workspace, stream);
      continue;
    }
    for (int i = 0; i < here && status == 0; ++i) {
      status = forward(g.matmuls[i], workspace, stream);
    }
  }
  return status;
}

// [ds | what the larger of the three kernels needs]
extern "C" size_t nf4_cuda_linear_lora_backward_workspace(const nf4_weight* weight,
                                                          const nf4_lora* lora, int64_t m,
                                                          int dtype) {
  size_t rest = nf4_cuda_linear_backward_workspace(weight, m, dtype);
  for (const Outer& outer : {gradient_a(nullptr, nullptr, *weight, *lora, nullptr, m, dtype),
                             gradient_b(nullptr, nullptr, *weight, *lora, nullptr, m, dtype)}) {
    const size_t bytes = lora_outer_workspace(outer);
    rest = bytes > rest ? bytes : rest;
  }
  return rounded(m * lora->r * sizeof(float)) + rest;
}

extern "C" int nf4_cuda_linear_lora_backward(const void* grad_y, const void* x, const float* s,
                                             const nf4_weight* weight, const nf4_lora* lora,
                                             void* dx, void* da, void* db, int64_t m, int dtype,
                                             void* workspace, cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  if (dx == nullptr && da == nullptr) return 0;
  const auto r = static_cast<int>(lora->r);
  const auto scaling = static_cast<float>(lora->scaling);
  auto* ds = static_cast<float*>(workspace);
  void* rest = static_cast<unsigned char*>(workspace) + rounded(m * lora->r * sizeof(float));
  const Down down{grad_y, lora->b, ds, weight->n, r, scaling, dropout_of(0.0, nullptr)};
  int status = lora_down(&down, 1, {dtype, lora->dtype, true, m}, stream);
  if (status == 0 && dx != nullptr) {
    const Up up{ds, lora->a, lora->dtype, r, 1.0f, dropout_of(lora->dropout_p, lora->seed)};
    status = backward({grad_y, *weight, nullptr, dx, m, dtype, up}, rest, stream);
  }
  if (status == 0 && da != nullptr) {
    status = lora_outer(gradient_a(x, ds, *weight, *lora, da, m, dtype), rest, stream);
    if (status == 0) {
      status = lora_outer(gradient_b(grad_y, s, *weight, *lora, db, m, dtype), rest, stream);
    }
  }
  return status;
}
