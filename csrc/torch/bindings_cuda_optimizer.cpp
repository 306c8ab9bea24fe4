// Registers the CUDA optimizer step; see bindings_cuda.cpp. Everything that the kernel relies on is
// checked here.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda_call.h"
#include "nf4/codes.h"

namespace {

using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "adamw_step";

void check_dense(const Call& call, const char* name, const Tensor& t, int64_t numel) {
  call.same_device(name, t);
  check(t.is_contiguous(), kOp, name, " must be contiguous");
  check(t.numel() == numel, kOp, name, " must have ", numel, " elements, got ", t.numel());
}

// The moments, scales or scalars of a step.
void* data_of(const Call& call, const char* name, const Tensor& t, int64_t numel,
              ScalarType dtype) {
  check_dense(call, name, t, numel);
  check(t.scalar_type() == dtype, kOp, name, " must be ",
        dtype == ScalarType::Byte   ? "uint8"
        : dtype == ScalarType::Long ? "int64"
                                    : "float32");
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
  const Call call(kOp, hyper);
  const auto* scalars =
      static_cast<const float*>(data_of(call, "hyper", hyper, 8, ScalarType::Float));
  const int64_t* key = nullptr;
  if (seed) key = static_cast<const int64_t*>(data_of(call, "seed", *seed, 1, ScalarType::Long));
  auto* left = static_cast<int64_t*>(data_of(call, "skipped", skipped, 1, ScalarType::Long));

  std::vector<nf4_adamw_param> table;
  table.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel();
    if (numel == 0) continue;
    const bool quantized = state1[i].scalar_type() == ScalarType::Byte;
    const ScalarType state = quantized ? ScalarType::Byte : ScalarType::Float;
    const int64_t scales = quantized ? ceil_div(numel, NF4_NESTED_BLOCK_SIZE) : 0;
    check_dense(call, "every parameter", params[i], numel);
    check_dense(call, "every gradient", grads[i], numel);
    check(offsets[i] >= 0 && offsets[i] % 4 == 0, kOp,
          "offsets must be multiples of 4 and not negative, got ", offsets[i]);
    nf4_adamw_param p = {};
    p.param = params[i].mutable_data_ptr();
    p.grad = grads[i].const_data_ptr();
    p.state1 = data_of(call, "state1", state1[i], numel, state);
    p.state2 = data_of(call, "state2", state2[i], numel, state);
    auto* absmax = data_of(call, "absmax1", absmax1[i], scales, ScalarType::Float);
    p.absmax1 = quantized ? static_cast<float*>(absmax) : nullptr;
    absmax = data_of(call, "absmax2", absmax2[i], scales, ScalarType::Float);
    p.absmax2 = quantized ? static_cast<float*>(absmax) : nullptr;
    p.numel = numel;
    p.offset = offsets[i];
    p.param_dtype = dtype_of(kOp, "every parameter", params[i].scalar_type());
    p.grad_dtype = dtype_of(kOp, "every gradient", grads[i].scalar_type());
    table.push_back(p);
  }
  if (table.empty()) return;
  const auto rows = static_cast<int64_t>(table.size());
  const Tensor work = call.workspace(nf4_cuda_adamw_step_workspace(rows));
  call.done(nf4_cuda_adamw_step(table.data(), rows, scalars, key, left, work.mutable_data_ptr(),
                                call.stream()));
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4, CUDA, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(nf4_cuda, CUDA, m) { register_ops(m); }
