// What the wrappers of csrc/cuda/hopper.cuh do on a CPU: mbarriers and copies by tensor map, also
// those that reach the other blocks of a cluster.
//
// Copies land as late as can be: when no thread can run. From the start of a copy to its landing
// the bytes are NaN and poisoned, so whoever reads them without waiting is seen. In the race build
// a copy writes as a thread of its own, which knows what the thread that started it knew.
#include "hopper.h"

#include <algorithm>

namespace nf4::emulation {

namespace {

// Our own content of a TensorMap.
struct Map {
  const unsigned char* base;
  int element_bytes, dims, swizzle_bytes;
  uint64_t size[4], stride[4];  // bytes
  uint32_t box[4];

  int box_bytes() const {
    int bytes = element_bytes;
    for (int i = 0; i < dims; ++i) bytes *= static_cast<int>(box[i]);
    return bytes;
  }
};
static_assert(sizeof(Map) <= 128);

// Calls `body(offset in shared memory, source or null where out of bounds)` for each 16 bytes.
template <typename Body>
void each_piece(const Map& map, const int* at, const Body& body) {
  const int pieces = static_cast<int>(map.box[0]) * map.element_bytes / 16;
  const int per_piece = 16 / map.element_bytes;
  const int rows = map.box_bytes() / (16 * pieces);
  for (int row = 0; row < rows; ++row) {
    const unsigned char* source = map.base;
    bool inside = true;
    for (int d = 1, rest = row; d < map.dims; ++d) {
      const int64_t index = at[d] + rest % static_cast<int>(map.box[d]);
      rest /= static_cast<int>(map.box[d]);
      inside &= index >= 0 && index < static_cast<int64_t>(map.size[d]);
      source += index * static_cast<int64_t>(map.stride[d]);
    }
    for (int piece = 0; piece < pieces; ++piece) {
      const int64_t first = at[0] + piece * per_piece;
      int64_t valid = static_cast<int64_t>(map.size[0]) - first;
      valid = !inside || first < 0 ? 0 : std::clamp<int64_t>(valid, 0, per_piece);
      size_t offset = (static_cast<size_t>(row) * pieces + piece) * 16;
      // The 16-byte position within a swizzled row, exclusive-or the number of the 128-byte line.
      offset ^= (offset >> 7 & (map.swizzle_bytes / 16 - 1)) << 4;
      body(offset, source + first * map.element_bytes, static_cast<int>(valid) * map.element_bytes);
    }
  }
}

Barrier* barrier_at(const void* address, const char* file, int line) {
  auto& barriers = async_state().barriers;
  const auto it = barriers.find(address);
  if (it == barriers.end()) {
    report("%s:%d: thread %d uses an mbarrier that nobody initialized", file, line, g_thread->id);
    return nullptr;
  }
  Barrier& b = it->second;
  if (g_checking && g_thread != &async_state().engine &&
      !checker_ordered(b.init_slot, b.init_clock)) {
    report("%s:%d: thread %d uses an mbarrier without having waited for its initialization", file,
           line, g_thread->id);
  }
  return &b;
}

void end_phase_if_complete(const void* address, Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
  b.released = b.arriving;
  for (Thread& t : g_block->threads) {
    if (t.state == Thread::State::kMbarrier && t.awaited == address &&
        (b.phase & 1) != t.awaited_parity) {
      t.state = Thread::State::kReady;
    }
  }
}

// Runs `body` in another block of the cluster, where `pointer` into shared memory means the same
// place: `body(there)`.
template <typename Body>
void in_block(int rank, void* pointer, const Body& body) {
  Block* self = g_block;
  const uint32_t offset = shared_offset(pointer);
  if (rank < 0 || rank >= static_cast<int>(g_cluster.size())) {
    return report("thread %d reaches for block %d of a cluster of %zu", g_thread->id, rank,
                  g_cluster.size());
  }
  enter_block(&g_cluster[rank]);
  if (std::all_of(g_block->threads.begin(), g_block->threads.end(),
                  [](const Thread& t) { return t.state == Thread::State::kDone; })) {
    report("thread %d reaches for a block of the cluster that has ended", g_thread->id);
  } else {
    body(g_arena + offset);
  }
  enter_block(self);
}

// Runs `body` as a unit that copies, which knows what `known` says.
template <typename Body>
void as_engine(Thread* engine, const Knowledge& known, const Body& body) {
  Thread* self = g_thread;
  g_thread = engine;
  g_thread->known = known;
  body();
  g_thread = self;
}

}  // namespace

AsyncState& async_state() {
  if (!g_block->async) {
    g_block->async = std::make_shared<AsyncState>();
    Thread& engine = g_block->async->engine;
    engine.id = static_cast<int>(g_block->threads.size());
    engine.slot = g_block->rank * (engine.id + 2) + engine.id;
    g_block->async->reader.id = engine.id + 1;
    g_block->async->reader.slot = engine.slot + 1;
    g_block->async->warps.resize(g_block->threads.size() / 32);
    g_block->async->sequences.resize((g_block->threads.size() + 127) / 128);
  }
  return *g_block->async;
}

uint32_t shared_offset(const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (p < g_arena || p >= g_arena + (256 << 10)) {
    report("an address that is not in shared memory");
    return 0;
  }
  return static_cast<uint32_t>(p - g_arena);
}

const char* check_async_operand(const unsigned char* p, size_t bytes) {
  bool inside = false;
  for (const SharedArray& array : g_block->arrays) {
    inside |= p >= g_arena + array.offset && p + bytes <= g_arena + array.offset + array.bytes;
  }
  if (!inside) return "out of bounds of a shared array";
  for (const PendingBox& copy : async_state().copies) {
    if (p < copy.to + copy.bytes && copy.to < p + bytes) return "a copy is still writing";
  }
  return nullptr;
}

bool encode_tensor_map(void* map, const void* base, int element_bytes, int dims,
                       const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                       int swizzle_bytes) {
  if (!has_tensor_maps()) return false;
  Map m = {};
  m.base = static_cast<const unsigned char*>(base);
  m.element_bytes = element_bytes;
  m.dims = dims;
  m.swizzle_bytes = swizzle_bytes;
  bool valid = reinterpret_cast<uintptr_t>(base) % 16 == 0;
  for (int i = 0; i < dims; ++i) {
    m.size[i] = size[i];
    m.box[i] = box[i];
    m.stride[i] = i == 0 ? element_bytes : stride[i - 1];
    valid &= size[i] > 0 && size[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256;
    valid &= i == 0 || (m.stride[i] % 16 == 0 && m.stride[i] < uint64_t{1} << 40);
  }
  valid &= static_cast<int>(box[0]) * element_bytes == swizzle_bytes;
  if (!valid) report("a tensor map that the driver would refuse");
  std::memcpy(map, &m, sizeof m);
  return valid;
}

namespace {

// A copy to this block, which may be another than that of the thread that starts it.
void start_copy(void* shared, const void* map, void* barrier, const int* at, int dims,
                const char* file, int line) {
  PendingBox copy;
  std::memcpy(copy.map, map, sizeof copy.map);
  Map m;
  std::memcpy(&m, copy.map, sizeof m);
  std::copy(at, at + dims, copy.at);
  copy.to = static_cast<unsigned char*>(shared);
  copy.bytes = m.box_bytes();
  copy.barrier = barrier;
  copy.known = g_thread->known;
  copy.file = file;
  copy.line = line;
  if (m.dims != dims) report("%s:%d: %d coordinates for a %d-D map", file, line, dims, m.dims);
  if (barrier_at(barrier, file, line) == nullptr) return;
  // The pattern of the swizzle repeats after 8 of its rows.
  if (shared_offset(shared) % (8 * m.swizzle_bytes) != 0) {
    report("%s:%d: a copy to shared memory that is not aligned to its swizzle", file, line);
  }
  if (const char* what = check_async_operand(copy.to, copy.bytes)) {
    report("%s:%d: the destination of a copy: %s", file, line, what);
    return;
  }
  if (products_read(copy.to, copy.bytes)) {
    report("%s:%d: a copy writes what a wgmma still reads", file, line);
    return;
  }
  copy.known = checker_release(g_thread);
  as_engine(&async_state().engine, copy.known,
            [&] { checker_access(copy.to, copy.bytes, true, __builtin_return_address(0)); });
  std::memset(copy.to, 0xff, copy.bytes);
  checker_pending(copy.to, copy.bytes, true);
  poison(copy.to, copy.bytes);
  async_state().copies.push_back(copy);
}

// What the copy reads, by the block that starts it.
void read_source(const void* map, const int* at) {
  Map m;
  std::memcpy(&m, map, sizeof m);
  each_piece(m, at, [&](size_t, const unsigned char* source, int valid) {
    if (valid == 0) return;
    checker_access(source, valid, false, __builtin_return_address(0));
    touch(source, valid);
  });
}

}  // namespace

void tma_load(void* shared, const void* map, void* barrier, const int* at, int dims,
              const char* file, int line) {
  read_source(map, at);
  start_copy(shared, map, barrier, at, dims, file, line);
}

void tma_load_all(void* shared, const void* map, void* barrier, const int* at, int dims, int ctas,
                  const char* file, int line) {
  const uint32_t barrier_offset = shared_offset(barrier);
  read_source(map, at);
  for (int rank = 0; rank < ctas; ++rank) {
    in_block(rank, shared, [&](void* there) {
      start_copy(there, map, g_arena + barrier_offset, at, dims, file, line);
    });
  }
}

bool async_progress(uint64_t random) {
  if (!g_block->async || g_block->async->copies.empty()) return false;
  auto& copies = g_block->async->copies;
  const size_t index = random % copies.size();
  const PendingBox copy = copies[index];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(index));
  unpoison(copy.to, copy.bytes);
  checker_pending(copy.to, copy.bytes, false);
  as_engine(&async_state().engine, copy.known, [&] {
    checker_access(copy.to, copy.bytes, true, __builtin_return_address(0));
    Map m;
    std::memcpy(&m, copy.map, sizeof m);
    each_piece(m, copy.at, [&](size_t offset, const unsigned char* source, int valid) {
      std::memset(copy.to + offset, 0, 16);
      if (valid > 0) std::memcpy(copy.to + offset, source, valid);
    });
    Barrier* b = barrier_at(copy.barrier, copy.file, copy.line);
    b->bytes -= copy.bytes;
    b->arriving = checker_merge(b->arriving, checker_release(g_thread));
    end_phase_if_complete(copy.barrier, *b);
  });
  return true;
}

void tma_store(const void* map, const void* shared, const int* at, int dims, const char* file,
               int line) {
  PendingStore store;
  std::memcpy(store.map, map, sizeof store.map);
  Map m;
  std::memcpy(&m, map, sizeof m);
  std::copy(at, at + dims, store.at);
  store.from = static_cast<const unsigned char*>(shared);
  store.thread = g_thread;
  if (m.dims != dims) report("%s:%d: %d coordinates for a %d-D map", file, line, dims, m.dims);
  if (shared_offset(shared) % (8 * m.swizzle_bytes) != 0) {
    report("%s:%d: a store from shared memory that is not aligned to its swizzle", file, line);
  }
  if (const char* what = check_async_operand(store.from, m.box_bytes())) {
    report("%s:%d: the source of a store: %s", file, line, what);
    return;
  }
  store.known = checker_release(g_thread);
  ++g_thread->stores;
  async_state().stores.push_back(store);
}

void tma_store_wait() {
  auto& stores = async_state().stores;
  for (auto it = stores.begin(); it != stores.end();) {
    if (it->thread != g_thread) {
      ++it;
      continue;
    }
    Map m;
    std::memcpy(&m, it->map, sizeof m);
    Knowledge read;
    as_engine(&async_state().reader, it->known, [&] {
      each_piece(m, it->at, [&](size_t offset, const unsigned char* to, int valid) {
        checker_access(it->from + offset, 16, false, __builtin_return_address(0));
        if (valid == 0) return;
        checker_access(to, valid, true, __builtin_return_address(0));
        touch(to, valid);
        std::memcpy(const_cast<unsigned char*>(to), it->from + offset, valid);
      });
      read = checker_release(g_thread);
    });
    g_thread->known = checker_merge(g_thread->known, read);
    --g_thread->stores;
    it = stores.erase(it);
  }
}

void mbarrier_init(void* barrier, int arrivals, const char* file, int line) {
  check_shared_read(barrier, 8, "mbarrier.init");
  checker_access(barrier, 8, true, __builtin_return_address(0));
  std::memset(barrier, 0, 8);
  Barrier b;
  b.arrivals = b.pending = arrivals;
  b.arriving = b.released = std::make_shared<const std::vector<uint32_t>>(g_thread->known->size());
  b.init_slot = g_thread->slot;
  b.init_clock = g_thread->clock;
  if (!async_state().barriers.emplace(barrier, b).second) {
    report("%s:%d: an mbarrier is initialized twice", file, line);
  }
}

void mbarrier_arrive(void* barrier, int expected_bytes, const char* file, int line) {
  Barrier* b = barrier_at(barrier, file, line);
  if (b == nullptr) return;
  b->bytes += expected_bytes;
  b->arriving = checker_merge(b->arriving, checker_release(g_thread));
  --b->pending;
  end_phase_if_complete(barrier, *b);
}

void mbarrier_arrive_at(void* barrier, int rank, const char* file, int line) {
  in_block(rank, barrier, [&](void* there) { mbarrier_arrive(there, 0, file, line); });
}

void mbarrier_wait(void* barrier, uint32_t parity, const char* file, int line) {
  Barrier* b = barrier_at(barrier, file, line);
  if (b == nullptr) return;
  if ((b->phase & 1) == parity) {
    g_thread->state = Thread::State::kMbarrier;
    g_thread->awaited = barrier;
    g_thread->awaited_parity = parity;
    g_thread->file = file;
    g_thread->line = line;
    yield_to_scheduler();
  }
  g_thread->known = checker_merge(g_thread->known, b->released);
}

void async_finish() {
  if (!g_block->async) return;
  for (const PendingBox& copy : g_block->async->copies) {
    report("a copy of %s:%d never waited for", copy.file, copy.line);
  }
  finish_products();
}

}  // namespace nf4::emulation
