// The 8-bit codes of optimizer states, one block of 256 at a time.
#pragma once

#include "quantize.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kStateBlock = kNestedBlock;
constexpr uint8_t kSignedZero = 127;  // code of 0 in the signed map; 0 in the unsigned one

#if NF4_ISA >= NF4_ISA_AVX512

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

// Ranks by arithmetic. Decade e of a map holds n codes, 2^e in the signed and twice that in the
// unsigned map. Its thresholds lie evenly, spacing = 0.9 * 10^(e-6) / n apart, so that the rank of
// x, counted from that of zero, is round(x / spacing + 4/9 * 2n - 1/2), or one less in the unsigned
// map. It is at most the decade's last, for the gap to the next decade is wider. A value within
// rounding error of a threshold is searched instead.
constexpr int kBinades = 32;
constexpr int kDecades = 7;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

struct Decades {
  // By binade [2^(b - 31), 2^(b - 30)): bits of the float 2n of the decade that it begins in, and
  // of the threshold at which the next one begins; none begins where that is infinite.
  uint32_t size[kBinades] = {};
  uint32_t crossing[kBinades] = {};
  // By the low 4 bits of the exponent of 2n: 1 / spacing.
  float slope[16] = {};
};

// From the thresholds of the values >= 0, and the number of codes in the lowest decade. What lies
// below that counts as a decade of half its size, and the code of 1.0 as one of twice the last
// size.
constexpr Decades make_decades(const float* thresholds, uint32_t smallest) {
  Decades d;
  float start[kDecades + 2] = {};
  uint32_t rank = 0;
  double spacing = 0.9e-6 / smallest;
  for (int e = 0; e < kDecades; ++e) {
    start[e + 1] = thresholds[rank];
    rank += smallest << e;
    const uint32_t exponent = (bits_of(static_cast<float>(2 * smallest << e)) >> 23) & 15;
    d.slope[exponent] = static_cast<float>(1.0 / spacing);
    spacing *= 5.0;
  }
  start[kDecades + 1] = thresholds[rank];
  // So that 1.0 gets the rank after the last decade's: its threshold is not on their line.
  const uint32_t top = 2 * smallest << kDecades;
  d.slope[(bits_of(static_cast<float>(top)) >> 23) & 15] =
      static_cast<float>(top / 2 - 4.0 / 9.0 * top + 0.5);
  const uint32_t scale = smallest == 1 ? 2 : 1;
  double low = 1.0 / (int64_t{1} << 31);
  for (int b = 0; b < kBinades; ++b, low *= 2.0) {
    uint32_t size = smallest;
    d.crossing[b] = scale * 0x7f800000u;
    for (int e = 1; e <= kDecades + 1; ++e) {
      if (double{start[e]} < low) size = smallest << e;
      if (double{start[e]} >= low && double{start[e]} < 2.0 * low)
        d.crossing[b] = scale * bits_of(start[e]);
    }
    d.size[b] = bits_of(static_cast<float>(size));
  }
  return d;
}

constexpr float kThresholds[255] = NF4_DYNAMIC8_THRESHOLDS;
constexpr float kUnsignedThresholds[255] = NF4_DYNAMIC8_UNSIGNED_THRESHOLDS;
alignas(64) constexpr Decades kSignedDecades = make_decades(kThresholds + kSignedZero, 1);
alignas(64) constexpr Decades kUnsignedDecades = make_decades(kUnsignedThresholds, 2);

template <bool kSigned>
struct Ranker {
  static constexpr const Decades& kTables = kSigned ? kSignedDecades : kUnsignedDecades;
  const I size_lo = _mm512_load_si512(kTables.size);
  const I size_hi = _mm512_load_si512(kTables.size + 16);
  const I crossing_lo = _mm512_load_si512(kTables.crossing);
  const I crossing_hi = _mm512_load_si512(kTables.crossing + 16);
  const F slope = _mm512_load_ps(kTables.slope);

