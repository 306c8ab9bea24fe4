// Scalar conversions and small helpers, private to each instruction set's translation unit.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace nf4::cpu {
namespace {

// Storage of the two 16-bit types; distinct so that templates can tell them apart.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

inline float bits_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline float to_float(float v) { return v; }
inline float to_float(BFloat v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }

inline float to_float(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Exact for normal and subnormal halves alike: the exponent is rebiased by a product.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

inline void from_float(float f, float* out) { *out = f; }

inline void from_float(float f, BFloat* out) {
  const uint32_t u = float_bits(f);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  out->bits = static_cast<uint16_t>(nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline void from_float(float f, Half* out) {
  const uint32_t u = float_bits(f);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x47800000) {  // 2^16 and more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the half's bits, rounded to nearest even, in the low mantissa.
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// Runs fn(task) for every task on the injected thread pool.
template <class Fn>
void parallel_for(int64_t tasks, const Fn& fn) {
  if (tasks == 1) return fn(0);
  pool().run(
      tasks, [](void* context, int64_t task) { (*static_cast<const Fn*>(context))(task); },
      const_cast<Fn*>(&fn));
}

inline int64_t threads() { return pool().threads(); }

// Calls fn with a typed null pointer of the C++ type that stores dtype.
template <class Fn>
void with_type(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return fn(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return fn(static_cast<BFloat*>(nullptr));
  }
}

}  // namespace
}  // namespace nf4::cpu
