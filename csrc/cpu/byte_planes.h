// Look-ups of 64 codes of an 8-bit map at once, by the bytes of their values.
#pragma once

#include "formats.h"
#include "simd.h"

namespace nf4::cpu {
namespace {

constexpr uint32_t bits_of(float value) {
  // No bit cast in C++17: value is 0 or +-m * 2^e with m in [1, 2).
  if (value == 0.0f) return 0;
  uint32_t bits = value < 0.0f ? 0x80000000u : 0u;
  double m = value < 0.0f ? -double{value} : double{value};
  uint32_t exponent = 127;
  for (; m < 1.0; m *= 2.0) --exponent;
  for (; m >= 2.0; m /= 2.0) ++exponent;
  return bits | exponent << 23 | static_cast<uint32_t>((m - 1.0) * 8388608.0);
}

constexpr uint8_t kSignedZero = 127;  // code of 0 in the signed map; 0 in the unsigned one

#if NF4_ISA >= NF4_ISA_AVX512_BF16

// Code values by byte: plane[b][c] is byte b of the float of code c.
template <int kCodes>
struct BytePlanes {
  uint8_t plane[4][kCodes] = {};
};

template <int kCodes>
constexpr BytePlanes<kCodes> make_planes(const float* values) {
  BytePlanes<kCodes> p;
  for (int c = 0; c < kCodes; ++c) {
    const uint32_t bits = bits_of(values[c]);
    for (int b = 0; b < 4; ++b) p.plane[b][c] = static_cast<uint8_t>(bits >> (8 * b));
  }
  return p;
}

// Those of the signed map from 0 on; the last, 1.0, is left out. The others are their negatives.
alignas(64) constexpr BytePlanes<128> kSignedPlanes = make_planes<128>(kDynamic8Codes +
                                                                       kSignedZero);
alignas(64) constexpr BytePlanes<256> kUnsignedPlanes = make_planes<256>(kDynamic8UnsignedCodes);

constexpr bool is_odd_map() {
  for (int c = 1; c <= kSignedZero; ++c) {
    if (kDynamic8Codes[kSignedZero - c] != -kDynamic8Codes[kSignedZero + c]) return false;
  }
  return kDynamic8Codes[255] == 1.0f;
}
static_assert(is_odd_map(), "negative codes are looked up as positive ones");

inline I look_up(const uint8_t (&table)[128], I index) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
}
inline void find_bytes(const BytePlanes<128>& planes, I codes, I (&byte)[4]) {
  const I difference = _mm512_sub_epi8(codes, _mm512_set1_epi8(kSignedZero));
  const I index = _mm512_abs_epi8(difference);  // of 1.0 it is 128, which finds 0.0
  for (int b = 0; b < 4; ++b) byte[b] = look_up(planes.plane[b], index);
  const I top = _mm512_set1_epi8(static_cast<char>(0x80));
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  byte[2] = _mm512_ternarylogic_epi32(byte[2], index, top, kOrAnd);
  byte[3] = _mm512_ternarylogic_epi32(byte[3], difference, top, kOrAnd);
  byte[3] = _mm512_mask_mov_epi8(byte[3], _mm512_movepi8_mask(index), _mm512_set1_epi8(0x3f));
}

inline void find_bytes(const BytePlanes<256>& planes, I codes, I (&byte)[4]) {
  const __mmask64 upper = _mm512_movepi8_mask(codes), lower = _knot_mask64(upper);
  for (int b = 0; b < 4; ++b) {
    const uint8_t* t = planes.plane[b];
    // Lanes that are masked out stay codes.
    const I mixed = _mm512_mask2_permutex2var_epi8(_mm512_load_si512(t), codes, lower,
                                                   _mm512_load_si512(t + 64));
    byte[b] = _mm512_mask2_permutex2var_epi8(_mm512_load_si512(t + 128), mixed, upper,
                                             _mm512_load_si512(t + 192));
  }
}

// values[j], lane i = the value of codes[16 * j + i], of which count are read, at most 64.
template <class Planes>
inline void look_up(const Planes& planes, const uint8_t* codes, F (&values)[4],
                    int64_t count = 64) {
  // Unpacking works within 128-bit lanes: a 4 x 4 transposition of dwords beforehand puts the
  // results in order.
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  I byte[4];
  find_bytes(planes,
             _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(~0ull >> (64 - count), codes)),
             byte);
  const I word[4] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1]),
                     _mm512_unpacklo_epi8(byte[2], byte[3]),
                     _mm512_unpackhi_epi8(byte[2], byte[3])};
  values[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(word[0], word[2]));
  values[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(word[0], word[2]));
  values[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(word[1], word[3]));
  values[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(word[1], word[3]));
}

#endif

}  // namespace
}  // namespace nf4::cpu
