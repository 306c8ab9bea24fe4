// What this machine can do at most: arithmetic bursts and memory streams with nothing else in them.
//
// Compiled by peaks.py for the machine that runs it (-march=native), so the preprocessor knows the
// instruction set. Every function splits its work over `threads` OpenMP threads.
#include <omp.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWide = 64;
#elif defined(__AVX__)
constexpr int kWide = 32;
#else
constexpr int kWide = 16;
#endif

// 12 independent chains: a fused multiply-add takes 4 cycles and two issue each cycle, so 8 are
// needed; 12 fit in 16 registers beside the two operands.
constexpr int kChains = 12;
constexpr long kLine = 64;

// A class template, because GCC 12 drops a dependent vector_size from a local typedef.
template <int kBytes>
struct Floats {
  typedef float Vec __attribute__((vector_size(kBytes)));
};

template <int kBytes>
double fma_burst(long steps) {
  typename Floats<kBytes>::Vec acc[kChains], scale, shift;
  for (int lane = 0; lane < kBytes / 4; ++lane) {
    scale[lane] = 0.75f;
    shift[lane] = 0.25f;
    for (int c = 0; c < kChains; ++c) acc[c][lane] = 0.01f * static_cast<float>(c + lane);
  }
  // Opaque to the optimizer, which would otherwise fold the chains.
  asm volatile("" : "+m"(scale), "+m"(shift));
  for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * scale + shift;
  }
  double sum = 0;
  for (int c = 0; c < kChains; ++c) sum += static_cast<double>(acc[c][0]);
  return sum;
}

#if defined(__AVX512BF16__)
double dot_burst(long steps) {
  __m512 acc[kChains];
  __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00);  // pairs of bf16 0.5
  __m512bh b = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  asm volatile("" : "+v"(a), "+v"(b));
  for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_ps(static_cast<float>(c));
  for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], a, b);
  }
  double sum = 0;
  for (int c = 0; c < kChains; ++c) sum += static_cast<double>(_mm512_cvtss_f32(acc[c]));
  return sum;
}
#endif

typedef uint64_t Line __attribute__((vector_size(kLine)));

inline Line load(const char* p) {
  Line line;
  std::memcpy(&line, p, kLine);
  return line;
}

template <bool kNonTemporal>
inline void store(char* p, Line line) {
#if defined(__AVX512F__)
  if (kNonTemporal) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)line);
    return;
  }
#elif defined(__AVX__)
  if (kNonTemporal) {
    __m256i halves[2];
    std::memcpy(halves, &line, kLine);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves[0]);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, halves[1]);
    return;
  }
#endif
  std::memcpy(p, &line, kLine);
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Lines [first, last) of the team member that calls.
struct Span {
  long first, last;
};

inline Span my_span(long lines) {
  const long team = omp_get_num_threads(), me = omp_get_thread_num();
  return {lines * me / team, lines * (me + 1) / team};
}

uint64_t read_span(const char* src, Span span, long streams, long ahead) {
  Line acc[4] = {};
  const long part = (span.last - span.first) / streams;
  for (long i = 0; i < part; ++i) {
    for (long s = 0; s < streams; ++s) {
      const char* p = src + (span.first + s * part + i) * kLine;
      if (ahead) __builtin_prefetch(p + ahead, 0, 2);
      acc[s] ^= load(p);
    }
  }
  for (long i = span.first + part * streams; i < span.last; ++i) acc[0] ^= load(src + i * kLine);
  const Line all = acc[0] ^ acc[1] ^ acc[2] ^ acc[3];
  return all[0] ^ all[7];
}

// Reads and writes spread evenly over each other, `read_lines` to `write_lines`.
template <bool kNonTemporal>
void mix_span(const char* src, long read_lines, char* dst, long write_lines, long ahead) {
  const Span in = my_span(read_lines), out = my_span(write_lines);
  const long reads = in.last - in.first, writes = out.last - out.first;
  const char* r = src + in.first * kLine;
  char* w = dst + out.first * kLine;
  Line line = {1, 2, 3, 4, 5, 6, 7, 8};
  const long steps = reads > writes ? reads : writes;
  long read_debt = 0, write_debt = 0;
  for (long i = 0; i < steps; ++i) {
    read_debt += reads;
    write_debt += writes;
    if (read_debt >= steps) {
      read_debt -= steps;
      if (ahead) __builtin_prefetch(r + ahead, 0, 2);
      line ^= load(r);
      r += kLine;
    }
    if (write_debt >= steps) {
      write_debt -= steps;
      store<kNonTemporal>(w, line);
      w += kLine;
    }
  }
  if (kNonTemporal) fence();
}

}  // namespace

extern "C" {

// Width of the widest vector, in bytes.
int peaks_vector_bytes() { return kWide; }

int peaks_has_dot_bf16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// Runs `steps` rounds of independent fused multiply-adds on vectors of `vector_bytes` in each
// thread. Returns the floating-point operations of the whole team.
double peaks_fma(int vector_bytes, long steps, int threads) {
  double guard = 0, flops = 0;
#pragma omp parallel num_threads(threads) reduction(+ : guard, flops)
  {
#if defined(__AVX512F__)
    if (vector_bytes == 64) guard += fma_burst<64>(steps);
#endif
#if defined(__AVX__)
    if (vector_bytes == 32) guard += fma_burst<32>(steps);
#endif
    if (vector_bytes == 16) guard += fma_burst<16>(steps);
    flops += 2.0 * kChains * (vector_bytes / 4) * static_cast<double>(steps);
  }
  return guard == -1.0 ? 0 : flops;
}

// The same with vdpbf16ps: two multiply-adds in each 32-bit lane. 0 where it does not exist.
double peaks_dot_bf16(long steps, int threads) {
  double guard = 0, flops = 0;
#if defined(__AVX512BF16__)
#pragma omp parallel num_threads(threads) reduction(+ : guard, flops)
  {
    guard += dot_burst(steps);
    flops += 4.0 * kChains * 16 * static_cast<double>(steps);
  }
#endif
  return guard == -1.0 ? 0 : flops;
}

// Reads `bytes` (rounded down to lines), each thread from `streams` (1, 2 or 4) places at once,
// with a prefetch `ahead` bytes in front (0: none). Returns a value that depends on every byte.
uint64_t peaks_read(const char* src, long bytes, long streams, long ahead, int threads) {
  uint64_t sum = 0;
#pragma omp parallel num_threads(threads) reduction(^ : sum)
  sum ^= read_span(src, my_span(bytes / kLine), streams, ahead);
  return sum;
}

// Reads `read_bytes` of src and writes `write_bytes` of dst (64-byte aligned), evenly interleaved.
void peaks_mix(const char* src, long read_bytes, char* dst, long write_bytes, int nontemporal,
               long ahead, int threads) {
#pragma omp parallel num_threads(threads)
  {
    if (nontemporal) {
      mix_span<true>(src, read_bytes / kLine, dst, write_bytes / kLine, ahead);
    } else {
      mix_span<false>(src, read_bytes / kLine, dst, write_bytes / kLine, ahead);
    }
  }
}

}  // extern "C"
