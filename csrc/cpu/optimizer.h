// The AdamW step over many parameters. nf4/optim/adamw.py states the arithmetic.
#pragma once

#include "dropout.h"
#include "optimizer_codes.h"

namespace nf4::cpu {
namespace {

// Blocks of one task: 2 MB of float32 parameters, gradients and 8-bit states.
constexpr int64_t kBlocksPerTask = 512;

// How many blocks ahead to fetch: four streams are too many for the hardware, which also stops at
// each page. Measured 1.2x (100 M parameters, 2 threads, Zen 5); 1 to 8 are within 7 % of another.
constexpr int64_t kAhead = 2;

struct AdamWVectors {
  explicit AdamWVectors(const AdamWScalars& s)
      : beta1(broadcast(s.beta1)),
        gain1(broadcast(s.gain1)),
        beta2(broadcast(s.beta2)),
        gain2(broadcast(s.gain2)),
        inverse_c2(broadcast(s.inverse_c2)),
        eps(broadcast(s.eps)),
        decay(broadcast(s.decay)),
        step_size(broadcast(s.step_size)) {}
  F beta1, gain1, beta2, gain2, inverse_c2, eps, decay, step_size;
};

struct Largest {
  float m, v;
  bool finite() const { return magnitude(m) < 0x7f800000 && magnitude(v) < 0x7f800000; }
  static uint32_t magnitude(float x) { return float_bits(x) & 0x7fffffff; }
};

// Moments that lie in memory as floats.
struct StoredMoments {
  static constexpr int kVectors = 1;
  const float *m, *v;
  void read(int64_t i, F (&old_m)[1], F (&old_v)[1]) const {
    old_m[0] = load(m + i);
    old_v[0] = load(v + i);
  }
};

// New moments of a block from the old ones, whose memory they may take, and the denominators of the
// parameters' change. Returns the largest magnitudes, NaN where there is one.
// Taking the roots here and dividing later saves 6 % of the step in portable C++ and at most 1 %
// elsewhere (Zen 4, 1 thread, second-level cache).
template <class Moments>
inline Largest update_moments(const float* g, const Moments& old, const AdamWVectors& s,
                              float* new_m, float* new_v, float* denominator) {
  constexpr int kVectors = Moments::kVectors;
  I largest_m = splat(0), largest_v = splat(0);
  constexpr int64_t kStep = kVectors * kWidth;
  // Read one step ahead: look-ups and arithmetic then depend on nothing that has just begun.
  F next_m[kVectors], next_v[kVectors];
  old.read(0, next_m, next_v);
#pragma GCC unroll 4
  for (int64_t i = 0; i < kStateBlock; i += kStep) {
    F m[kVectors], v[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      m[j] = next_m[j];
      v[j] = next_v[j];
    }
    if (i + kStep < kStateBlock) old.read(i + kStep, next_m, next_v);
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i + j * kWidth;
      const F grad = load(g + at);
      m[j] = add(mul(s.beta1, m[j]), mul(s.gain1, grad));
      v[j] = add(mul(s.beta2, v[j]), mul(mul(s.gain2, grad), grad));
      largest_m = max(largest_m, magnitude_bits(m[j]));
      largest_v = max(largest_v, magnitude_bits(v[j]));
      store(new_m + at, m[j]);
      store(new_v + at, v[j]);
      store(denominator + at, add(mul(sqrt(v[j]), s.inverse_c2), s.eps));
    }
  }
  return {bits_float(static_cast<uint32_t>(reduce_max(largest_m))),
          bits_float(static_cast<uint32_t>(reduce_max(largest_v)))};
}

// One vector of parameters.
inline void update_vector(const float* m, const float* denominator, const AdamWVectors& s,
                          float* p) {
  const F ratio = div(load(m), load(denominator));
  store(p, sub(mul(load(p), s.decay), mul(s.step_size, ratio)));
}

inline float inverse_of(float absmax) {
  return 1.0f / (absmax < NF4_ABSMAX_FLOOR ? NF4_ABSMAX_FLOOR : absmax);
}

constexpr bool is_half(Half) { return true; }
constexpr bool is_half(BFloat) { return false; }

// Cuts x to the 16-bit type after adding the low bits of word below its last bit, as
// nf4.backends.reference_optim.stochastic_round does.
template <class Word>
void round_stochastically(float x, uint32_t word, Word* out) {
  const bool half = is_half(*out);
  const uint32_t cut = half ? (1u << 13) - 1 : (1u << 16) - 1;
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f800000) return from_float(x, out);
  const float base = half && magnitude < 0x38800000 ? 0x1p-14f : 0.0f;
  const uint32_t raised = (float_bits(bits_float(magnitude) + base) + (word & cut)) & ~cut;
  const float rounded = bits_float(raised) - base;
  from_float(bits_float(float_bits(rounded) | (bits & 0x80000000)), out);
}

