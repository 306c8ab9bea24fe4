// The vector operations that the kernels are written in, for AVX-512 F, BW, VL and DQ, and with
// NF4_ISA_AVX512_BF16 for AVX512-BF16 too. See simd_portable.h for what each operation means.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace nf4::cpu {
namespace {

constexpr int kWidth = 16;
using F = __m512;
using I = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F broadcast(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
// The first count lanes of v.
inline void store(float* p, int64_t count, F v) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(0xffffu >> (kWidth - count)), v);
}
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F sqrt(F v) { return _mm512_sqrt_ps(v); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }

inline F load(const BFloat* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline F load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m256i round_words(F v, BFloat) {
  // Integer rounding: vcvtneps2bf16 would flush subnormals to zero.
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
inline __m256i round_words(F v, Half) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(BFloat* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_words(v, BFloat{}));
}
inline void store(Half* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_words(v, Half{}));
}

inline I splat(int v) { return _mm512_set1_epi32(v); }
inline I magnitude_bits(F v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}
inline I max(I a, I b) { return _mm512_max_epi32(a, b); }
inline int reduce_max(I v) { return _mm512_reduce_max_epi32(v); }

inline I descend(I node, F value, F threshold) {
  const __mmask16 above = _mm512_cmp_ps_mask(value, threshold, _CMP_NLE_UQ);
  const I twice = _mm512_add_epi32(node, node);
  return _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
}
inline void store_bytes(uint8_t* p, I v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}

typedef uint64_t W __attribute__((vector_size(64)));
inline W multiply_words(W a, uint32_t b) {
  return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}

struct Lookup16 {
  F values;
};
inline Lookup16 lookup16(const float* table) { return {_mm512_loadu_ps(table)}; }
inline F find(const Lookup16& t, I index) { return _mm512_permutexvar_ps(index, t.values); }
inline F find4(const float* table, I lane) {
  return _mm512_permutexvar_ps(lane, _mm512_broadcast_f32x4(_mm_loadu_ps(table)));
}
inline F gather(const float* table, I index) { return _mm512_i32gather_ps(index, table, 4); }
// table[index] for 8-bit indices: 8 lookups of 32 entries and 7 blends take half as long as a
// gather.
inline F lookup256(const float* table, I index) {
  F part[8];
  for (int i = 0; i < 8; ++i) {
    part[i] = _mm512_permutex2var_ps(load(table + 32 * i), index, load(table + 32 * i + 16));
  }
  for (int bit = 5, n = 4; bit < 8; ++bit, n /= 2) {
    const __mmask16 set = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
    for (int i = 0; i < n; ++i) part[i] = _mm512_mask_mov_ps(part[2 * i], set, part[2 * i + 1]);
  }
  return part[0];
}
inline I load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

constexpr int kPackStep = 64;
inline void pack_nibbles(const uint8_t* nodes, const uint8_t* order, uint8_t* out) {
  const __m512i map =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(order)));
  const __m512i codes = _mm512_shuffle_epi8(map, _mm512_loadu_si512(nodes));
  const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
}

// A block's 16 decoded values, as floats or rounded to 16 bits (twice over, so that an index's bit
// 4 does not matter).
struct FloatTable {
  F values;
};
struct WordTable {
  __m512i words;
};
inline FloatTable scaled(const Lookup16& codes, float scale) {
  return {_mm512_mul_ps(codes.values, _mm512_set1_ps(scale))};
}
template <class Word>
inline WordTable rounded(const FloatTable& t, Word type) {
  return {_mm512_broadcast_i64x4(round_words(t.values, type))};
}
inline void store_table(const FloatTable& t, float* out) { store(out, t.values); }
template <class Word>
inline void store_table(const WordTable& t, Word* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(t.words));
}

template <bool kBypass>
inline void put(void* p, __m512i v) {
  if constexpr (kBypass) {
    _mm512_stream_si512(static_cast<__m512i*>(p), v);
  } else {
    _mm512_storeu_si512(p, v);
  }
}
inline void fence() { _mm_sfence(); }

