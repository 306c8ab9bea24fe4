// The 8-bit codes of optimizer states, one block of 256 at a time.
#pragma once

#include "byte_planes.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kStateBlock = kNestedBlock;
constexpr uint8_t kSignedZero = 127;  // code of 0 in the signed map; 0 in the unsigned one

// Ranks by arithmetic. Decade e of a map holds n codes, 2^e in the signed and twice that in the
// unsigned map. Its thresholds lie evenly, spacing = 0.9 * 10^(e-6) / n apart, so that the rank of
// x, counted from that of zero, is round(x / spacing + 4/9 * 2n - 1/2), or one less in the unsigned
// map. It is at most the decade's last, for the gap to the next decade is wider. A value within
// rounding error of a threshold is searched instead. The values from the last threshold to 1.0
// count as a decade, and those below the first.
constexpr int kDecades = 8;

struct Decades {
  float start[kDecades] = {};         // threshold below each
  int32_t start_bits[kDecades] = {};  // of start
  float slope[kDecades] = {};         // 1 / spacing
};

// From the thresholds of the values >= 0, and the number of codes in the lowest decade.
constexpr Decades make_decades(const float* thresholds, uint32_t smallest) {
  Decades d;
  uint32_t rank = 0;
  double spacing = 0.9e-6 / smallest;
  for (int e = 0; e < kDecades; ++e) {
    d.start[e] = thresholds[rank];
    d.start_bits[e] = static_cast<int32_t>(bits_of(d.start[e]));
    d.slope[e] = static_cast<float>(1.0 / spacing);
    rank += smallest << e;
    spacing *= 5.0;
  }
  // The threshold of 1.0 is off its line: this slope gives 1.0 the rank after all others.
  const uint32_t top = smallest << kDecades;
  d.slope[kDecades - 1] = static_cast<float>(top / 2 - 4.0 / 9.0 * top + 0.5);
  return d;
}

constexpr float kThresholds[255] = NF4_DYNAMIC8_THRESHOLDS;
constexpr float kUnsignedThresholds[255] = NF4_DYNAMIC8_UNSIGNED_THRESHOLDS;
alignas(64) constexpr Decades kSignedDecades = make_decades(kThresholds + kSignedZero, 1);
alignas(64) constexpr Decades kUnsignedDecades = make_decades(kUnsignedThresholds, 2);

// Sets codes that may be one off right: of 64, those in the lanes of an index mod kLanes.
template <bool kSigned, int kLanes>
__attribute__((noinline)) void settle(const float* x, float scale, uint32_t lanes, uint8_t* codes) {
  const float* thresholds = kSigned ? kThresholds : kUnsignedThresholds;
  for (int i = 0; i < 64; ++i) {
    if ((lanes >> (i % kLanes) & 1) == 0) continue;
    const float v = x[i] * scale;
    int code = codes[i];
    code += code < 255 && v > thresholds[code];
    code -= code > 0 && !(v > thresholds[code - 1]);
    codes[i] = static_cast<uint8_t>(!kSigned && code == 0 && x[i] > 0.0f ? 1 : code);
  }
}

#if NF4_ISA >= NF4_ISA_AVX512

constexpr int kBinades = 32;
// Ranks are counted in this share of one: their whole part is then the upper word of an integer,
// and how far they are above a boundary the lower.
constexpr float kUnit = 65536.0f;
// The arithmetic is right this far from a boundary, in units: tried for every float from -1 to 1.
// Ranks are raised by as much, so that what is unsure lies just above a boundary.
constexpr int kUnsureUnits = 2;
constexpr int kSureBits = 0xffff & ~(2 * kUnsureUnits - 1);

// The decades by binade [2^(b - 31), 2^(b - 30)), each of which holds at most one start. Decade 0
// holds what is below the first start.
struct Binades {
  uint32_t decade[kBinades] = {};    // that it begins in
  uint32_t crossing[kBinades] = {};  // bits of the start within it, or of infinity
  float slope[16] = {};              // of each decade's line
  float start[16] = {};
  float most[16] = {};
};

constexpr Binades make_binades(const Decades& d, uint32_t smallest, bool is_signed) {
  // Signed: twice the bits, see decade(); and boundaries are halfway between two ranks, for the
  // half is added behind the sign. Unsigned: of ranks from 0.
  const uint32_t key_scale = is_signed ? 2 : 1;
  const double raise = is_signed ? 0.0 : -0.5 + double{kUnsureUnits} / double{kUnit};
  Binades t;
  double low = 1.0 / (int64_t{1} << 31);
  for (int b = 0; b < kBinades; ++b, low *= 2.0) {
    t.crossing[b] = key_scale * 0x7f800000u;
    for (uint32_t e = 0; e < kDecades; ++e) {
      const double start = double{d.start[e]};
      if (start < low) t.decade[b] = e + 1;
      if (start >= low && start < 2.0 * low) t.crossing[b] = key_scale * bits_of(d.start[e]);
    }
  }
  for (int e = 0; e <= kDecades; ++e) {
    const double size = smallest << e;  // 2n
    t.slope[e] = e == 0 ? 0.0f : d.slope[e - 1] * kUnit;
    t.start[e] = static_cast<float>((size * 4.0 / 9.0 - 0.5 + raise) * double{kUnit});
    t.most[e] = static_cast<float>((size - 1.0 + raise) * double{kUnit});
  }
  return t;
}