  // The float 2n of the decade of x.
  I size(F x) const {
    const I bits = _mm512_castps_si512(x);
    I binade;
    __mmask16 above;
    if (kSigned) {
      // Twice the bits of |x|, and one more for a negative x: of two codes at equal distance the
      // lower is taken, which for a negative x is the one of larger magnitude.
      const I key = _mm512_rol_epi32(bits, 1);
      binade = _mm512_max_epi32(_mm512_srli_epi32(key, 24), splat(96));
      const I crossing = _mm512_permutex2var_epi32(crossing_lo, binade, crossing_hi);
      above = _mm512_cmpgt_epu32_mask(key, crossing);
    } else {
      binade = _mm512_srli_epi32(bits, 23);
      const I crossing = _mm512_permutex2var_epi32(crossing_lo, binade, crossing_hi);
      above = _mm512_cmpgt_epi32_mask(bits, crossing);
    }
    const I base = _mm512_permutex2var_epi32(size_lo, binade, size_hi);
    return _mm512_mask_add_epi32(base, above, base, splat(1 << 23));  // twice as large
  }

  // The rank before rounding, negated for positive x in the signed map.
  F line(F x, I size) const {
    const I bits = _mm512_castps_si512(x);
    const F most = sub(_mm512_castsi512_ps(size), broadcast(1.0f));
    const F start = fma(broadcast(4.0f / 9.0f), _mm512_castsi512_ps(size), broadcast(-0.5f));
    const F factor = _mm512_permutexvar_ps(_mm512_srli_epi32(size, 23), slope);
    if (!kSigned) return _mm512_min_ps(fma(factor, x, start), most);
    constexpr int kFlipByInverse = 0xd2;  // a ^ (~b & c)
    const F flipped = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        _mm512_castps_si512(start), bits, splat(static_cast<int>(0x80000000)), kFlipByInverse));
    constexpr int kSmallerMagnitude = 2;  // with the sign of the first
    return _mm512_range_ps(_mm512_fnmadd_ps(factor, x, flipped), most, kSmallerMagnitude);
  }
};

// The arithmetic is right this far from the middle between two thresholds, in ranks: tried for
// every float from -1 to 1, for which even 2^-16 in place of 2^-14 does.
constexpr float kSure = 0.5f - 0x1p-14f;

// Sets codes that may be one off right.
template <bool kSigned>
__attribute__((noinline)) void settle(const float* x, float scale, uint8_t* codes) {
  const float* thresholds = kSigned ? kThresholds : kUnsignedThresholds;
  for (int i = 0; i < 64; ++i) {
    const float v = x[i] * scale;
    int code = codes[i];
    code += code < 255 && v > thresholds[code];
    code -= code > 0 && !(v > thresholds[code - 1]);
    codes[i] = static_cast<uint8_t>(!kSigned && code == 0 && x[i] > 0.0f ? 1 : code);
  }
}

