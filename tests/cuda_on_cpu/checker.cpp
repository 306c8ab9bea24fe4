// The race build's checker: per-byte shadow of shared memory and of every registered buffer.
//
// Happens-before by vector clocks over a cluster's threads, joined at __syncthreads, __syncwarp,
// mbarriers and cluster barriers (and by nothing else: shuffles, mma and wgmma order no memory).
// Global memory is checked between blocks of one launch, where only publish and wait_for order
// anything. Compiled without instrumentation; kernels call the
// __tsan hooks below.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "runtime.h"

namespace nf4::emulation {

bool g_checking = false;

namespace {

struct SharedByte {
  uint32_t write_clock;
  uint32_t read_clock[2];
  int16_t writer;     // -1: never written
  int16_t reader[2];  // -1: none
  uint8_t allocated, pending;
};
std::vector<SharedByte> g_shared;
size_t g_shared_used = 0;

struct GlobalByte {
  int32_t write_launch, read_launch;
  int64_t writer, reader;  // block serials; reader -2: several
  uint32_t published;      // how often the writer had published before
};
struct Buffer {
  size_t bytes;
  bool writable;
  std::vector<GlobalByte> shadow;
};
std::map<uintptr_t, Buffer> g_buffers;
std::map<long, uint32_t> g_published;  // of this launch's blocks

bool block_ordered(const GlobalByte& b) {
  const auto it = g_block->seen.find(b.writer);
  return b.writer == g_block->serial || (it != g_block->seen.end() && it->second > b.published);
}

const char* place(const void* pc) {
  static char text[160];
  Dl_info info;
  if (dladdr(pc, &info) != 0 && info.dli_fbase != nullptr) {
    snprintf(text, sizeof text, "library offset 0x%zx",
             static_cast<size_t>(static_cast<const char*>(pc) -
                                 static_cast<const char*>(info.dli_fbase)));
    return text;
  }
  return "?";
}

bool ordered(int slot, uint32_t clock) { return checker_ordered(slot, clock); }

void check_shared(size_t offset, size_t bytes, bool write, const void* pc) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    SharedByte& b = g_shared[i];
    if (!b.allocated || i / kArenaBytes != static_cast<size_t>(g_block->rank)) {
      return report("shared memory: out of bounds %s by thread %d at %s", write ? "write" : "read",
                    g_thread->slot, place(pc));
    }
    if (b.pending) {
      return report(
          "shared memory: thread %d %s bytes that an asynchronous copy is still writing, at %s",
          g_thread->slot, write ? "writes" : "reads", place(pc));
    }
    if (!write && b.writer < 0) {
      return report("shared memory: thread %d reads bytes that nobody wrote, at %s", g_thread->slot,
                    place(pc));
    }
    if (b.writer >= 0 && !ordered(b.writer, b.write_clock)) {
      return report("shared memory: race: %s by thread %d after a write by thread %d, at %s",
                    write ? "write" : "read", g_thread->slot, b.writer, place(pc));
    }
    if (write) {
      for (int r = 0; r < 2; ++r) {
        if (b.reader[r] >= 0 && !ordered(b.reader[r], b.read_clock[r])) {
          return report("shared memory: race: write by thread %d after a read by thread %d, at %s",
                        g_thread->slot, b.reader[r], place(pc));
        }
        b.reader[r] = -1;
      }
      b.writer = static_cast<int16_t>(g_thread->slot);
      b.write_clock = g_thread->clock;
      continue;
    }
    // Two readers are kept: this thread's own slot, else one whose read is already ordered before
    // us, else the second. A third concurrent reader is forgotten.
    int slot = 1;
    for (int r = 1; r >= 0; --r) {
      if (b.reader[r] < 0 || ordered(b.reader[r], b.read_clock[r])) slot = r;
    }
    b.reader[slot] = static_cast<int16_t>(g_thread->slot);
    b.read_clock[slot] = g_thread->clock;
  }
}

void check_global(Buffer& buffer, size_t offset, size_t bytes, bool write, const void* pc) {
  const auto launch = static_cast<int32_t>(g_launch);
  const int64_t self = g_block->serial;
  if (write && !buffer.writable) {
    return report("global memory: write to an input by block %u thread %d at %s",
                  g_block->indices.block.x, g_thread->id, place(pc));
  }
  for (size_t i = offset; i < offset + bytes && buffer.writable; ++i) {
    GlobalByte& b = buffer.shadow[i];
    if (b.write_launch == launch && !block_ordered(b)) {
      return report("global memory: race: %s by block %u after a write by another block, at %s",
                    write ? "write" : "read", g_block->indices.block.x, place(pc));
    }
    if (write) {
      if (b.read_launch == launch && b.reader != self) {
        return report("global memory: race: write by block %u after a read by another block, at %s",
                      g_block->indices.block.x, place(pc));
      }
      b.write_launch = launch;
      b.writer = self;
      b.published = g_block->published;
    } else {
      b.reader = b.read_launch == launch && b.reader != self ? -2 : self;
      b.read_launch = launch;
    }
  }
}

bool in_a_library(uintptr_t address) {
  static uintptr_t last_page = 0;
  if (address >> 12 == last_page) return true;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(address), &info) == 0) return false;
  last_page = address >> 12;
  return true;
}

}  // namespace

void checker_begin_launch() {
  g_published.clear();
  if (g_checking && g_shared.empty()) g_shared.resize(kMaxCluster * kArenaBytes);
}

void checker_publish() { g_published[g_block->serial] = ++g_block->published; }
void checker_acquire() { g_block->seen = g_published; }