alignas(64) constexpr Binades kSignedBinades = make_binades(kSignedDecades, 1, true);
alignas(64) constexpr Binades kUnsignedBinades = make_binades(kUnsignedDecades, 2, false);

template <bool kSigned>
struct Ranker {
  static constexpr const Binades& kTables = kSigned ? kSignedBinades : kUnsignedBinades;
  const I decade_lo = _mm512_load_si512(kTables.decade);
  const I decade_hi = _mm512_load_si512(kTables.decade + 16);
  const I crossing_lo = _mm512_load_si512(kTables.crossing);
  const I crossing_hi = _mm512_load_si512(kTables.crossing + 16);
  const F slope = _mm512_load_ps(kTables.slope);
  const F start = _mm512_load_ps(kTables.start);
  const F most = _mm512_load_ps(kTables.most);

  I decade(F x) const {
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
    const I begins = _mm512_permutex2var_epi32(decade_lo, binade, decade_hi);
    return _mm512_mask_add_epi32(begins, above, begins, splat(1));
  }

  // The rank of x, in units; of -x in the signed map.
  I operator()(F x) const {
    const I index = decade(x);
    const F factor = _mm512_permutexvar_ps(index, slope);
    const F begin = _mm512_permutexvar_ps(index, start);
    const F end = _mm512_permutexvar_ps(index, most);
    if (!kSigned) return _mm512_cvtps_epi32(_mm512_min_ps(fma(factor, x, begin), end));
    constexpr int kFlipByInverse = 0xd2;  // a ^ (~b & c)
    const F flipped = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(begin), _mm512_castps_si512(x),
                                  splat(static_cast<int>(0x80000000)), kFlipByInverse));
    constexpr int kSmallerMagnitude = 2;  // with the sign of the first
    const F line = _mm512_range_ps(_mm512_fnmadd_ps(factor, x, flipped), end, kSmallerMagnitude);
    return _mm512_add_epi32(_mm512_cvtps_epi32(line),
                            splat(static_cast<int>(kUnit) / 2 + kUnsureUnits));
  }
};

// Which words of two vectors are the upper halves of their dwords.
struct WordOrder {
  int16_t high[32] = {};
};
constexpr WordOrder make_word_order() {
  WordOrder o;
  for (int16_t i = 0; i < 32; ++i) o.high[i] = static_cast<int16_t>(2 * i + 1);
  return o;
}
alignas(64) constexpr WordOrder kWords = make_word_order();

// Codes of x * scale for a block, and 1 in place of 0 for x > 0 in the unsigned map. Calls
// meanwhile(i) for every vector i, i + 1, .. of the block, for work that may go on beside this.
template <bool kSigned, class Meanwhile>
inline void encode_block(const float* x, float scale, uint8_t* codes, const Meanwhile& meanwhile) {
  const F by = broadcast(scale);
  const Ranker<kSigned> ranker;
  const I high = _mm512_load_si512(kWords.high);
  for (int64_t i = 0; i < kStateBlock; i += 64) {
    I rank[4];
    __mmask16 sure = 0xffff;
    for (int j = 0; j < 4; ++j) {
      const F value = load(x + i + 16 * j);
      F v = mul(value, by);
      if (!kSigned) {
        const I raw = _mm512_castps_si512(value);
        v = _mm512_mask_max_ps(v, _mm512_test_epi32_mask(raw, raw), v,
                               broadcast(kDynamic8UnsignedCodes[1]));
      }
      rank[j] = ranker(v);
      sure = _mm512_mask_test_epi32_mask(sure, rank[j], splat(kSureBits));
      meanwhile(i + 16 * j);
    }
    const I first = _mm512_permutex2var_epi16(rank[0], high, rank[1]);
    const I second = _mm512_permutex2var_epi16(rank[2], high, rank[3]);
    I all;
    if (kSigned) {
      // -1.0 is the rank 128 too many: it saturates.
      all = _mm512_sub_epi8(_mm512_set1_epi8(kSignedZero), _mm512_packs_epi16(first, second));
    } else {
      all = _mm512_packus_epi16(first, second);
    }
    // Packing works within 128-bit lanes.
    const I order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi64(order, all));
    if (sure != 0xffff) settle<kSigned, 16>(x + i, scale, ~sure, codes + i);
  }
}

#else

