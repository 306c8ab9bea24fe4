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

#if NF4_ISA >= NF4_ISA_AVX512_BF16

// The code values by byte: plane[b][c] is byte b of the float of code c.
struct BytePlanes {
  uint8_t plane[4][256] = {};
};

constexpr BytePlanes make_planes(const float (&codes)[256]) {
  BytePlanes p;
  for (int c = 0; c < 256; ++c) {
    const uint32_t bits = bits_of(codes[c]);
    for (int b = 0; b < 4; ++b) p.plane[b][c] = static_cast<uint8_t>(bits >> (8 * b));
  }
  return p;
}

alignas(64) constexpr BytePlanes kSignedPlanes = make_planes(kDynamic8Codes);
alignas(64) constexpr BytePlanes kUnsignedPlanes = make_planes(kDynamic8UnsignedCodes);

// values[j], lane i = the value of codes[16 * j + i], of which count are read, at most 64.
inline void look_up(const BytePlanes& planes, const uint8_t* codes, F (&values)[4],
                    int64_t count = 64) {
  // Unpacking works within 128-bit lanes: a 4 x 4 transposition of dwords beforehand puts the
  // results in order.
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const I index =
      _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(~0ull >> (64 - count), codes));
  const __mmask64 upper = _mm512_movepi8_mask(index);
  I byte[4];
  for (int b = 0; b < 4; ++b) {
    const uint8_t* t = planes.plane[b];
    const I low = _mm512_permutex2var_epi8(_mm512_load_si512(t), index, _mm512_load_si512(t + 64));
    const I high =
        _mm512_permutex2var_epi8(_mm512_load_si512(t + 128), index, _mm512_load_si512(t + 192));
    byte[b] = _mm512_mask_mov_epi8(low, upper, high);
  }
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
