// What the CUDA bindings share: argument checks, and a call on torch's current stream.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/api.h"
#include "make_empty.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Args>
void check(bool condition, const char* op, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  text << "nf4." << op << ": ";
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline int dtype_of(const char* op, const char* name, ScalarType dtype) {
  check(dtype != ScalarType::Double, op, name,
        " must be float32, float16 or bfloat16 on the cuda backend, got float64; "
        "nf4.use_backend(\"reference\") computes in float64");
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        op, name, " must be float32, float16 or bfloat16");
  return dtype == ScalarType::Float  ? NF4_FLOAT32
         : dtype == ScalarType::Half ? NF4_FLOAT16
                                     : NF4_BFLOAT16;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// torch's current stream. Looked up in the CUDA half of torch, which is loaded wherever a CUDA
// tensor exists, so that this library itself loads beside a CPU-only torch too.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol =
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  check(getter != nullptr && getter(device, &stream) == 0, "cuda", "torch gives no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// The device of one call: current while it lives.
class Call {
 public:
  Call(const char* op, const Tensor& on)
      : op_(op), on_(on), guard_(on.get_device_index()), stream_(current_stream(guard_index())) {}
  cudaStream_t stream() const { return stream_; }
  void same_device(const char* name, const Tensor& t) const {
    check(t.is_cuda() && t.get_device_index() == on_.get_device_index(), op_, name,
          " must be on the same CUDA device as the other tensors");
  }
  Tensor workspace(size_t bytes) const {
    return make_empty(on_, Sizes{static_cast<int64_t>(bytes)}, ScalarType::Byte);
  }
  void done(int status) const { check(status == 0, op_, "CUDA launch failed, status ", status); }

 private:
  int32_t guard_index() const { return on_.get_device_index(); }
  const char* op_;
  const Tensor& on_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace
