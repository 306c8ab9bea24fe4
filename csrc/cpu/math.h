// Products and the arithmetic that they are computed in.
#pragma once

#include "operand.h"

namespace nf4::cpu {
namespace {

struct Product {
  Operand a;  // [rows, depth]
  Operand b;  // [columns, depth] when transposed, else [depth, columns]
  int64_t rows;
  int64_t depth;
  bool transposed;
};

// Few dot products are summed in chains of this length, as BLAS does. Costs up to a third.
constexpr int64_t kShortChain = 32;

// The dword of 8 nibbles of a 4-bit weight holds element e at this bit.
constexpr int nibble_bit(int element) { return 4 * (element ^ 1); }

inline F scaled_element(const Lookup16& codes, I nibbles, int element, F scale) {
  return mul(find(codes, shift_right(nibbles, nibble_bit(element))), scale);
}

// float32 products. Math also says what one 32-bit lane of an operand holds: kDepth elements.
struct FloatMath {
  using Element = float;
  using Vector = F;
  using Codes = Lookup16;
  static constexpr int kDepth = 1;
  static constexpr int kBlock = kWidth == 16 ? 128 : 256;  // a panel is 32 KiB at most
  static constexpr int kDotRows = 1;  // up to which dots.h beats stream.h (4096x4096, Zen 5)
  static Vector load_b(const uint32_t* b) { return load(reinterpret_cast<const float*>(b)); }
  static Vector splat_a(const Element* a) { return broadcast(*a); }
  static F multiply_add(Vector a, Vector b, F c) { return fma(a, b, c); }

  // out = elements [e, e + kDepth) of the 8 nibbles in each lane, scaled.
  static void decode(const Lookup16& codes, I nibbles, int e, F scale, uint32_t* out) {
    store(reinterpret_cast<float*>(out), scaled_element(codes, nibbles, e, scale));
  }

  // Part p of the 8 nibbles in each lane, unscaled, and where x's element for it lies.
  static constexpr int kParts = 8;
  static Codes codes(const Format& format) { return lookup16(format.codes); }
  static Vector part(const Codes& codes, I nibbles, int p) {
    return find(codes, shift_right(nibbles, 4 * p));
  }
  static constexpr int lane_of_part(int p) { return p ^ 1; }
  // x in the order that parts take it: as it is.
  static void arrange(const Matrix& x, int64_t first, int64_t count, Element* out) {
    convert(x, first, count, out);
  }
};

#if NF4_ISA >= NF4_ISA_AVX512_BF16
// Products of pairs of bfloat16, summed in float32.
struct BFloatMath {
  using Element = BFloat;
  using Vector = I;
  using Codes = WordTable;
  static constexpr int kDepth = 2;
  static constexpr int kBlock = 256;
  static constexpr int kDotRows = 4;  // up to which dots.h beats stream.h
  static Vector load_b(const uint32_t* b) { return load_dwords(b); }
  static Vector splat_a(const Element* a) {
    int pair;
    std::memcpy(&pair, a, sizeof pair);
    return splat(pair);
  }
  static F multiply_add(Vector a, Vector b, F c) { return dot_pairs(c, a, b); }

  static void decode(const Lookup16& codes, I nibbles, int e, F scale, uint32_t* out) {
    const F first = scaled_element(codes, nibbles, e, scale);
    const F second = scaled_element(codes, nibbles, e + 1, scale);
    const I pairs = pair_words(first, second);
    std::memcpy(out, &pairs, sizeof pairs);
  }

  // A shift by 4 p leaves the nibbles of elements p ^ 1 and (p ^ 1) + 4 at the bottom of a lane's
  // two words, so those are a pair, and x is brought into that order.
  static constexpr int kParts = 4;
  static Codes codes(const Format& format) {
    return decode_table(lookup16(format.codes), 1.0f, static_cast<BFloat*>(nullptr));
  }
  static Vector part(const Codes& codes, I nibbles, int p) {
    return find_words(codes, shift_right(nibbles, 4 * p));
  }
  static constexpr int lane_of_part(int p) { return p; }
  static void arrange(const Matrix& x, int64_t first, int64_t count, Element* out) {
    const auto* in = static_cast<const Element*>(x.data) + first;
    constexpr int kGroup = 2 * kWidth;
    Element rest[kGroup] = {};
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) {
      store_dwords(pair_order(load_dwords(reinterpret_cast<const uint32_t*>(in + i))), out + i);
    }
    if (i == count) return;
    std::memcpy(rest, in + i, static_cast<size_t>(count - i) * sizeof *in);
    store_dwords(pair_order(load_dwords(reinterpret_cast<const uint32_t*>(rest))), rest);
    std::memcpy(out + i, rest, static_cast<size_t>(count - i) * sizeof *in);
  }

 private:
  static void store_dwords(I v, Element* out) { std::memcpy(out, &v, sizeof v); }
};
#endif

template <class Math>
constexpr int kSteps = Math::kBlock / Math::kDepth;  // 32-bit lanes of a full depth block

template <class Element>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<BFloat> = DType::kBFloat16;

// Calls fn with the arithmetic for activations of this dtype: bfloat16 products where the
// instruction set has them and x is bfloat16, else float32.
template <class Fn>
void with_math([[maybe_unused]] DType dtype, const Fn& fn) {
#if NF4_ISA >= NF4_ISA_AVX512_BF16
  if (dtype == DType::kBFloat16) return fn(BFloatMath{});
#endif
  fn(FloatMath{});
}

}  // namespace
}  // namespace nf4::cpu