// The arithmetic is right this far from the middle between two thresholds, in ranks: tried for
// every float from -1 to 1, for which even 2^-16 in place of 2^-14 does.
constexpr float kUnsure = 0x1p-14f;

typedef int32_t Lanes __attribute__((vector_size(sizeof(F))));

inline Lanes lanes(F v) { return reinterpret_cast<Lanes>(v); }

inline F slopes(const Decades& d, Lanes decade) {
#if NF4_ISA == NF4_ISA_AVX2
  return _mm256_permutevar8x32_ps(_mm256_load_ps(d.slope), reinterpret_cast<I>(decade));
#else
  return gather(d.slope, reinterpret_cast<I>(decade & (kDecades - 1)));
#endif
}

// Codes of x * scale for a block, and 1 in place of 0 for x > 0 in the unsigned map. Calls
// meanwhile(i) for every vector i, i + 1, .. of the block, for work that may go on beside this.
template <bool kSigned, class Meanwhile>
void encode_block(const float* x, float scale, uint8_t* codes, const Meanwhile& meanwhile) {
  const Decades& d = kSigned ? kSignedDecades : kUnsignedDecades;
  const F by = broadcast(scale);
  constexpr auto sure = static_cast<int32_t>(bits_of(0.5f - kUnsure));
  const F round = broadcast(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  for (int64_t i = 0; i < kStateBlock; i += 64) {
    Lanes unsure = {};
    for (int64_t j = i; j < i + 64; j += kWidth) {
      const F value = load(x + j);
      Lanes bits = lanes(mul(value, by));
      const Lanes sign = bits >> 31;
      bits &= 0x7fffffff;
      if (!kSigned) {
        constexpr auto least = static_cast<int32_t>(bits_of(kDynamic8UnsignedCodes[1]));
        bits = bits > least ? bits : Lanes{} + least;
      }
      // Of two codes at equal distance the lower is taken: for a negative x the one of larger
      // magnitude, as if it were one ulp up.
      const Lanes key = bits - sign;
      Lanes decade = Lanes{} - 1;
      for (int32_t start : d.start_bits) decade -= key > start;
      const F size = reinterpret_cast<F>((decade + (kSigned ? 128 : 129)) << 23);  // 2n
      const F start = fma(broadcast(4.0f / 9.0f), size, broadcast(-0.5f));
      F line = fma(slopes(d, decade), reinterpret_cast<F>(bits), start);
      const F most = sub(size, broadcast(1.0f));
      line = line < most ? line : most;
      const F rounded = add(line, round);
      const F off = sub(line, sub(rounded, round));
      unsure |= (lanes(off) & 0x7fffffff) > sure;
      const Lanes rank = lanes(rounded) - lanes(round);
      Lanes code;
      if (kSigned) {
        code = kSignedZero + ((rank ^ sign) - sign);
        code = code > 0 ? code : Lanes{};  // -1.0 is one too many
      } else {
        code = (rank - 1) & (lanes(value) != 0);
      }
      store_bytes(codes + j, reinterpret_cast<I>(code));
      meanwhile(j);
    }
    int any = 0;
    for (int lane = 0; lane < kWidth; ++lane) any |= unsure[lane];
    if (any) settle<kSigned, 1>(x + i, scale, 1, codes + i);
  }
}

#endif

#if NF4_ISA >= NF4_ISA_AVX512_BF16

// The moments of a block by their codes: four byte look-ups for 64 codes instead of four gathers.
struct CodedMoments {
  static constexpr int kVectors = 4;
  const uint8_t *codes1, *codes2;
  float absmax1, absmax2;
  void read(int64_t i, F (&m)[4], F (&v)[4]) const {
    look_up(kSignedPlanes, codes1 + i, m);
    look_up(kUnsignedPlanes, codes2 + i, v);
    for (int j = 0; j < 4; ++j) {
      m[j] = mul(m[j], broadcast(absmax1));
      v[j] = mul(v[j], broadcast(absmax2));
    }
  }
};

#else

template <bool kSigned>
void decode_block(const uint8_t* codes, float scale, float* out) {
  const float* table = kSigned ? kDynamic8Codes : kDynamic8UnsignedCodes;
  const F by = broadcast(scale);
#if NF4_ISA >= NF4_ISA_AVX512
  for (int64_t i = 0; i < kStateBlock; i += kWidth) {
    store(out + i, mul(lookup256(table, load_bytes(codes + i)), by));
  }
#else
  // One load for each element: half the time of a gather (AVX2, Zen 5).
  for (int64_t i = 0; i < kStateBlock; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, codes + i, 8);
    for (int j = 0; j < 8; ++j) out[i + j] = table[eight >> (8 * j) & 255];
  }
  for (int64_t i = 0; i < kStateBlock; i += kWidth) store(out + i, mul(load(out + i), by));
#endif
}

#endif

}  // namespace
}  // namespace nf4::cpu