void checker_begin_cluster() {
  if (!g_checking) return;
  std::fill(g_shared.begin(), g_shared.begin() + g_shared_used, SharedByte{});
  g_shared_used = 0;
}

void checker_allocate(const void* shared, size_t bytes) {
  if (!g_checking) return;
  const size_t offset = static_cast<const unsigned char*>(shared) - g_arenas;
  for (size_t i = offset; i < offset + bytes; ++i) {
    g_shared[i] = {};
    g_shared[i].writer = g_shared[i].reader[0] = g_shared[i].reader[1] = -1;
    g_shared[i].allocated = 1;
  }
  g_shared_used = std::max(g_shared_used, offset + bytes);
}

void checker_pending(const void* shared, int bytes, bool pending) {
  if (!g_checking) return;
  const size_t offset = static_cast<const unsigned char*>(shared) - g_arenas;
  for (size_t i = offset; i < offset + bytes && i < g_shared.size(); ++i) {
    g_shared[i].pending = pending;
  }
}

Knowledge checker_join(Thread* const* threads, int count) {
  if (!g_checking) return threads[0]->known;
  auto joined = std::make_shared<std::vector<uint32_t>>(*threads[0]->known);
  const std::vector<uint32_t>* last = threads[0]->known.get();
  for (int i = 0; i < count; ++i) {
    if (threads[i]->known.get() == last) continue;
    last = threads[i]->known.get();
    for (size_t j = 0; j < joined->size(); ++j) {
      (*joined)[j] = std::max((*joined)[j], (*last)[j]);
    }
  }
  for (int i = 0; i < count; ++i) (*joined)[threads[i]->slot] = threads[i]->clock;
  return joined;
}

bool checker_ordered(int slot, uint32_t clock) {
  return slot == g_thread->slot || (*g_thread->known)[slot] >= clock;
}

Knowledge checker_release(Thread* thread) {
  if (!g_checking) return thread->known;
  auto known = std::make_shared<std::vector<uint32_t>>(*thread->known);
  (*known)[thread->slot] = thread->clock++;
  return known;
}

Knowledge checker_merge(const Knowledge& a, const Knowledge& b) {
  if (!g_checking || a == b) return b;
  auto joined = std::make_shared<std::vector<uint32_t>>(*a);
  for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*b)[i]);
  return joined;
}

void checker_access(const void* pointer, size_t bytes, bool write, const void* pc) {
  if (!g_checking || g_thread == nullptr) return;
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (p >= g_thread->stack && p < g_thread->stack + kStackBytes) return;
  // The arguments of the launch live on the stack of the thread that launches.
  if (p >= g_launch_frame - (64 << 10) && p < g_launch_frame + (64 << 10)) return;
  if (p >= g_arenas && p < g_arenas + kMaxCluster * kArenaBytes) {
    return check_shared(p - g_arenas, bytes, write, pc);
  }
  const auto address = reinterpret_cast<uintptr_t>(p);
  auto it = g_buffers.upper_bound(address);
  if (it != g_buffers.begin()) {
    --it;
    const size_t offset = address - it->first;
    if (offset + bytes <= it->second.bytes) {
      return check_global(it->second, offset, bytes, write, pc);
    }
  }
  if (!in_a_library(address)) {
    report("global memory: out of bounds %s of %zu bytes by block %u thread %d at %s",
           write ? "write" : "read", bytes, g_block->indices.block.x, g_thread->id, place(pc));
  }
}

}  // namespace nf4::emulation

extern "C" {
// Buffers that kernels may touch. Without any call the checker is off (the asan build).
void nf4_emulation_register(const void* address, size_t bytes, int writable) {
  nf4::emulation::g_checking = true;
  auto& buffer = nf4::emulation::g_buffers[reinterpret_cast<uintptr_t>(address)];
  buffer.bytes = bytes;
  buffer.writable = writable != 0;
  buffer.shadow.assign(writable != 0 ? bytes : 0, {});
}
void nf4_emulation_forget() { nf4::emulation::g_buffers.clear(); }

#define NF4_HOOK(name, bytes, write)                                                      \
  void name(void* address) {                                                              \
    ::nf4::emulation::checker_access(address, bytes, write, __builtin_return_address(0)); \
  }
#define NF4_HOOKS(bytes)                              \
  NF4_HOOK(__tsan_read##bytes, bytes, false)          \
  NF4_HOOK(__tsan_write##bytes, bytes, true)          \
  NF4_HOOK(__tsan_volatile_read##bytes, bytes, false) \
  NF4_HOOK(__tsan_volatile_write##bytes, bytes, true)
NF4_HOOKS(1)
NF4_HOOKS(2)
NF4_HOOKS(4)
NF4_HOOKS(8)
NF4_HOOKS(16)
NF4_HOOK(__tsan_unaligned_read2, 2, false)
NF4_HOOK(__tsan_unaligned_read4, 4, false)
NF4_HOOK(__tsan_unaligned_read8, 8, false)
NF4_HOOK(__tsan_unaligned_read16, 16, false)
NF4_HOOK(__tsan_unaligned_write2, 2, true)
NF4_HOOK(__tsan_unaligned_write4, 4, true)
NF4_HOOK(__tsan_unaligned_write8, 8, true)
NF4_HOOK(__tsan_unaligned_write16, 16, true)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t bytes) {
  ::nf4::emulation::checker_access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  ::nf4::emulation::checker_access(address, bytes, true, __builtin_return_address(0));
}
}
