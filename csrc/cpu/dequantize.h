// Dequantization of any flat range of a weight, for the op and for the matmuls' panels.
#pragma once

#include "formats.h"
#include "simd.h"

namespace nf4::cpu {
namespace {

// float32 scale of one block. Two roundings when nested: the file is built without contraction.
inline float block_scale(const Weight& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  return kDynamic8Codes[w.codes[block]] * w.nested_absmax[block >> kNestedShift] + w.offset;
}

inline FloatTable decode_table(const Lookup16& codes, float scale, float*) {
  return scaled(codes, scale);
}
template <class Word>
inline WordTable decode_table(const Lookup16& codes, float scale, Word*) {
  return rounded(scaled(codes, scale), Word{});
}
#if NF4_ISA >= NF4_ISA_AVX512_BF16
inline WordTable decode_table(const Lookup16& codes, float scale, BFloat*) {
  const FloatTable table = scaled(codes, scale);
  // The instruction flushes subnormals; codes are at least 2^-9, or 0.
  const float size = scale < 0 ? -scale : scale;
  return size > 0x1p-100f && size < 0x1p100f ? rounded_normal(table) : rounded(table, BFloat{});
}
#endif

// Elements [first, first + count) of one block of a 4-bit format.
template <bool kBypass, class T>
inline void decode_nibbles(const uint8_t* packed, int64_t first, int64_t count,
                           const Lookup16& codes, float scale, T* out) {
  const auto table = decode_table(codes, scale, out);
  const uint8_t* bytes = packed + (first >> 1);
  if ((first & 1) == 0 && count % kDecodeStep == 0) {
    for (int64_t i = 0; i < count; i += kDecodeStep) {
      decode<kBypass>(bytes + (i >> 1), table, out + i);
    }
    return;
  }
  T values[16];
  store_table(table, values);
  if (first & 1) {
    *out++ = values[*bytes++ & 15];
    --count;
  }
  for (; count >= kDecodeStep; count -= kDecodeStep, out += kDecodeStep) {
    decode<false>(bytes, table, out);
    bytes += kDecodeStep / 2;
  }
  for (; count >= 2; count -= 2, ++bytes, out += 2) {
    out[0] = values[*bytes >> 4];
    out[1] = values[*bytes & 15];
  }
  if (count) *out = values[*bytes >> 4];
}

// Elements of one block of an 8-bit format.
template <class T>
inline void decode_bytes(const uint8_t* packed, int64_t count, const float* codes, float scale,
                         T* out) {
  const F by = broadcast(scale);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store(out + i, mul(lookup256(codes, load_bytes(packed + i)), by));
  }
  for (; i < count; ++i) from_float(codes[packed[i]] * scale, out + i);
}

// Decodes elements [first, first + count) of the flattened weight to float, Half or BFloat.
// kBypass needs first to be a multiple of the block size and out to be 64-byte aligned.
template <bool kBypass = false, class T>
void decode_range(const Weight& w, int64_t first, int64_t count, T* out) {
  const Format format = format_of(w.format);
  const Lookup16 codes = lookup16(format.codes);
  while (count > 0) {
    const int64_t block = first >> w.block_shift;
    const int64_t piece = min(count, ((block + 1) << w.block_shift) - first);
    const float scale = block_scale(w, block);
    if (format.four_bit) {
      decode_nibbles<kBypass>(w.packed, first, piece, codes, scale, out);
    } else {
      decode_bytes(w.packed + first, piece, format.codes, scale, out);
    }
    first += piece;
    count -= piece;
    out += piece;
  }
}

// Results that do not fit in the caches are not written through them: a store that misses would
// first read its line. Below, a reader finds the result in the cache.
constexpr int64_t kBypassBytes = int64_t{16} << 20;

void dequantize(const Weight& weight, int64_t numel, DType dtype, void* out) {
  with_type(dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(out);
    const bool bypass = numel * static_cast<int64_t>(sizeof *data) >= kBypassBytes &&
                        reinterpret_cast<uintptr_t>(out) % 64 == 0;
    // Multiples of every block size. Memory likes each thread's own writes to be far apart.
    const int64_t each = int64_t{1} << (bypass ? 19 : 15);
    parallel_for(ceil_div(numel, each), [&](int64_t task) {
      const int64_t first = task * each, count = min(each, numel - first);
      if (!bypass) return decode_range(weight, first, count, data + first);
      decode_range<true>(weight, first, count, data + first);
      fence();
    });
  });
}

}  // namespace
}  // namespace nf4::cpu