constexpr int kDecodeStep = 32;
template <bool kBypass>
inline void decode(const uint8_t* packed, const FloatTable& t, float* out) {
  const __m512i bytes =
      _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  // Element j of 8 sits in the nibble at bit 4, 0, 12, 8, ... of its dword.
  const __m512i shift = _mm512_broadcast_i64x4(_mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
  for (int i = 0; i < 2; ++i) {
    const __m512i dword = _mm512_add_epi32(half, _mm512_set1_epi32(2 * i));
    const __m512i nibbles = _mm512_srlv_epi32(_mm512_permutexvar_epi32(dword, bytes), shift);
    put<kBypass>(out + 16 * i, _mm512_castps_si512(_mm512_permutexvar_ps(nibbles, t.values)));
  }
}
template <bool kBypass, class Word>
inline void decode(const uint8_t* packed, const WordTable& t, Word* out) {
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  // Word j takes byte j / 2; what its upper byte holds ends above bit 4 of the index.
  const __m512i spread =
      _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a,
                       0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                       0x03030303, 0x02020202, 0x01010101, 0x00000000);
  const __m512i words = _mm512_shuffle_epi8(bytes, spread);
  const __m512i nibbles = _mm512_srlv_epi16(words, _mm512_set1_epi32(4));
  put<kBypass>(out, _mm512_permutexvar_epi16(nibbles, t.words));
}

constexpr int kTransposeParts = 8;
inline void transpose_part(int part, const uint32_t* src, int64_t ld_src, uint32_t* between,
                           uint32_t* dst, int64_t ld_dst) {
  __m512i r[4], t[4];
  if (part < 4) {
    // The 128-bit lane q of between[4 * part + j] holds columns 4 * q + j of rows 4 * part..
    for (int i = 0; i < 4; ++i) r[i] = _mm512_loadu_si512(src + (4 * part + i) * ld_src);
    for (int i = 0; i < 4; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    uint32_t* out = between + 4 * part * 16;
    _mm512_store_si512(out, _mm512_unpacklo_epi64(t[0], t[2]));
    _mm512_store_si512(out + 16, _mm512_unpackhi_epi64(t[0], t[2]));
    _mm512_store_si512(out + 32, _mm512_unpacklo_epi64(t[1], t[3]));
    _mm512_store_si512(out + 48, _mm512_unpackhi_epi64(t[1], t[3]));
    return;
  }
  const int j = part - 4;
  for (int i = 0; i < 4; ++i) r[i] = _mm512_load_si512(between + (4 * i + j) * 16);
  t[0] = _mm512_shuffle_i32x4(r[0], r[1], 0x88);
  t[1] = _mm512_shuffle_i32x4(r[0], r[1], 0xdd);
  t[2] = _mm512_shuffle_i32x4(r[2], r[3], 0x88);
  t[3] = _mm512_shuffle_i32x4(r[2], r[3], 0xdd);
  _mm512_storeu_si512(dst + j * ld_dst, _mm512_shuffle_i32x4(t[0], t[2], 0x88));
  _mm512_storeu_si512(dst + (j + 4) * ld_dst, _mm512_shuffle_i32x4(t[1], t[3], 0x88));
  _mm512_storeu_si512(dst + (j + 8) * ld_dst, _mm512_shuffle_i32x4(t[0], t[2], 0xdd));
  _mm512_storeu_si512(dst + (j + 12) * ld_dst, _mm512_shuffle_i32x4(t[1], t[3], 0xdd));
}

inline void transpose(const uint32_t* src, int64_t ld_src, uint32_t* dst, int64_t ld_dst) {
  alignas(64) uint32_t between[16 * 16];
#pragma GCC unroll 8
  for (int part = 0; part < kTransposeParts; ++part) {
    transpose_part(part, src, ld_src, between, dst, ld_dst);
  }
}

inline I load_dwords(const void* p) { return _mm512_loadu_si512(p); }
inline I shift_right(I v, int bits) { return _mm512_srli_epi32(v, static_cast<unsigned>(bits)); }

#if NF4_ISA >= NF4_ISA_AVX512_BF16
// c + the products of the two bfloat16 in each 32-bit lane.
inline F dot_pairs(F c, I a, I b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
// rounded() to bfloat16 of values that are normal, or zero.
inline WordTable rounded_normal(const FloatTable& t) {
  return {_mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(t.values))};
}
// Lane i holds first[i] and, above it, second[i] as bfloat16.
inline I pair_words(F first, F second) {
  const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order =
      _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(order, words);
}
// The words of t (from rounded) at the low 4 bits of each word of index.
inline I find_words(const WordTable& t, I index) {
  return _mm512_permutexvar_epi16(index, t.words);
}
// Groups of 8 words in the order 1 5 0 4 3 7 2 6: see BFloatMath.
inline I pair_order(I words) {
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
  return _mm512_shuffle_epi8(words, order);
}
#endif

// The register tile of the matmuls: 24 accumulators, 4 weights and one activation of 32 registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
// The tile of the streaming matmul: 24 accumulators, 2 weights, 2 of nibbles, the codes.
constexpr int kStreamRows = 12;
constexpr int kStreamVectors = 2;

}  // namespace
}  // namespace nf4::cpu
