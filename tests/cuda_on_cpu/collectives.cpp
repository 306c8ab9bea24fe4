// What the wrappers of csrc/cuda/ptx.cuh do on a CPU: cp.async, mma, ldmatrix, shuffles.
#include "runtime.h"

namespace nf4::emulation {

float element(uint32_t pair, int index, bool is_bf16) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * index));
  if (is_bf16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

void touch(const void* address, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < bytes; ++i) {
    static_cast<void>(*(static_cast<const volatile unsigned char*>(address) + i));
  }
#else
  static_cast<void>(address);
  static_cast<void>(bytes);
#endif
}

namespace {

// Fragment layouts of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane 4g + t
// holds A rows g, g+8 and columns 2t, 2t+1, 2t+8, 2t+9; B rows likewise, column g; C rows g, g+8
// and columns 2t, 2t+1.
void mma(void* const (&payload)[32], bool bf16) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& m = *static_cast<const Mma*>(payload[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        a[g + (i % 2) * 8][2 * t + e + (i / 2) * 8] = element(m.a[i], e, bf16);
        if (i < 2) b[2 * t + e + i * 8][g] = element(m.b[i], e, bf16);
      }
      c[g + (i / 2) * 8][2 * t + i % 2] = m.c[i];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& m = *static_cast<const Mma*>(payload[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) m.c[i] = c[g + (i / 2) * 8][2 * t + i % 2];
  }
}

void land(const PendingCopy& copy) {
  unpoison(copy.to, copy.bytes);
  checker_pending(copy.to, copy.bytes, false);
  checker_access(copy.to, copy.bytes, true, __builtin_return_address(0));
  std::memset(copy.to, 0, copy.bytes);
  std::memcpy(copy.to, copy.from, copy.valid);
}

}  // namespace

void mma_bf16(void* const (&payload)[32]) { mma(payload, true); }
void mma_fp16(void* const (&payload)[32]) { mma(payload, false); }

void atomic_add(int64_t* counter, int64_t value) { *counter += value; }

int take_ticket(int* counter) { return (*counter)++; }

int take_turn(int* counter) {
  checker_publish();
  const int ticket = (*counter)++;
  checker_acquire();
  return ticket;
}

void publish(int* counter) {
  ++*counter;
  checker_publish();
}

void wait_for(const int* counter, int value, const char* file, int line) {
  if (*counter < value) {
    report("%s:%d: block %u waits for %d blocks, %d have published", file, line,
           g_block->indices.block.x, value, *counter);
  }
  checker_acquire();
}

void clear(void* p, size_t bytes) { std::memset(p, 0, bytes); }

void check_shared_read(const void* address, size_t bytes, const char* what) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < g_arena || p + bytes > g_arena + kArenaBytes) {
    report("%s: the address is not in shared memory", what);
    return;
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) report("%s: misaligned address", what);
  bool inside = false;
  for (const SharedArray& array : g_block->arrays) {
    inside |= p >= g_arena + array.offset && p + bytes <= g_arena + array.offset + array.bytes;
  }
  if (!inside) report("%s: out of bounds of its shared array", what);
}

void load_matrix(void* const (&payload)[32]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t tile[8][8];
    for (int row = 0; row < 8; ++row) {
      const LoadMatrix& source = *static_cast<const LoadMatrix*>(payload[matrix * 8 + row]);
      check_shared_read(source.row, 16, "ldmatrix");
      Thread* reader = g_thread;
      g_thread = &g_block->threads[reader->id / 32 * 32 + matrix * 8 + row];
      checker_access(source.row, 16, false, __builtin_return_address(0));
      g_thread = reader;
      std::memcpy(tile[row], source.row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const LoadMatrix& to = *static_cast<const LoadMatrix*>(payload[lane]);
      const int g = lane / 4, t = lane % 4;
      const uint16_t first = to.transpose ? tile[2 * t][g] : tile[g][2 * t];
      const uint16_t second = to.transpose ? tile[2 * t + 1][g] : tile[g][2 * t + 1];
      to.out[matrix] = first | static_cast<uint32_t>(second) << 16;
    }
  }
}

void shuffle(void* const (&payload)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    Shuffle& s = *static_cast<Shuffle*>(payload[lane]);
    const int from = s.up_from_lane ? s.lane_mask & 31 : lane ^ s.lane_mask;
    s.result = static_cast<const Shuffle*>(payload[from])->value;
  }
}

void cp_async(void* shared, const void* global, int bytes, int valid, const char* file, int line) {
  auto* to = static_cast<unsigned char*>(shared);
  check_shared_read(shared, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    report("%s:%d: cp.async of %d bytes from a misaligned global address", file, line, bytes);
  }
  // Counted now: a write that earlier readers must be ordered before, and a read of the source.
  checker_access(to, bytes, true, __builtin_return_address(0));
  if (valid > 0) checker_access(global, valid, false, __builtin_return_address(0));
  touch(global, valid);
  std::memset(to, 0xff, bytes);
  checker_pending(to, bytes, true);
  if (bytes % 8 == 0) poison(to, bytes);
  const auto* from = static_cast<const unsigned char*>(global);
  g_thread->open_group.push_back({to, from, bytes, valid, file, line});
}

void cp_async_commit() {
  g_thread->groups.push_back(std::move(g_thread->open_group));
  g_thread->open_group.clear();
}

void cp_async_wait(int pending_groups) {
  auto& groups = g_thread->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const PendingCopy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace nf4::emulation
