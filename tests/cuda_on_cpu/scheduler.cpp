// The scheduler of a cluster's fibers, barriers, warp collectives, and the launch itself.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "hopper.h"

namespace nf4::emulation {

std::vector<Block> g_cluster;
Block* g_block = nullptr;
Thread* g_thread = nullptr;
unsigned char* g_arena = nullptr;
unsigned char* g_arenas = nullptr;
long g_launch = 0;
const unsigned char* g_launch_frame = nullptr;

namespace {

std::string g_reports;
int g_report_count = 0;
uint64_t g_seed = 0;
int g_multiprocessors = 4;
int g_compute_capability = 90;
bool g_has_tensor_maps = true;

uint64_t next_random() {
  g_seed = g_seed * 6364136223846793005ull + 1442695040888963407ull;
  return g_seed >> 33;
}

const char* name_of(Thread::State state) {
  if (state == Thread::State::kMbarrier) return "an mbarrier";
  if (state == Thread::State::kNamedBarrier) return "a barrier of some threads";
  if (state == Thread::State::kClusterBarrier) return "the cluster's barrier";
  return state == Thread::State::kBlockBarrier ? "__syncthreads" : "a warp collective";
}

bool release_block_barrier(Block& block) {
  const Thread* first = nullptr;
  for (const Thread& t : block.threads) {
    if (t.state != Thread::State::kBlockBarrier) return false;
    if (first == nullptr) first = &t;
    if (t.line != first->line || t.file != first->file) {
      report("divergent __syncthreads: thread %d at %s:%d, thread %d at %s:%d", first->id,
             first->file, first->line, t.id, t.file, t.line);
      return false;
    }
  }
  std::vector<Thread*> all;
  for (Thread& t : block.threads) all.push_back(&t);
  const Knowledge joined = checker_join(all.data(), static_cast<int>(all.size()));
  for (Thread& t : block.threads) {
    t.state = Thread::State::kReady;
    t.known = joined;
    ++t.clock;
  }
  return true;
}

bool release_cluster_barrier() {
  std::vector<Thread*> all;
  for (Block& block : g_cluster) {
    for (Thread& t : block.threads) {
      if (t.state != Thread::State::kClusterBarrier) return false;
      all.push_back(&t);
    }
  }
  const Knowledge joined = checker_join(all.data(), static_cast<int>(all.size()));
  for (Thread* t : all) {
    t->state = Thread::State::kReady;
    t->known = joined;
    ++t->clock;
  }
  return true;
}

// Thread `i` of the cluster, block by block.
Thread& thread_at(int i) {
  const int threads = static_cast<int>(g_cluster[0].threads.size());
  return g_cluster[i / threads].threads[i % threads];
}

// Picks the next ready thread of the cluster; -1 when there is none.
int pick(int count, int last, int mode) {
  const auto ready = [&](int i) { return thread_at(i).state == Thread::State::kReady; };
  if (mode == 0) {
    for (int i = 1; i <= count; ++i) {
      if (ready((last + i) % count)) return (last + i) % count;
    }
    return -1;
  }
  if (mode == 2) {  // the same warp for as long as it can run
    const int warp = last / 32 * 32;
    for (int i = 0; i < 32 && warp + i < count; ++i) {
      if (ready(warp + i)) return warp + i;
    }
  }
  const int start = static_cast<int>(next_random() % count);
  for (int i = 0; i < count; ++i) {
    if (ready((start + i) % count)) return (start + i) % count;
  }
  return -1;
}

// Where no thread can run: a barrier that all have reached, else one copy that is under way.
bool make_progress(int mode) {
  for (Block& block : g_cluster) {
    if (release_block_barrier(block)) return true;
  }
  if (release_cluster_barrier()) return true;
  const size_t start = mode == 0 ? 0 : next_random() % g_cluster.size();
  for (size_t i = 0; i < g_cluster.size(); ++i) {
    enter_block(&g_cluster[(start + i) % g_cluster.size()]);
    if (async_progress(mode == 0 ? 0 : next_random())) return true;
  }
  return false;
}

bool run_cluster(int mode) {
  int last = 0;
  int done = 0;
  const int threads = static_cast<int>(g_cluster[0].threads.size());
  const int count = threads * static_cast<int>(g_cluster.size());
  while (done < count) {
    const int next = pick(count, last, mode);
    if (next < 0) {
      if (make_progress(mode)) continue;
      if (g_report_count == 0) {
        const Thread *a = nullptr, *b = nullptr;
        for (int i = 0; i < count; ++i) {
          const Thread& t = thread_at(i);
          if (t.state == Thread::State::kDone) continue;
          if (a == nullptr) a = &t;
          b = &t;
        }
        report(
            "deadlock: %d of %d threads ended; thread %d waits for %s at %s:%d, thread %d for "
            "%s at %s:%d",
            done, count, a->slot, name_of(a->state), a->file, a->line, b->slot, name_of(b->state),
            b->file, b->line);
      }
      return false;
    }
    last = next;
    enter_block(&g_cluster[next / threads]);
    Thread& t = thread_at(next);
    switch_to_fiber(&t);
    if (t.state == Thread::State::kDone) {
      ++done;
      if (!t.groups.empty() || !t.open_group.empty()) {
        const PendingCopy& copy = t.groups.empty() ? t.open_group[0] : t.groups[0].front();
        report("cp.async of %s:%d never waited for by thread %d", copy.file, copy.line, t.slot);
      }
      if (t.stores > 0) report("a store never waited for by thread %d", t.slot);
    }
  }
  for (Block& block : g_cluster) {
    enter_block(&block);
    async_finish();
  }
  return true;
}

// The arrivals at the collective that each warp stands at.
struct Arrivals {
  int count = 0;
  WarpFunction function = nullptr;
  const char* file = nullptr;
  int line = 0;
  void* payload[32] = {};
};
std::vector<Arrivals> g_arrivals;

// Waits until all 32 threads of the warp have come; true for the last one.
void arrive_at_warp(WarpFunction function, void* payload, const char* file, int line) {
  Thread* self = g_thread;
  const int warp = self->id / 32;
  Arrivals& at = g_arrivals[g_block->rank * (g_block->threads.size() / 32) + warp];
  if (at.count > 0 && (at.function != function || at.line != line || at.file != file)) {
    report("divergent warp collective: thread %d at %s:%d, others of its warp at %s:%d", self->id,
           file, line, at.file, at.line);
  }
  at.function = function;
  at.file = file;
  at.line = line;
  at.payload[self->id % 32] = payload;
  self->file = file;
  self->line = line;
  if (++at.count < 32) {
    self->state = Thread::State::kWarp;
    yield_to_scheduler();
    return;
  }
  at.count = 0;
  Thread* warp_threads[32];
  for (int i = 0; i < 32; ++i) warp_threads[i] = &g_block->threads[warp * 32 + i];
  if (function != nullptr) {
    function(at.payload);
  } else {
    const Knowledge joined = checker_join(warp_threads, 32);
    for (Thread* t : warp_threads) {
      t->known = joined;
      ++t->clock;
    }
  }
  for (Thread* t : warp_threads) t->state = Thread::State::kReady;
}

}  // namespace

void report(const char* format, ...) {
  if (++g_report_count > 8) return;  // the first ones tell; the rest is noise
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  g_reports += text;
  g_reports += '\n';
}

const Indices& current() {
  static Indices own;  // where the race checker looks for no kernel's memory
  own = g_block->indices;
  own.thread = g_thread->index;
  return own;
}

void enter_block(Block* block) {
  g_block = block;
  g_arena = block == nullptr ? nullptr : g_arenas + block->rank * kArenaBytes;
}

void block_barrier(const char* file, int line) {
  g_thread->state = Thread::State::kBlockBarrier;
  g_thread->file = file;
  g_thread->line = line;
  yield_to_scheduler();
}

void named_barrier(int id, int threads, const char* file, int line) {
  Thread* self = g_thread;
  auto& at = g_block->named[id];
  at.push_back(self);
  self->file = file;
  self->line = line;
  if (static_cast<int>(at.size()) < threads) {
    self->state = Thread::State::kNamedBarrier;
    yield_to_scheduler();
    return;
  }
  const Knowledge joined = checker_join(at.data(), threads);
  for (Thread* t : at) {
    t->state = Thread::State::kReady;
    t->known = joined;
    ++t->clock;
  }
  at.clear();
}

void cluster_barrier(const char* file, int line) {
  g_thread->state = Thread::State::kClusterBarrier;
  g_thread->file = file;
  g_thread->line = line;
  yield_to_scheduler();
}

void warp_barrier(const char* file, int line) { arrive_at_warp(nullptr, nullptr, file, line); }

void warp_collective(WarpFunction function, void* payload, const char* file, int line) {
  arrive_at_warp(function, payload, file, line);
}

void* carve(size_t bytes, size_t alignment, const char* file, int line) {
  constexpr size_t kRedZone = 64;
  Block& block = *g_block;
  const size_t index = g_thread->carved++;
  if (index == block.arrays.size()) {
    size_t offset = block.arena_used + kRedZone;
    offset = (offset + alignment - 1) / alignment * alignment;
    block.arrays.push_back({offset, bytes, alignment});
    block.arena_used = offset + bytes;
    block.requested = (block.requested + alignment - 1) / alignment * alignment + bytes;
    if (block.requested > block.shared_limit) {
      report("%s:%d: %zu bytes of shared memory carved, %zu requested at launch", file, line,
             block.requested, block.shared_limit);
    }
    if (block.arena_used > kArenaBytes) std::abort();
    unpoison(g_arena + offset, bytes);
    std::memset(g_arena + offset, 0xff, bytes);  // NaN in every format
    checker_allocate(g_arena + offset, bytes);
  }
  const SharedArray& array = block.arrays[index];
  if (array.bytes != bytes || array.alignment != alignment) {
    report("%s:%d: thread %d carves %zu bytes where another thread carved %zu", file, line,
           g_thread->id, bytes, array.bytes);
  }
  return g_arena + array.offset;
}

int run(dim3 grid, dim3 block, int cluster, size_t shared_bytes,
        const std::function<void()>& kernel) {
  if (g_report_count > 0) return 1;  // what follows a defect is noise
  g_launch_frame = static_cast<const unsigned char*>(__builtin_frame_address(0));
  if (g_arenas == nullptr) {
    const size_t bytes = kMaxCluster * kArenaBytes;
    g_arenas = static_cast<unsigned char*>(std::aligned_alloc(4096, bytes));
  }
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (threads % 32 != 0 || threads > 1024) {
    report("a block of %d threads", threads);
    return 1;
  }
  if (cluster < 1 || cluster > kMaxCluster || grid.x % cluster != 0) {
    report("a grid of %u blocks in clusters of %d", grid.x, cluster);
    return 1;
  }
  const int mode = g_seed == 0 ? 0 : (g_seed % 2 == 0 ? 1 : 2);
  ++g_launch;
  checker_begin_launch();
  g_arrivals.assign(cluster * threads / 32, Arrivals());
  static long serial = 0;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster) {
        g_cluster = std::vector<Block>(cluster);
        poison(g_arenas, cluster * kArenaBytes);
        checker_begin_cluster();
        const auto nothing =
            std::make_shared<const std::vector<uint32_t>>(cluster * (threads + 2), 0);
        for (int rank = 0; rank < cluster; ++rank) {
          Block& b = g_cluster[rank];
          b.indices.block = {x + rank, y, z};
          b.indices.block_dim = block;
          b.indices.grid_dim = grid;
          b.shared_limit = shared_bytes;
          b.kernel = &kernel;
          b.rank = rank;
          b.serial = ++serial;
          b.threads.resize(threads);
          for (int i = 0; i < threads; ++i) {
            Thread& t = b.threads[i];
            t.id = i;
            t.slot = rank * (threads + 2) + i;
            t.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
            t.known = nothing;
            prepare(t);
          }
        }
        const bool finished = run_cluster(mode);
        unpoison(g_arenas, cluster * kArenaBytes);
        enter_block(nullptr);
        if (!finished || g_report_count > 0) return 1;
      }
    }
  }
  return 0;
}

int multiprocessors() { return g_multiprocessors; }
int compute_capability() { return g_compute_capability; }
bool has_tensor_maps() { return g_has_tensor_maps; }

}  // namespace nf4::emulation

// The tests' side.
extern "C" {
void nf4_emulation_configure(uint64_t seed, int multiprocessors, int compute_capability,
                             int has_tensor_maps) {
  nf4::emulation::g_seed = seed;
  nf4::emulation::g_multiprocessors = multiprocessors;
  nf4::emulation::g_compute_capability = compute_capability;
  nf4::emulation::g_has_tensor_maps = has_tensor_maps != 0;
}

// The defects found since the last call, one a line.
const char* nf4_emulation_reports() {
  static std::string text;
  text.swap(nf4::emulation::g_reports);
  nf4::emulation::g_reports.clear();
  nf4::emulation::g_report_count = 0;
  return text.c_str();
}
}
