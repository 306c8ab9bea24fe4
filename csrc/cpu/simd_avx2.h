// The vector operations that the kernels are written in, for AVX2, FMA and F16C. See
// simd_portable.h for what each operation means.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace nf4::cpu {
namespace {

constexpr int kWidth = 8;
using F = __m256;
using I = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F broadcast(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F sqrt(F v) { return _mm256_sqrt_ps(v); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(F v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

inline F load(const BFloat* p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
inline F load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __m128i round_words(F v, BFloat) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline __m128i round_words(F v, Half) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(BFloat* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_words(v, BFloat{}));
}
inline void store(Half* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_words(v, Half{}));
}

inline I splat(int v) { return _mm256_set1_epi32(v); }
inline I magnitude_bits(F v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
inline I max(I a, I b) { return _mm256_max_epi32(a, b); }
inline int reduce_max(I v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}

inline I descend(I node, F value, F threshold) {
  const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, threshold, _CMP_NLE_UQ));
  return _mm256_sub_epi32(_mm256_add_epi32(node, node), above);
}
inline void store_bytes(uint8_t* p, I v) {
  const __m256i pick =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(v, pick);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                   _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}

typedef uint64_t W __attribute__((vector_size(32)));
inline W multiply_words(W a, uint32_t b) {
  return (W)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}

struct Lookup16 {
  F lower, upper;
};
inline Lookup16 lookup16(const float* table) { return {load(table), load(table + 8)}; }
inline F find(const Lookup16& t, I index) {
  const F lower = _mm256_permutevar8x32_ps(t.lower, index);
  const F upper = _mm256_permutevar8x32_ps(t.upper, index);
  return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F find4(const float* table, I lane) {
  return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(table)), lane);
}
inline F gather(const float* table, I index) { return _mm256_i32gather_ps(table, index, 4); }
inline F lookup256(const float* table, I index) { return gather(table, index); }
inline I load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

constexpr int kPackStep = 32;
inline void pack_nibbles(const uint8_t* nodes, const uint8_t* order, uint8_t* out) {
  const __m256i map =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(order)));
  const __m256i codes =
      _mm256_shuffle_epi8(map, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(nodes)));
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(out),
      _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

struct FloatTable {
  F lower, upper;
};
// The low and the high bytes of 16 words, for byte shuffles.
struct WordTable {
  __m256i low, high;
};
inline FloatTable scaled(const Lookup16& codes, float scale) {
  const F s = broadcast(scale);
  return {mul(codes.lower, s), mul(codes.upper, s)};
}
template <class Word>
inline WordTable rounded(const FloatTable& t, Word type) {
  const __m128i first = round_words(t.lower, type), second = round_words(t.upper, type);
  const __m128i mask = _mm_set1_epi16(0xff);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}
inline void store_table(const FloatTable& t, float* out) {
  store(out, t.lower);
  store(out + 8, t.upper);
}
template <class Word>
inline void store_table(const WordTable& t, Word* out) {
  const __m128i low = _mm256_castsi256_si128(t.low), high = _mm256_castsi256_si128(t.high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi8(low, high));
}

template <bool kBypass>
inline void put(void* p, __m256i v) {
  if constexpr (kBypass) {
    _mm256_stream_si256(static_cast<__m256i*>(p), v);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
}
inline void fence() { _mm_sfence(); }

constexpr int kDecodeStep = 32;
template <bool kBypass>
inline void decode(const uint8_t* packed, const FloatTable& t, float* out) {
  const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  for (int i = 0; i < 4; ++i) {
    int dword;
    std::memcpy(&dword, packed + 4 * i, sizeof dword);
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(dword), shift);
    const F values = find(Lookup16{t.lower, t.upper}, nibbles);
    put<kBypass>(out + 8 * i, _mm256_castps_si256(values));
  }
}
template <bool kBypass, class Word>
inline void decode(const uint8_t* packed, const WordTable& t, Word* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i second = _mm_and_si128(bytes, mask);
  const __m256i nibbles =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(first, second)),
                              _mm_unpackhi_epi8(first, second), 1);
  const __m256i low = _mm256_shuffle_epi8(t.low, nibbles);
  const __m256i high = _mm256_shuffle_epi8(t.high, nibbles);
  const __m256i even = _mm256_unpacklo_epi8(low, high);  // words 0..7 and 16..23
  const __m256i odd = _mm256_unpackhi_epi8(low, high);   // words 8..15 and 24..31
  put<kBypass>(out, _mm256_permute2x128_si256(even, odd, 0x20));
  put<kBypass>(out + 16, _mm256_permute2x128_si256(even, odd, 0x31));
}

inline void transpose(const uint32_t* src, int64_t ld_src, uint32_t* dst, int64_t ld_dst) {
  __m256i r[8], t[8];
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i * ld_src));
  }
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i * ld_dst),
                        _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + (i + 4) * ld_dst),
                        _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
  }
}

constexpr int kTransposeParts = 1;
inline void transpose_part(int, const uint32_t* src, int64_t ld_src, uint32_t*, uint32_t* dst,
                           int64_t ld_dst) {
  transpose(src, ld_src, dst, ld_dst);
}

inline I load_dwords(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline I shift_right(I v, int bits) { return _mm256_srli_epi32(v, bits); }

// 12 accumulators, 2 weights and one activation of 16 registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
// 8 accumulators, the codes in 2 registers, nibbles, weights and an activation.
constexpr int kStreamRows = 8;
constexpr int kStreamVectors = 1;

}  // namespace
}  // namespace nf4::cpu
