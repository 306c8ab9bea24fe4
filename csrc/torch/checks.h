// Argument checks that the CPU bindings share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "../cpu/kernels.h"

namespace {

using nf4::cpu::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
void check(bool condition, const char* op, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  text << "nf4." << op << ": ";
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline DType dtype_of(const char* op, const char* name, ScalarType dtype) {
  check(dtype != ScalarType::Double, op, name,
        " must be float32, float16 or bfloat16 on the cpu backend, got float64; "
        "nf4.use_backend(\"reference\") computes in float64");
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        op, name, " must be float32, float16 or bfloat16, got ", name_of(dtype));
  return dtype == ScalarType::Float  ? DType::kFloat32
         : dtype == ScalarType::Half ? DType::kFloat16
                                     : DType::kBFloat16;
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

}  // namespace
