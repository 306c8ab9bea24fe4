// The 8-bit codes of optimizer states, one block of 256 at a time.
#pragma once

#include "optimizer_segments.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kStateBlock = kNestedBlock;

// Sets those of 64 codes right that are in lanes and may be one off.
template <bool kSigned>
__attribute__((noinline)) void settle(const float* x, float scale, uint64_t lanes, uint8_t* codes) {
  const float* thresholds = kSigned ? kThresholds : kUnsignedThresholds;
#if NF4_ISA >= NF4_ISA_AVX512
  const bool zeros = !kSigned && __builtin_popcountll(lanes) > 8;  // whose codes are right
  for (int j = 0; zeros && j < 64; j += 16) {
    const I v = _mm512_castps_si512(load(x + j));
    lanes &= ~(uint64_t{_mm512_testn_epi32_mask(v, v)} << j);
  }
#endif
  for (; lanes; lanes &= lanes - 1) {
    const int i = __builtin_ctzll(lanes);
    const float v = x[i] * scale;
    int code = codes[i];
    code += code < 255 && v > thresholds[code];
    code -= code > 0 && !(v > thresholds[code - 1]);
    codes[i] = static_cast<uint8_t>(!kSigned && code == 0 && x[i] > 0.0f ? 1 : code);
  }
}

#if NF4_ISA >= NF4_ISA_AVX512

// Which words of two vectors are the lower and the upper halves of their dwords, and which bytes
// those of their words.
struct WordOrder {
  int16_t low[32] = {};
  int16_t high[32] = {};
  uint8_t bytes[64] = {};
};
constexpr WordOrder make_word_order() {
  WordOrder o;
  for (int16_t i = 0; i < 32; ++i) {
    o.low[i] = static_cast<int16_t>(2 * i);
    o.high[i] = static_cast<int16_t>(2 * i + 1);
  }
  for (uint8_t i = 0; i < 64; ++i) o.bytes[i] = static_cast<uint8_t>(2 * i);
  return o;
}
alignas(64) constexpr WordOrder kWords = make_word_order();

// v, of which the compiler does not know that it is constant, lest it broadcast it anew each time.
inline I held(I v) {
  asm("" : "+v"(v));
  return v;
}

