// The kernel table of the instruction set that this translation unit is compiled for.
#pragma once

#include "linear_lora.h"
#include "optimizer.h"
#include "quantize.h"

namespace nf4::cpu {
namespace {

constexpr KernelTable make_table(const char* name) {
  return {name,      quantize,        double_quantize, dequantize,
          linear,    linear_backward, linear_lora,     linear_lora_backward,
          adamw_step};
}

}  // namespace
}  // namespace nf4::cpu
