// The state of Hopper's asynchronous units in a block, shared by hopper.cpp and wgmma.cpp.
#pragma once

#include <array>
#include <map>
#include <vector>

#include "runtime.h"

namespace nf4::emulation {

struct Barrier {
  int arrivals = 0, pending = 0;
  long bytes = 0;  // expected and not landed; below zero while the expectation is still to come
  uint32_t phase = 0;
  Knowledge arriving, released;
  int init_slot = 0;
  uint32_t init_clock = 0;
};

struct PendingBox {
  unsigned char map[128];
  int at[4];
  unsigned char* to;
  int bytes;
  const void* barrier;
  Knowledge known;  // of the thread that started the copy
  const char* file;
  int line;
};

// One wgmma of one warp: its 16 of the 64 rows.
struct Product {
  float* d[32];
  const uint32_t* a[32];  // null: a_matrix
  uint64_t a_matrix, b_matrix;
  bool is_bf16, b_by_rows;

  bool same_operands(const Product& other) const {
    return a_matrix == other.a_matrix && b_matrix == other.b_matrix &&
           (a[0] == nullptr) == (other.a[0] == nullptr) && is_bf16 == other.is_bf16 &&
           b_by_rows == other.b_by_rows;
  }
};

struct WarpProducts {
  bool fenced = false;
  size_t issued = 0;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;           // committed, oldest first
  std::map<float*, std::array<float, 64>> in_flight;  // what the poisoned accumulators hold
};

// A store under way, from shared memory.
struct PendingStore {
  unsigned char map[128];
  int at[4];
  const unsigned char* from;
  const Thread* thread;
  Knowledge known;
};

struct AsyncState {
  Thread engine;  // writes what copies bring; its id and slot are one past the block's threads
  std::map<const void*, Barrier> barriers;
  Thread reader;  // reads what stores take; one further
  std::vector<PendingBox> copies;
  std::vector<PendingStore> stores;
  std::vector<WarpProducts> warps;
  std::vector<std::vector<Product>> sequences;  // of each warpgroup, from its first warp
};
AsyncState& async_state();

// What is wrong with bytes that an asynchronous unit reads or writes; null: nothing.
const char* check_async_operand(const unsigned char* p, size_t bytes);
// Whether a product under way reads these bytes of shared memory.
bool products_read(const unsigned char* p, size_t bytes);
void finish_products();

}  // namespace nf4::emulation
