// The launchers of linear, linear_lora and their backward passes: choose kernels, cut workspace.
#include <algorithm>

#include "launch.cuh"
#include "lora_few.cuh"
#include "matmul.cuh"
#include "vector.cuh"

namespace nf4::cuda {
namespace {

constexpr size_t kAlign = 256;
size_t rounded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

size_t forward_workspace(const Matmul& p) {
  if (few_forward_takes(&p, 1)) return few_forward_workspace(&p, 1);
  const size_t hopper = hopper_forward_takes(p) ? hopper_forward_workspace(p) : 0;
  const size_t tile = tile_forward_takes(p) ? tile_forward_workspace(p) : 0;
  return hopper > tile ? hopper : tile;
}
// Computes the down-projections beforehand if the launch of the matmul cannot.
int downs_before(Matmul* p, bool in_launch, cudaStream_t stream) {
  for (int i = 0; i < p->down_count; ++i) {
    in_launch = in_launch && down_takes(p->downs[i], p->dtype, p->m);
  }
  if (in_launch) return 0;
  for (int i = 0; i < p->down_count; ++i) {
    const int status = general_down(p->downs[i], p->dtype, p->m, stream);
    if (status != 0) return status;
  }
  p->down_count = 0;
  return 0;
}

int forward(Matmul p, void* workspace, cudaStream_t stream) {
  if (p.m == 0) return 0;
  if (few_forward_takes(&p, 1)) {
    const int status = downs_before(&p, few_down_takes(p, 1), stream);
    return status != 0 ? status : few_forward(&p, 1, workspace, stream);
  }
  const bool hopper = hopper_forward_takes(p), tile = tile_forward_takes(p);
  int status = downs_before(&p, p.weight.n > 0 && (hopper || tile), stream);
  if (status != 0 || p.weight.n == 0) return status;
  if (hopper) {
    status = hopper_forward(p, workspace, stream);
    if (status != cudaErrorNotSupported) return status;
    status = downs_before(&p, tile, stream);
    if (status != 0) return status;
  }
  return tile ? tile_forward(p, workspace, stream) : general_forward(p, stream);
}
size_t backward_workspace(const Matmul& p) {
  const size_t hopper = hopper_backward_takes(p) ? hopper_backward_workspace(p) : 0;
  return std::max(hopper, tile_backward_takes(p) ? tile_backward_workspace(p) : 0);
}
int backward(const Matmul& p, void* workspace, cudaStream_t stream) {
  if (p.m == 0 || p.weight.k == 0) return 0;
  if (hopper_backward_takes(p)) {
    const int status = hopper_backward(p, workspace, stream);
    if (status != cudaErrorNotSupported) return status;
  }
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
  return {x, member.weight, member.bias, member.y, m, dtype, up, nullptr, 0};
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
                  lora.dtype,
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

// What backward wants of grad_y [m, n], ds and db, and of x [m, k], da; `ds` carries the scaling.
Pass pass_of_grad_y(const void* grad_y, const float* s, const nf4_weight& w, const nf4_lora& lora,
                    float* ds, void* db, int64_t m, int dtype) {
  Pass p = {};
  p.in = grad_y, p.in_dtype = dtype;
  p.m = m, p.c = w.n, p.r = static_cast<int>(lora.r);
  p.right = lora.b, p.right_dtype = lora.dtype, p.down_out = ds;
  p.left = s, p.outer_out = db, p.outer_dtype = lora.dtype, p.outer_transposed = true;
  p.down_scaling = p.outer_scaling = static_cast<float>(lora.scaling);
  return p;
}
Pass pass_of_x(const void* x, const float* ds, const nf4_weight& w, const nf4_lora& lora, void* da,
               int64_t m, int dtype) {
  Pass p = {};
  p.in = x, p.in_dtype = dtype;
  p.m = m, p.c = w.k, p.r = static_cast<int>(lora.r);
  p.left = ds, p.outer_out = da, p.outer_dtype = lora.dtype;
  p.outer_scaling = 1.0f;
  p.dropout = dropout_of(lora.dropout_p, lora.seed);
  return p;
}
size_t pass_workspace(const Pass& p) {
  return std::max(pass_takes(p) ? tile_pass_workspace(p) : 0, general_pass_workspace(p));
}
int pass(const Pass& p, void* workspace, cudaStream_t stream) {
  return pass_takes(p) ? tile_pass(p, workspace, stream) : general_pass(p, workspace, stream);
}

}  // namespace
}  // namespace nf4::cuda

using namespace nf4::cuda;

extern "C" size_t nf4_cuda_linear_workspace(const nf4_weight* weight, int64_t m, int dtype) {
  return forward_workspace({nullptr, *weight, nullptr, nullptr, m, dtype, {}, nullptr, 0});
}

extern "C" int nf4_cuda_linear(const void* x, const nf4_weight* weight, const void* bias, void* y,
                               int64_t m, int dtype, void* workspace, cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  return forward({x, *weight, bias, y, m, dtype, {}, nullptr, 0}, workspace, stream);
}

extern "C" size_t nf4_cuda_linear_backward_workspace(const nf4_weight* weight, int64_t m,
                                                     int dtype) {
  return backward_workspace({nullptr, *weight, nullptr, nullptr, m, dtype, {}, nullptr, 0});
}

extern "C" int nf4_cuda_linear_backward(const void* grad_y, const nf4_weight* weight, void* dx,
                                        int64_t m, int dtype, void* workspace,
                                        cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  return backward({grad_y, *weight, nullptr, dx, m, dtype, {}, nullptr, 0}, workspace, stream);
}

extern "C" size_t nf4_cuda_linear_lora_workspace(const nf4_weight* weight, const nf4_lora* lora,
                                                 int64_t m, int dtype) {
  Up up = {};
  up.r = static_cast<int>(lora->r);
  return forward_workspace({nullptr, *weight, nullptr, nullptr, m, dtype, up, nullptr, 0});
}

extern "C" int nf4_cuda_linear_lora(const void* x, const nf4_weight* weight, const void* bias,
                                    const nf4_lora* lora, void* y, float* s, int64_t m, int dtype,
                                    void* workspace, cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  const nf4_member member{*weight, bias, *lora, y, s};
  Group g = group_of(x, &member, 1, m, dtype);
  g.matmuls[0].downs = g.downs, g.matmuls[0].down_count = 1;
  return forward(g.matmuls[0], workspace, stream);
}

extern "C" size_t nf4_cuda_linear_lora_group_workspace(const nf4_member* members, int count,
                                                       int64_t m, int dtype) {
  size_t most = 0;
  for (int start = 0; start < count; start += kMaxMembers) {
    const int here = count - start < kMaxMembers ? count - start : kMaxMembers;
    const Group g = group_of(nullptr, members + start, here, m, dtype);
    if (few_forward_takes(g.matmuls, here)) {
      most = std::max(most, few_forward_workspace(g.matmuls, here));
    } else if (group_forward_takes(g.matmuls, here)) {
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
    Group g = group_of(x, members + start, here, m, dtype);
    // The first launch computes all down-projections, so x is read once for them.
    g.matmuls[0].downs = g.downs, g.matmuls[0].down_count = here;
    const bool few = few_forward_takes(g.matmuls, here);
    if (few || in_one_launch(g.matmuls, here)) {
      status = downs_before(&g.matmuls[0], !few || few_down_takes(g.matmuls[0], here), stream);
      if (status != 0) break;
      status = few ? few_forward(g.matmuls, here, workspace, stream)
                   : group_forward(g.matmuls, here, workspace, stream);
      continue;
    }
    for (int i = 0; i < here && status == 0; ++i) {
      status = forward(g.matmuls[i], workspace, stream);
    }
  }
  return status;
}

// [ds | what the largest of the three steps needs]
extern "C" size_t nf4_cuda_linear_lora_backward_workspace(const nf4_weight* weight,
                                                          const nf4_lora* lora, int64_t m,
                                                          int dtype) {
  // Not null: outputs that may be wanted.
  static float wanted;
  const Pass passes[] = {
      pass_of_grad_y(nullptr, nullptr, *weight, *lora, &wanted, &wanted, m, dtype),
      pass_of_x(nullptr, nullptr, *weight, *lora, &wanted, m, dtype)};
  Up up = {};
  up.r = static_cast<int>(lora->r);
  size_t rest = backward_workspace({nullptr, *weight, nullptr, nullptr, m, dtype, up, nullptr, 0});
  for (const Pass& p : passes) rest = std::max(rest, pass_workspace(p));
  return rounded(m * lora->r * sizeof(float)) + rest;
}

extern "C" int nf4_cuda_linear_lora_backward(const void* grad_y, const void* x, const float* s,
                                             const nf4_weight* weight, const nf4_lora* lora,
                                             void* dx, void* da, void* db, int64_t m, int dtype,
                                             void* workspace, cudaStream_t stream) {
  if (!valid(*weight)) return cudaErrorInvalidValue;
  if (dx == nullptr && da == nullptr) return 0;
  auto* ds = static_cast<float*>(workspace);
  void* rest = static_cast<unsigned char*>(workspace) + rounded(m * lora->r * sizeof(float));
  // One pass over grad_y for ds and db, one over x for da, each after what its inputs come from.
  void* db_wanted = da != nullptr ? db : nullptr;
  int status =
      pass(pass_of_grad_y(grad_y, s, *weight, *lora, ds, db_wanted, m, dtype), rest, stream);
  if (status == 0 && dx != nullptr) {
    const Up up{ds,          lora->a,
                lora->dtype, static_cast<int>(lora->r),
                1.0f,        dropout_of(lora->dropout_p, lora->seed)};
    status = backward({grad_y, *weight, nullptr, dx, m, dtype, up, nullptr, 0}, rest, stream);
  }
  if (status == 0 && da != nullptr) {
    status = pass(pass_of_x(x, ds, *weight, *lora, da, m, dtype), rest, stream);
  }
  return status;
}