// Codes of x * scale for a block, and 1 in place of 0 for x > 0 in the unsigned map.
template <bool kSigned>
void encode_block(const float* x, float scale, uint8_t* codes) {
  const Ranker<kSigned> ranker;
  const F by = broadcast(scale);
  // The order of dwords that packing within 128-bit lanes leaves behind.
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  alignas(64) int32_t sizes[kStateBlock];
  for (int64_t i = 0; i < kStateBlock; i += 16) {
    F scaled = mul(load(x + i), by);
    if (!kSigned) scaled = _mm512_max_ps(scaled, broadcast(kDynamic8UnsignedCodes[1]));
    _mm512_store_si512(sizes + i, ranker.size(scaled));
  }
  for (int64_t i = 0; i < kStateBlock; i += 64) {
    F off = zero();
    I rank[4];
    for (int j = 0; j < 4; ++j) {
      const F value = load(x + i + 16 * j);
      F scaled = mul(value, by);
      if (!kSigned) scaled = _mm512_max_ps(scaled, broadcast(kDynamic8UnsignedCodes[1]));
      const F line = ranker.line(scaled, _mm512_load_si512(sizes + i + 16 * j));
      constexpr int kLargerMagnitude = 3;
      off = _mm512_range_ps(off, _mm512_reduce_ps(line, kNearest), kLargerMagnitude);
      const I raw = _mm512_castps_si512(value);
      rank[j] = kSigned ? _mm512_cvtps_epi32(line)
                        : _mm512_maskz_cvtps_epi32(_mm512_test_epi32_mask(raw, raw), line);
    }
    I low = _mm512_packs_epi32(rank[0], rank[1]);
    I high = _mm512_packs_epi32(rank[2], rank[3]);
    I all;
    if (kSigned) {
      // -1.0 is the rank 128 too many: it saturates.
      all = _mm512_sub_epi8(_mm512_set1_epi8(kSignedZero), _mm512_packs_epi16(low, high));
    } else {
      const I one = _mm512_set1_epi16(1);
      all = _mm512_packus_epi16(_mm512_sub_epi16(low, one), _mm512_sub_epi16(high, one));
    }
    _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(order, all));
    if (_mm512_cmp_ps_mask(_mm512_abs_ps(off), broadcast(kSure), _CMP_GT_OQ)) {
      settle<kSigned>(x + i, scale, codes + i);
    }
  }
}

#else

template <bool kSigned>
void encode_block(const float* x, float scale, uint8_t* codes) {
  const Format format = format_of(kSigned ? NF4_FORMAT_DYNAMIC8 : NF4_FORMAT_DYNAMIC8_UNSIGNED);
  rank_elements(x, kStateBlock, scale, false, format, codes);
  if (kSigned) return;
  // A positive second moment never becomes zero.
  for (int64_t i = 0; i < kStateBlock; ++i) codes[i] |= codes[i] == 0 && x[i] > 0.0f;
}

#endif

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

// Values of a block's codes, times scale: four byte look-ups for 64 codes instead of four gathers.
template <bool kSigned>
void decode_block(const uint8_t* codes, float scale, float* out) {
  const BytePlanes& p = kSigned ? kSignedPlanes : kUnsignedPlanes;
  const F by = broadcast(scale);
  // Unpacking works within 128-bit lanes: a 4 x 4 transposition of dwords beforehand puts the
  // results in order.
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < kStateBlock; i += 64) {
    const I index = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + i));
    const __mmask64 upper = _mm512_movepi8_mask(index);
    I byte[4];
    for (int b = 0; b < 4; ++b) {
      const uint8_t* t = p.plane[b];
      const I low =
          _mm512_permutex2var_epi8(_mm512_load_si512(t), index, _mm512_load_si512(t + 64));
      const I high =
          _mm512_permutex2var_epi8(_mm512_load_si512(t + 128), index, _mm512_load_si512(t + 192));
      byte[b] = _mm512_mask_mov_epi8(low, upper, high);
    }
    const I word[4] = {
        _mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1]),
        _mm512_unpacklo_epi8(byte[2], byte[3]), _mm512_unpackhi_epi8(byte[2], byte[3])};
    const I dword[4] = {
        _mm512_unpacklo_epi16(word[0], word[2]), _mm512_unpackhi_epi16(word[0], word[2]),
        _mm512_unpacklo_epi16(word[1], word[3]), _mm512_unpackhi_epi16(word[1], word[3])};
    for (int j = 0; j < 4; ++j) store(out + i + 16 * j, mul(_mm512_castsi512_ps(dword[j]), by));
  }
}

#else

template <bool kSigned>
void decode_block(const uint8_t* codes, float scale, float* out) {
  const float* table = kSigned ? kDynamic8Codes : kDynamic8UnsignedCodes;
  const F by = broadcast(scale);
  for (int64_t i = 0; i < kStateBlock; i += kWidth) {
    store(out + i, mul(gather(table, load_bytes(codes + i)), by));
  }
}

#endif

}  // namespace
}  // namespace nf4::cpu
