// The vector operations that the kernels are written in, in the compiler's generic vectors: SSE2 on
// x86-64, NEON on aarch64. The other simd_*.h files define the same operations.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "scalar.h"

namespace nf4::cpu {
namespace {

constexpr int kWidth = 4;  // floats in a vector
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

inline F broadcast(float v) { return F{v, v, v, v}; }
inline F zero() { return broadcast(0.0f); }
inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F sqrt(F v) {
  for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
// a * b + c; only for sums whose rounding is free, since it may or may not fuse.
inline F fma(F a, F b, F c) {
#if defined(__aarch64__)
  return reinterpret_cast<F>(vfmaq_f32(reinterpret_cast<float32x4_t>(c),
                                       reinterpret_cast<float32x4_t>(a),
                                       reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
inline float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }

template <class Word>
inline F load(const Word* p) {
  return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class Word>
inline void store(Word* p, F v) {
  for (int i = 0; i < kWidth; ++i) from_float(v[i], p + i);
}

inline I splat(int v) { return I{v, v, v, v}; }
// The bits of |v|. As integers they order like the magnitudes, with NaN above infinity.
inline I magnitude_bits(F v) { return reinterpret_cast<I>(v) & splat(0x7fffffff); }
inline I max(I a, I b) { return (a > b) ? a : b; }
inline int reduce_max(I v) {
  int m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// One step down a threshold tree: 2 * node + !(value <= threshold).
inline I descend(I node, F value, F threshold) { return node + node + 1 + (value <= threshold); }
// The low byte of each lane.
inline void store_bytes(uint8_t* p, I v) {
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(v[i]);
}

// kWidth / 2 lanes of 64 bits.
typedef uint64_t W __attribute__((vector_size(16)));
// The full products of the low halves of each lane with b; the high halves are 0.
inline W multiply_words(W a, uint32_t b) { return a * static_cast<uint64_t>(b); }

// A table of 16 floats, looked up by the low 4 bits of each lane.
struct Lookup16 {
  const float* values;
};
inline Lookup16 lookup16(const float* table) { return {table}; }
inline F find(const Lookup16& t, I i) {
  return F{t.values[i[0] & 15], t.values[i[1] & 15], t.values[i[2] & 15], t.values[i[3] & 15]};
}
inline F gather(const float* table, I i) {
  return F{table[i[0]], table[i[1]], table[i[2]], table[i[3]]};
}
// table[index] for 8-bit indices.
// table[index] of 4 entries.
inline F find4(const float* table, I index) { return gather(table, index); }
inline F lookup256(const float* table, I index) { return gather(table, index); }
inline I load_bytes(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }

// kPackStep ranks (their low 4 bits) to kPackStep / 2 bytes of codes, the first in the high nibble.
constexpr int kPackStep = 8;
inline void pack_nibbles(const uint8_t* nodes, const uint8_t* order, uint8_t* out) {
  for (int i = 0; i < kPackStep / 2; ++i) {
    out[i] = static_cast<uint8_t>(order[nodes[2 * i] & 15] << 4 | order[nodes[2 * i + 1] & 15]);
  }
}

// A block's 16 decoded values: as floats, or rounded once to a 16-bit type.
struct FloatTable {
  float values[16];
};
struct WordTable {
  uint16_t words[16];
};
inline FloatTable scaled(const Lookup16& codes, float scale) {
  FloatTable t;
  for (int i = 0; i < 16; ++i) t.values[i] = codes.values[i] * scale;
  return t;
}
template <class Word>
inline WordTable rounded(const FloatTable& t, Word) {
  WordTable out;
  for (int i = 0; i < 16; ++i) {
    Word word;
    from_float(t.values[i], &word);
    out.words[i] = word.bits;
  }
  return out;
}
inline void store_table(const FloatTable& t, float* out) { std::memcpy(out, &t, sizeof t); }
template <class Word>
inline void store_table(const WordTable& t, Word* out) {
  std::memcpy(out, &t, sizeof t);
}

// Waits for stores that bypass the caches.
inline void fence() {}

// kDecodeStep elements from kDecodeStep / 2 bytes. kBypass: with stores that bypass the caches,
// where the instruction set has them; out is then 64-byte aligned.
constexpr int kDecodeStep = 8;
template <bool kBypass>
inline void decode(const uint8_t* packed, const FloatTable& t, float* out) {
  for (int i = 0; i < kDecodeStep / 2; ++i) {
    out[2 * i] = t.values[packed[i] >> 4];
    out[2 * i + 1] = t.values[packed[i] & 15];
  }
}
template <bool kBypass, class Word>
inline void decode(const uint8_t* packed, const WordTable& t, Word* out) {
  for (int i = 0; i < kDecodeStep / 2; ++i) {
    out[2 * i].bits = t.words[packed[i] >> 4];
    out[2 * i + 1].bits = t.words[packed[i] & 15];
  }
}

// dst[j * ld_dst + i] = src[i * ld_src + j] for i, j < kWidth. src need not be aligned.
inline void transpose(const uint32_t* src, int64_t ld_src, uint32_t* dst, int64_t ld_dst) {
  for (int i = 0; i < kWidth; ++i) {
    uint32_t row[kWidth];
    std::memcpy(row, reinterpret_cast<const char*>(src) + 4 * i * ld_src, sizeof row);
    for (int j = 0; j < kWidth; ++j) dst[j * ld_dst + i] = row[j];
  }
}

// The same in kTransposeParts parts of equal cost, to be done in order: `between` [kWidth][kWidth]
// holds what the later parts need from the earlier ones.
constexpr int kTransposeParts = 1;
inline void transpose_part(int, const uint32_t* src, int64_t ld_src, uint32_t*, uint32_t* dst,
                           int64_t ld_dst) {
  transpose(src, ld_src, dst, ld_dst);
}

inline I load_dwords(const void* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Every lane shifted; what comes in at the top is never looked at.
inline I shift_right(I v, int bits) { return v >> bits; }

// The register tile of the matmuls: kTileRows x kTileVectors accumulators.
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
// The tile of the streaming matmul.
constexpr int kStreamRows = 4;
constexpr int kStreamVectors = 1;

}  // namespace
}  // namespace nf4::cpu
