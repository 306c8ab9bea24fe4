// The dropout mask: Philox4x32-10 by flat element index, as nf4/ops.py fixes it.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace nf4::cuda {

struct Dropout {
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;   // a word below it drops its element
  bool drop_all;        // the threshold is 2^32
  float keep_scale;     // 1 / (1 - p)
};

inline Dropout dropout_of(double p, const int64_t* seed) {
  const double threshold = std::nearbyint(p * 4294967296.0);
  const bool all = threshold >= 4294967296.0;
  return {p > 0.0 ? seed : nullptr, all ? 0u : static_cast<uint32_t>(threshold), all,
          static_cast<float>(1.0 / (1.0 - p))};
}

// The four words of counter `block` (Salmon et al., SC 2011).
__device__ __forceinline__ uint4 philox(int64_t seed, int64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ bool is_kept(const Dropout& d, uint32_t word) {
  return word >= d.threshold && !d.drop_all;
}
__device__ __forceinline__ float multiplier(const Dropout& d, uint32_t word) {
  return is_kept(d, word) ? d.keep_scale : 0.0f;
}

// Multipliers of elements [first, first + 4) where first is a multiple of 4; `seed` is the value
// that d.seed points to.
__device__ __forceinline__ void dropout4_aligned(const Dropout& d, int64_t seed, int64_t first,
                                                 float (&m)[4]) {
  const uint4 w = philox(seed, first >> 2);
  m[0] = multiplier(d, w.x), m[1] = multiplier(d, w.y);
  m[2] = multiplier(d, w.z), m[3] = multiplier(d, w.w);
}

// The same for any first element.
__device__ __forceinline__ void dropout4(const Dropout& d, int64_t seed, int64_t first,
                                         float (&m)[4]) {
  const int shift = static_cast<int>(first & 3);
  if (shift == 0) return dropout4_aligned(d, seed, first, m);
  const uint4 w = philox(seed, first >> 2);
  const uint4 v = philox(seed, (first >> 2) + 1);
  const uint32_t words[8] = {w.x, w.y, w.z, w.w, v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) word = j == i + shift ? words[j] : word;  // no local memory
    m[i] = multiplier(d, word);
  }
}

}  // namespace nf4::cuda
