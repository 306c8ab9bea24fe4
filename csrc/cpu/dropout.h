// Dropout masks from Philox4x32-10 (Salmon et al., SC 2011), as nf4/ops.py defines them.
#pragma once

#include "simd.h"

namespace nf4::cpu {
namespace {

constexpr int kPhiloxStep = 64;  // elements made at once: 16 counters of 4 words each

// words[4 * i + j] is word j of counter first + i, i < 16. Each 64-bit lane works on one counter,
// with its words in the low halves.
inline void philox(uint64_t seed, uint64_t first, uint32_t* words) {
  constexpr int kLanes = kWidth / 2, kGroups = 16 / kLanes;
  const uint64_t low = 0xffffffff;
  W c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t counter = first + static_cast<uint64_t>(g * kLanes + i);
      c0[g][i] = counter & low;
      c1[g][i] = counter >> 32;
    }
    c2[g] = c3[g] = W{};
  }
  uint64_t k0 = seed & low, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      const W p0 = multiply_words(c0[g], 0xD2511F53), p1 = multiply_words(c2[g], 0xCD9E8D57);
      c0[g] = (p1 >> 32) ^ c1[g] ^ k0;
      c1[g] = p1 & low;
      c2[g] = (p0 >> 32) ^ c3[g] ^ k1;
      c3[g] = p0 & low;
    }
    k0 = (k0 + 0x9E3779B9) & low;
    k1 = (k1 + 0xBB67AE85) & low;
  }
  for (int g = 0; g < kGroups; ++g) {
    const W first_two = c0[g] | c1[g] << 32, last_two = c2[g] | c3[g] << 32;
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t four[2] = {first_two[i], last_two[i]};
      std::memcpy(words + 4 * (g * kLanes + i), four, sizeof four);
    }
  }
}

// Multiplies values[i], element first + i of the flattened matrix, by its mask.
inline void apply_dropout(const Dropout& dropout, int64_t first, int64_t count, float* values) {
  const int64_t end = first + count;
  const auto threshold = static_cast<uint32_t>(dropout.threshold);
  // A threshold of 2^32 keeps nothing.
  const float multiplier = dropout.threshold >> 32 ? 0.0f : dropout.multiplier;
  for (int64_t group = first / kPhiloxStep; group * kPhiloxStep < end; ++group) {
    const int64_t base = group * kPhiloxStep;
    alignas(64) uint32_t words[kPhiloxStep];
    philox(dropout.seed, static_cast<uint64_t>(base) / 4, words);
    const int64_t from = max(first, base), to = min(end, base + kPhiloxStep);
    float* out = values + (from - first);
    const uint32_t* word = words + (from - base);
    for (int64_t i = 0; i < to - from; ++i) out[i] *= word[i] >= threshold ? multiplier : 0.0f;
  }
}

}  // namespace
}  // namespace nf4::cpu
