// Registers the CPU optimizer step; see bindings_cpu.cpp. Everything that the kernel relies on is
// checked here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "nf4/codes.h"

namespace {

using nf4::cpu::AdamWParam;
using nf4::cpu::AdamWScalars;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "adamw_step";

void check_dense(const char* name, const Tensor& t, int64_t numel) {
  check(t.is_cpu() && t.is_contiguous(), kOp, name, " must be contiguous and on the CPU");
  check(t.numel() == numel, kOp, name, " must have ", numel, " elements, got ", shape_of(t));
}

// The moments or scales of a parameter.
void* state_of(const char* name, const Tensor& t, int64_t numel, ScalarType dtype) {
  check_dense(name, t, numel);
  check(t.scalar_type() == dtype, kOp, name, " must be ", name_of(dtype), ", got ",
        name_of(t.scalar_type()));
  return t.mutable_data_ptr();
}

void adamw_step(Tensors params, Tensors grads, Tensors state1, Tensors state2, Tensors absmax1,
                Tensors absmax2, Tensor hyper, std::optional<Tensor> seed,
                std::vector<int64_t> offsets, Tensor skipped) {
  const size_t count = params.size();
  for (const Tensors* list : {&grads, &state1, &state2, &absmax1, &absmax2}) {
    check(list->size() == count, kOp, "every list must have ", count, " entries, got ",
          list->size());
  }
  check(offsets.size() == count, kOp, "offsets must have ", count, " entries, got ",
        offsets.size());
  AdamWScalars scalars;
  constexpr int64_t kScalars = sizeof scalars / sizeof(float);
  const auto* values =
      static_cast<const float*>(state_of("hyper", hyper, kScalars, ScalarType::Float));
  scalars = {values[0], values[1], values[2], values[3],
             values[4], values[5], values[6], values[7]};
  const uint64_t* key = nullptr;
  if (seed) key = static_cast<const uint64_t*>(state_of("seed", *seed, 1, ScalarType::Long));
  auto* left = static_cast<int64_t*>(state_of("skipped", skipped, 1, ScalarType::Long));

  std::vector<AdamWParam> table;
  table.reserve(count);
  int64_t blocks = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel();
    if (numel == 0) continue;
    const int64_t own = (numel + NF4_NESTED_BLOCK_SIZE - 1) / NF4_NESTED_BLOCK_SIZE;
    const bool quantized = state1[i].scalar_type() == ScalarType::Byte;
    const ScalarType state = quantized ? ScalarType::Byte : ScalarType::Float;
    const int64_t scales = quantized ? own : 0;
    AdamWParam p = {};
    p.dtype = dtype_of(kOp, "every parameter", params[i].scalar_type());
    check_dense("every parameter", params[i], numel);
    check_dense("every gradient", grads[i], numel);
    check(offsets[i] >= 0 && offsets[i] % 4 == 0, kOp,
          "offsets must be multiples of 4 and not negative, got ", offsets[i]);
    p.param = params[i].mutable_data_ptr();
    p.grad = {grads[i].const_data_ptr(), dtype_of(kOp, "every gradient", grads[i].scalar_type())};
    p.state1 = state_of("state1", state1[i], numel, state);
    p.state2 = state_of("state2", state2[i], numel, state);
    auto* absmax = state_of("absmax1", absmax1[i], scales, ScalarType::Float);
    p.absmax1 = quantized ? static_cast<float*>(absmax) : nullptr;
    absmax = state_of("absmax2", absmax2[i], scales, ScalarType::Float);
    p.absmax2 = quantized ? static_cast<float*>(absmax) : nullptr;
    p.numel = numel;
    p.offset = offsets[i];
    p.first_block = blocks;
    blocks += own;
    table.push_back(p);
  }
  nf4::cpu::kernels().adamw_step(table.data(), static_cast<int64_t>(table.size()), scalars, key,
                                 left);
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4, CPU, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(nf4_cpu, CPU, m) { register_ops(m); }