// 256 floats of a matrix, converted and padded with zeros into buffer unless they lie ready.
inline const float* block_of(Matrix x, int64_t first, int64_t count, float* buffer) {
  if (x.dtype == DType::kFloat32 && count == kStateBlock) {
    return static_cast<const float*>(x.data) + first;
  }
  with_type(x.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(x.data)) + first;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(buffer + i, load(data + i));
    for (; i < count; ++i) buffer[i] = to_float(data[i]);
    for (; i < kStateBlock; ++i) buffer[i] = 0.0f;
  });
  return buffer;
}

template <class T>
void write_floats(const float* x, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(x + i));
  for (; i < count; ++i) from_float(x[i], out + i);
}

// The random words of a block; element is its index in the stream of the whole step.
inline void block_words(uint64_t seed, int64_t element, uint32_t* words) {
  for (int64_t i = 0; i < kStateBlock; i += kPhiloxStep) {
    philox(seed, static_cast<uint64_t>(element + i) / 4, words + i);
  }
}

inline const uint8_t* codes_of(const uint8_t* codes, int64_t count, uint8_t zero, uint8_t* buffer) {
  if (count == kStateBlock) return codes;
  for (int64_t i = 0; i < kStateBlock; ++i) buffer[i] = i < count ? codes[i] : zero;
  return buffer;
}

