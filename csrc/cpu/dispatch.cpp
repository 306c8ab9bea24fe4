// Chooses the instruction set at run time, and owns what all of them share: threads and scratch.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace nf4::cpu {

extern const KernelTable kPortable;
#if defined(__x86_64__)
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Bf16;
#endif

namespace {

struct Level {
  const KernelTable* table;
  bool supported;
};

constexpr int kLevels = 4;

int level_named(const Level* levels, const char* name) {
  for (int i = 0; i < kLevels; ++i) {
    if (levels[i].table && std::strcmp(levels[i].table->name, name) == 0) return i;
  }
  return -1;
}

const KernelTable& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  const Level levels[kLevels] = {
      {&kPortable, true}, {&kAvx2, avx2}, {&kAvx512, avx512}, {&kAvx512Bf16, bf16}};
#else
  const Level levels[kLevels] = {{&kPortable, true}, {}, {}, {}};
#endif
  int cap = kLevels - 1;
  // torch's own override: its names are default, avx2 and avx512.
  if (const char* name = std::getenv("ATEN_CPU_CAPABILITY")) {
    if (std::strcmp(name, "default") == 0) cap = 0;
    if (std::strcmp(name, "avx2") == 0) cap = 1;
  }
  if (const char* name = std::getenv("NF4_CPU_ISA")) {
    const int named = level_named(levels, name);
    if (named >= 0) {
      cap = named < cap ? named : cap;
    } else {
      std::fprintf(
          stderr, "nf4: NF4_CPU_ISA must be portable, avx2, avx512 or avx512_bf16, got %s\n", name);
    }
  }
  int best = 0;
  for (int i = 0; i <= cap; ++i) {
    if (levels[i].supported) best = i;
  }
  return *levels[best].table;
}

void serial(int64_t tasks, TaskBody body, void* context) {
  for (int64_t i = 0; i < tasks; ++i) body(context, i);
}

int64_t one_thread() { return 1; }

Pool current = {serial, one_thread};

// A buffer that grows; the old content is lost.
struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;

  void* reserve(int64_t wanted) {
    constexpr int64_t kStep = int64_t{1} << 16;
    if (wanted <= bytes) return data;
    std::free(data);
    bytes = (wanted + kStep - 1) / kStep * kStep;
    data = std::aligned_alloc(64, static_cast<size_t>(bytes));
    if (!data) {
      std::fprintf(stderr, "nf4: out of memory for %lld bytes of scratch\n",
                   static_cast<long long>(wanted));
      std::abort();
    }
    return data;
  }

  ~Buffer() { std::free(data); }
};

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

void set_pool(const Pool& pool) { current = pool; }
const Pool& pool() { return current; }

void* scratch(int64_t bytes) {
  thread_local Buffer buffer;
  return buffer.reserve(bytes);
}

void* shared_scratch(int64_t bytes) {
  thread_local Buffer buffer;
  return buffer.reserve(bytes);
}

int64_t l1_bytes() {
  static const int64_t bytes = [] {
    long found = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return found > 0 ? int64_t{found} : int64_t{32} << 10;
  }();
  return bytes;
}

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  // Only pages that lie in the buffer as a whole: its neighbours in memory stay as they are.
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const auto end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  // Advice: where it is refused, small pages serve.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace nf4::cpu

// Name of the instruction set in use, for nf4.backends.cpu.isa().
extern "C" __attribute__((visibility("default"))) const char* nf4_cpu_isa() {
  return nf4::cpu::kernels().name;
}
