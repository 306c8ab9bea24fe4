// Shared by the emulation's own files; kernels see only emulation.h.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "emulation.h"

namespace nf4::emulation {

constexpr size_t kArenaBytes = 512 << 10;
constexpr int kMaxCluster = 8;
constexpr size_t kStackBytes = 256 << 10;

// What a thread knows of the others: the clocks at its last synchronization. Shared between the
// threads that synchronized together.
using Knowledge = std::shared_ptr<const std::vector<uint32_t>>;

struct PendingCopy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
  const char* file;
  int line;
};

struct Thread {
  enum class State {
    kReady,
    kBlockBarrier,
    kNamedBarrier,
    kClusterBarrier,
    kWarp,
    kMbarrier,
    kDone
  };
  State state = State::kReady;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  int id = 0;    // in the block
  int slot = 0;  // in the cluster: of clocks and stacks; a block has two more, for its copies
  uint3 index{};
  const char* file = "";
  int line = 0;
  size_t carved = 0;
  uint32_t clock = 1;
  Knowledge known;
  std::vector<std::vector<PendingCopy>> groups;  // committed cp.async groups, oldest first
  std::vector<PendingCopy> open_group;
  const void* awaited = nullptr;  // the mbarrier of kMbarrier, and the phase's parity
  uint32_t awaited_parity = 0;
  int stores = 0;  // by tensor map, that it has not waited for
};

struct AsyncState;  // hopper.cpp: mbarriers, copies and products under way

struct SharedArray {
  size_t offset, bytes, alignment;
};

struct Block {
  Indices indices;
  std::vector<Thread> threads;
  std::vector<SharedArray> arrays;
  size_t arena_used = 0;
  size_t requested = 0;
  size_t shared_limit = 0;
  int rank = 0;            // in the cluster
  long serial = 0;         // of the block over all launches
  uint32_t published = 0;  // how often it did
  std::map<long, uint32_t>
      seen;  // of other blocks' serials: what they published before a wait here
  const std::function<void()>* kernel = nullptr;
  std::map<int, std::vector<Thread*>> named;  // who stands at a barrier of its own number
  std::shared_ptr<AsyncState> async;
};

// What runs: a thread, its block with its shared memory, and its cluster. The shared memory of a
// cluster's blocks lies in a row.
extern std::vector<Block> g_cluster;
extern Block* g_block;
extern Thread* g_thread;
extern unsigned char* g_arena;
extern unsigned char* g_arenas;
void enter_block(Block* block);
extern long g_launch;
extern const unsigned char* g_launch_frame;

// fibers.cpp: gives a thread a stack that begins in the kernel, runs it until it waits or ends,
// and, in the running thread, goes back to who ran it.
void prepare(Thread& thread);
void switch_to_fiber(Thread* thread);
void yield_to_scheduler();

bool has_tensor_maps();  // whether the driver encodes them

// Records a defect; the test reads them all afterwards. Never throws: kernels are C++ frames.
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The checker (checker.cpp); does nothing in the asan build.
void checker_begin_launch();
void checker_begin_cluster();
void checker_allocate(const void* shared, size_t bytes);
void checker_pending(const void* shared, int bytes, bool pending);
void checker_access(const void* address, size_t bytes, bool write, const void* pc);
Knowledge checker_join(Thread* const* threads, int count);
// Vector clocks for other orders than barriers: what a thread knows and did so far, the sum of two
// knowledges, and whether the running thread knows what `other` did up to `clock`.
Knowledge checker_release(Thread* thread);
Knowledge checker_merge(const Knowledge& a, const Knowledge& b);
bool checker_ordered(int slot, uint32_t clock);
extern bool g_checking;
// The order of blocks' global memory by counters: all that a block wrote before it published is
// known to a block that waits afterwards.
void checker_publish();
void checker_acquire();

// hopper.cpp: lets one copy to this block that is under way land; false where there is none.
// `random` picks.
bool async_progress(uint64_t random);
// Reports what this block leaves under way.
void async_finish();

// ASan's poisoning, empty functions elsewhere.
void poison(void* address, size_t bytes);
void unpoison(void* address, size_t bytes);
// As instrumented code would read it: ASan sees an address out of bounds.
void touch(const void* address, size_t bytes);
float element(uint32_t pair, int index, bool is_bf16);

}  // namespace nf4::emulation