// Fetches a block of elements of `size` bytes. Past the end of an array this does nothing.
inline void prefetch(const void* data, int64_t first, int64_t size) {
  const char* p = static_cast<const char*>(data) + first * size;
  for (int64_t i = 0; i < kStateBlock * size; i += 64) __builtin_prefetch(p + i);
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Steps one block of a parameter; false, with nothing written, if its moments are not finite.
inline bool step_block(const AdamWParam& t, int64_t block, const AdamWVectors& s,
                       const uint64_t* seed) {
  const int64_t first = block * kStateBlock;
  const int64_t count = min(kStateBlock, t.numel - first);
  alignas(64) float p_buffer[kStateBlock], g_buffer[kStateBlock], m[kStateBlock], v[kStateBlock];
  alignas(64) float denominator[kStateBlock];
  const float* g = block_of(t.grad, first, count, g_buffer);
  Largest largest;
  // Each array is fetched shortly before its counterpart of this block is used: 40 lines at once
  // stall the loads, and cost 18 % (50 M parameters, 1 thread, Zen 5).
  const int64_t next = first + kAhead * kStateBlock;
  const int64_t state_size = t.absmax1 ? 1 : 4;
  prefetch(t.state1, next, state_size);
  prefetch(t.state2, next, state_size);
  if (t.absmax1) {
    alignas(64) uint8_t buffer1[kStateBlock], buffer2[kStateBlock];
    const auto* stored1 = static_cast<const uint8_t*>(t.state1) + first;
    const auto* stored2 = static_cast<const uint8_t*>(t.state2) + first;
    const uint8_t* codes1 = codes_of(stored1, count, kSignedZero, buffer1);
    const uint8_t* codes2 = codes_of(stored2, count, 0, buffer2);
    prefetch(t.grad.data, next, size_of(t.grad.dtype));
#if NF4_ISA >= NF4_ISA_AVX512_BF16
    const CodedMoments old = {codes1, codes2, t.absmax1[block], t.absmax2[block]};
#else
    decode_block<true>(codes1, t.absmax1[block], m);
    decode_block<false>(codes2, t.absmax2[block], v);
    const StoredMoments old = {m, v};
#endif
    largest = update_moments(g, old, s, m, v, denominator);
  } else {
    const Matrix state1 = {t.state1, DType::kFloat32}, state2 = {t.state2, DType::kFloat32};
    const float* old_m = block_of(state1, first, count, m);
    prefetch(t.grad.data, next, size_of(t.grad.dtype));
    const float* old_v = block_of(state2, first, count, v);
    largest = update_moments(g, StoredMoments{old_m, old_v}, s, m, v, denominator);
  }
  if (!largest.finite()) return false;

  const Matrix param = {t.param, t.dtype};
  auto* p = const_cast<float*>(block_of(param, first, count, p_buffer));
  prefetch(t.param, next, size_of(t.dtype));
  if (t.absmax1) {
    const bool direct = count == kStateBlock;
    alignas(64) uint8_t buffer1[kStateBlock], buffer2[kStateBlock];
    auto* codes1 = static_cast<uint8_t*>(t.state1) + first;
    auto* codes2 = static_cast<uint8_t*>(t.state2) + first;
    // Half of the parameters during the search for either moment's codes: dividing leaves most of
    // the machine free.
    const auto even = [&](int64_t i) {
      if (i % (2 * kWidth) == 0) update_vector(m + i, denominator + i, s, p + i);
    };
    const auto odd = [&](int64_t i) {
      if (i % (2 * kWidth) != 0) update_vector(m + i, denominator + i, s, p + i);
    };
    encode_block<true>(m, inverse_of(largest.m), direct ? codes1 : buffer1, even);
    encode_block<false>(v, inverse_of(largest.v), direct ? codes2 : buffer2, odd);
    if (!direct) {
      std::memcpy(codes1, buffer1, count);
      std::memcpy(codes2, buffer2, count);
    }
    t.absmax1[block] = largest.m;
    t.absmax2[block] = largest.v;
  } else {
    for (int64_t i = 0; i < kStateBlock; i += kWidth)
      update_vector(m + i, denominator + i, s, p + i);
    write_floats(m, count, static_cast<float*>(t.state1) + first);
    write_floats(v, count, static_cast<float*>(t.state2) + first);
  }
  if (p == p_buffer) {
    with_type(t.dtype, [&](auto* type) {
      auto* out = static_cast<decltype(type)>(t.param) + first;
      if constexpr (sizeof *type == 2) {
        if (seed) {
          uint32_t words[kStateBlock];
          block_words(*seed, t.offset + first, words);
          for (int64_t i = 0; i < count; ++i) round_stochastically(p[i], words[i], out + i);
          return;
        }
      }
      write_floats(p, count, out);
    });
  }
  return true;
}

void adamw_step(const AdamWParam* params, int64_t count, const AdamWScalars& scalars,
                const uint64_t* seed, int64_t* skipped) {
  if (count == 0) return;
  const AdamWParam& last = params[count - 1];
  const int64_t blocks = last.first_block + ceil_div(last.numel, kStateBlock);
  parallel_for(ceil_div(blocks, kBlocksPerTask), [&](int64_t task) {
    const AdamWVectors vectors(scalars);
    const int64_t begin = task * kBlocksPerTask, end = min(blocks, begin + kBlocksPerTask);
    // The last parameter that begins at or before the task does.
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (params[middle].first_block <= begin ? low : high) = middle;
    }
    int64_t left = 0;
    for (int64_t b = begin; b < end; ++b) {
      while (low + 1 < count && params[low + 1].first_block <= b) ++low;
      left += !step_block(params[low], b - params[low].first_block, vectors, seed);
    }
    if (left) __atomic_fetch_add(skipped, left, __ATOMIC_RELAXED);
  });
}

}  // namespace
}  // namespace nf4::cpu