// Codes of x * scale for a block, and 1 in place of 0 for x > 0 in the unsigned map. Calls
// meanwhile(i) for every vector i, i + 1, .. of the block, for work that may go on beside this.
template <bool kSigned, class Meanwhile>
inline void encode_block(const float* x, float scale, uint8_t* codes, const Meanwhile& meanwhile) {
  constexpr int kFraction = kSigned ? kSignedFraction : kUnsignedFraction;
  constexpr const Segments& t = kSigned ? kSignedSegments : kUnsignedSegments;
  // Exponents from 0 on: what is in the lowest binade or below becomes subnormal or zero.
  F by = broadcast(scale * kRebias);
  const float* scaled = x;
  alignas(64) float buffer[kStateBlock];
  if (scale < 0x1p-30f) {  // the product would be subnormal
    by = broadcast(scale);
    for (int64_t i = 0; i < kStateBlock; ++i) buffer[i] = x[i] * kRebias;
    scaled = buffer;
  }
  const I low = _mm512_load_si512(kWords.low), high = _mm512_load_si512(kWords.high);
  const I crossing = _mm512_loadu_si512(t.crossing);
  const I slope0 = _mm512_loadu_si512(t.slope), slope1 = _mm512_loadu_si512(t.slope + 32);
  const I start0 = _mm512_loadu_si512(t.start), start1 = _mm512_loadu_si512(t.start + 32);
  const I sign = held(_mm512_set1_epi16(0x100)), upper = held(_mm512_set1_epi16(kBinades));
  const I part = held(_mm512_set1_epi16((1 << kFraction) - 1));
  const I mirror = held(_mm512_set1_epi8(static_cast<char>(2 * kSignedZero)));
#if NF4_ISA >= NF4_ISA_AVX512_BF16
  const I even = _mm512_load_si512(kWords.bytes);
  const I most = _mm512_loadu_si512(t.most), base = _mm512_loadu_si512(t.base);
#else
  const I most0 = _mm512_loadu_si512(t.most), most1 = _mm512_loadu_si512(t.most + 32);
  const I base0 = _mm512_loadu_si512(t.base), base1 = _mm512_loadu_si512(t.base + 32);
#endif
  // Each operation for the whole block in turn: what the CPU has in its window is then independent
  // for longer than an operation takes. 5 % of the step against 64 elements in turn (Zen 4).
  constexpr int kVectors = kStateBlock / 32;
  I mantissa[kVectors], exponent[kVectors], found[kVectors], rank[kVectors];
  __mmask32 unsure[kVectors], negative[kVectors], above[kVectors];
  const auto each = [&](const auto& operation) {
    for (int j = 0; j < kVectors; ++j) operation(j);
  };
  int64_t done = 0;
  const auto pause = [&] {
    for (int j = 0; j < 2; ++j, done += 16) meanwhile(done);
  };
  I bits[2 * kVectors];
  for (int j = 0; j < 2 * kVectors; ++j) {
    bits[j] = _mm512_srli_epi32(_mm512_castps_si512(mul(load(scaled + 16 * j), by)), 7);
  }
  each([&](int j) {
    exponent[j] = _mm512_permutex2var_epi16(bits[2 * j], high, bits[2 * j + 1]);
    mantissa[j] = _mm512_permutex2var_epi16(bits[2 * j], low, bits[2 * j + 1]);
  });
  pause();
  each([&](int j) { found[j] = _mm512_permutexvar_epi16(exponent[j], crossing); });
  pause();
  each([&](int j) { above[j] = _mm512_cmpgt_epu16_mask(mantissa[j], found[j]); });
  pause();
  if (kSigned) each([&](int j) { negative[j] = _mm512_test_epi16_mask(exponent[j], sign); });
  each([&](int j) {
    exponent[j] = _mm512_mask_add_epi16(exponent[j], above[j], exponent[j], upper);
  });
  pause();
  each([&](int j) { found[j] = _mm512_permutex2var_epi16(slope0, exponent[j], slope1); });
  pause();
  each([&](int j) { rank[j] = _mm512_mulhi_epu16(mantissa[j], found[j]); });
  pause();
  each([&](int j) { found[j] = _mm512_permutex2var_epi16(start0, exponent[j], start1); });
  pause();
  each([&](int j) { rank[j] = _mm512_add_epi16(rank[j], found[j]); });
  each([&](int j) { unsure[j] = _mm512_testn_epi16_mask(rank[j], part); });
  each([&](int j) { rank[j] = _mm512_srli_epi16(rank[j], kFraction); });
  pause();
  for (int j = 0; j < kVectors; j += 2) {
#if NF4_ISA >= NF4_ISA_AVX512_BF16
    const I segment = _mm512_permutex2var_epi8(exponent[j], even, exponent[j + 1]);
    I code = _mm512_permutex2var_epi8(rank[j], even, rank[j + 1]);
    code = _mm512_min_epu8(code, _mm512_permutexvar_epi8(segment, most));
    code = _mm512_add_epi8(code, _mm512_permutexvar_epi8(segment, base));
#else
    for (int k = j; k < j + 2; ++k) {
      const I last = _mm512_permutex2var_epi16(most0, exponent[k], most1);
      const I zero = _mm512_permutex2var_epi16(base0, exponent[k], base1);
      rank[k] = _mm512_add_epi16(_mm512_min_epu16(rank[k], last), zero);
    }
    // Packing works within 128-bit lanes.
    const I order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    I code = _mm512_permutexvar_epi64(order, _mm512_packus_epi16(rank[j], rank[j + 1]));
#endif
    if (kSigned) {
      // The code of -1.0 would be -1: it saturates.
      const __mmask64 mirrored = _mm512_kunpackd(negative[j + 1], negative[j]);
      code = _mm512_mask_subs_epu8(code, mirrored, mirror, code);
    }
    _mm512_storeu_si512(codes + 32 * j, code);
  }
  for (int j = 0; j < kVectors; j += 2) {
    if (unsure[j] | unsure[j + 1]) {
      const uint64_t lanes = uint64_t{unsure[j + 1]} << 32 | unsure[j];
      settle<kSigned>(x + 32 * j, scale, lanes, codes + 32 * j);
    }
  }
}

#else

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

alignas(64) constexpr Decades kSignedDecades = make_decades(kThresholds + kSignedZero, 1);
alignas(64) constexpr Decades kUnsignedDecades = make_decades(kUnsignedThresholds, 2);

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
    if (any) settle<kSigned>(x + i, scale, ~uint64_t{0}, codes + i);
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
