// The thresholds of the 8-bit maps as lines in the upper bits of the mantissa.
#pragma once

#include "byte_planes.h"

namespace nf4::cpu {
namespace {

constexpr float kThresholds[255] = NF4_DYNAMIC8_THRESHOLDS;
constexpr float kUnsignedThresholds[255] = NF4_DYNAMIC8_UNSIGNED_THRESHOLDS;

#if NF4_ISA >= NF4_ISA_AVX512

// Codes by arithmetic in 16 bits, 32 elements at a time. The thresholds within a binade lie evenly
// but for one, at which it is split: at the start of a decade, where the spacing changes, and at
// the first and the last of all. In each of these segments
//   mantissa * slope / 2^16 + start, in units of 2^-fraction ranks,
// with the mantissa's upper 16 bits, is exactly the whole number t at the t-th threshold.
// make_segments tries this for every threshold. As the line never falls, a code can be wrong only
// where it is a whole number, and then by one.
constexpr int kBinades = 32;
constexpr int kLowestBinade = 96;    // its exponent; it holds all that is below, too
constexpr float kRebias = 0x1p-96f;  // makes it 0

#if NF4_ISA >= NF4_ISA_AVX512_BF16
using SegmentCode = uint8_t;  // looked up for 64 elements at once, which takes VBMI
#else
using SegmentCode = uint16_t;
#endif

struct Segments {
  uint16_t crossing[kBinades] = {};  // upper bits of the last mantissa before the split
  // First below the splits, then above.
  uint16_t slope[2 * kBinades] = {};
  uint16_t start[2 * kBinades] = {};
  SegmentCode most[2 * kBinades] = {};  // the last rank
  SegmentCode base[2 * kBinades] = {};  // code of rank 0
  int fraction = 0;
  bool right = true;
};

constexpr uint32_t upper_mantissa(float x) { return bits_of(x) >> 7 & 0xffff; }

// Fits a segment of count thresholds from x on that begins at mantissa low. The code below the
// first of them has rank 1, lest a rank be negative. The last is counted twice if it starts a
// decade, for the gap before it is twice as wide.
constexpr void fit(const float* x, int count, bool starts_decade, uint32_t low, int segment,
                   Segments* s) {
  const int32_t one = 1 << s->fraction;
  int64_t slope = 0, best = 0, best_off = 1 << 30, start = one + one / 2;
  if (count == 1) slope = one - 1;
  if (count > 1) {
    const int64_t ranks = count - 1 + starts_decade;
    const int64_t width = upper_mantissa(x[count - 1]) - upper_mantissa(x[0]);
    slope = (ranks * one * 65536 + width / 2) / width;
  }
  for (int64_t tried = slope - 9; count && tried <= slope + 9; ++tried) {
    int64_t least = 1 << 30, largest = -(1 << 30);
    for (int i = 0; i < count; ++i) {
      const int64_t t = i + 2 + (starts_decade && i == count - 1);
      const int64_t above = (upper_mantissa(x[i]) * tried >> 16) - t * one;
      if (above < least) least = above;
      if (above > largest) largest = above;
    }
    if (tried <= 0xffff && largest - least < best_off) {
      best_off = largest - least;
      best = tried;
      start = -least;
    }
  }
  s->slope[segment] = static_cast<uint16_t>(best);
  s->start[segment] = static_cast<uint16_t>(start);
  s->most[segment] = static_cast<SegmentCode>(count + !starts_decade);
  const int64_t first = (low * best >> 16) + start;
  if (count && best_off != 0) s->right = false;
  if (first < one || (first > 2 * one && s->most[segment] > 1)) s->right = false;
}

// From the count thresholds above zero, the code of zero and the number of codes in the lowest
// decade.
constexpr Segments make_segments(const float* thresholds, int count, int zero, int smallest,
                                 int fraction) {
  Segments s;
  s.fraction = fraction;
  int next = 0;
  for (int b = 0; b < kBinades; ++b) {
    const int first = next;
    const uint32_t exponent = static_cast<uint32_t>(kLowestBinade + b);
    while (next < count && bits_of(thresholds[next]) >> 23 == exponent) ++next;
    int split = next;
    bool edge = false;  // the threshold at which it is split is on the line above
    for (int i = first; i < next; ++i) {
      const bool outer = i == 0 || i == count - 1;
      bool starts = outer;
      for (int start = smallest; start < count; start = 2 * start + smallest) starts |= i == start;
      if (starts) split = i;
      if (starts) edge = outer;
    }
    if (split == next && next - first > 1) {  // one line for all would be off here and there
      split = (first + next) / 2;
      edge = true;
    }
    const bool none = split == next;
    const uint32_t crossing = none ? 0xffff : upper_mantissa(thresholds[split]) - edge;
    const int below = split + (!none && !edge);
    const int above = none || edge ? split : split + 1;
    s.crossing[b] = static_cast<uint16_t>(crossing);
    fit(thresholds + first, below - first, below > split, 0, b, &s);
    fit(thresholds + above, next - above, false, crossing + 1, b + kBinades, &s);
    s.base[b] = static_cast<SegmentCode>(zero + first - 1);
    s.base[b + kBinades] = static_cast<SegmentCode>(zero + above - 1);
    // Zero and what is nearly zero differ in the unsigned map: unsure.
    if (zero == 0 && first == 0 && below == 0) s.start[b] = static_cast<uint16_t>(1 << fraction);
  }
  if (next != count) s.right = false;
  return s;
}

// The binade below 1.0 has 36 or 72 ranks, of which 16 bits leave so many:
constexpr int kSignedFraction = 10, kUnsignedFraction = 9;
alignas(64) constexpr Segments kSignedSegments = make_segments(kThresholds + kSignedZero,
                                                               255 - kSignedZero, kSignedZero, 1,
                                                               kSignedFraction);
alignas(64) constexpr Segments kUnsignedSegments = make_segments(kUnsignedThresholds, 255, 0, 2,
                                                                 kUnsignedFraction);
static_assert(kSignedSegments.right && kUnsignedSegments.right, "a threshold is off its line");

#endif

}  // namespace
}  // namespace nf4::cpu
