// Dropout masks from Philox4x32-10 (Salmon et al., SC 2011), as nf4/ops.py defines them.
#pragma once

#include "scalar.h"

namespace nf4::cpu {
namespace {

constexpr int kPhiloxLanes = 16;
constexpr int kPhiloxStep = 4 * kPhiloxLanes;  // elements made at once

// words[4 * i + j] is word j of counter first + i. Plain loops: every compiler vectorises them.
inline void philox(uint64_t seed, uint64_t first, uint32_t* words) {
  uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], c3[kPhiloxLanes];
  for (int i = 0; i < kPhiloxLanes; ++i) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = static_cast<uint32_t>((first + i) >> 32);
    c2[i] = c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0[i];
      const uint64_t p1 = uint64_t{0xCD9E8D57} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int i = 0; i < kPhiloxLanes; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// Multiplies values[i], element first + i of the flattened matrix, by its mask.
inline void apply_dropout(const Dropout& dropout, int64_t first, int64_t count, float* values) {
  const int64_t end = first + count;
  for (int64_t group = first / kPhiloxStep; group * kPhiloxStep < end; ++group) {
    const int64_t base = group * kPhiloxStep;
    uint32_t words[kPhiloxStep];
    philox(dropout.seed, static_cast<uint64_t>(base) / 4, words);
    const int64_t from = max(first, base), to = min(end, base + kPhiloxStep);
    for (int64_t e = from; e < to; ++e) {
      values[e - first] *= words[e - base] >= dropout.threshold ? dropout.multiplier : 0.0f;
    }
  }
}

}  // namespace
}  // namespace nf4::cpu
