// wgmma on a CPU. Each warp computes its 16 rows, at the wait that ends their group and not before:
// until then the accumulators are NaN and poisoned, and fragments and shared memory are read as
// they are at that wait. The four warps of a warpgroup must ask for the same products.
#include "hopper.h"

namespace nf4::emulation {

namespace {

constexpr int kColumns = 128;

WarpProducts& products() { return async_state().warps[g_thread->id / 32]; }

// A matrix of 16 columns in shared memory, as the PTX ISA describes those with a 128-byte swizzle:
// stored by columns of the reduction (K-major), the address counts rows of 128 bytes in groups of
// 8; stored by rows of it (MN-major), each row of the reduction has 128 bytes of a block of 64 rows
// of the matrix, 8 of these make a group, and blocks lie the leading offset apart. Either way bits
// 4 to 6 of the address are exclusive-ored with bits 7 to 9.
struct SharedMatrix {
  uint64_t descriptor;
  bool by_rows;

  size_t start() const { return (descriptor & 0x3fff) << 4; }
  size_t leading() const { return (descriptor >> 16 & 0x3fff) << 4; }
  size_t group() const { return (descriptor >> 32 & 0x3fff) << 4; }
  size_t offset(int row, int column) const {
    const size_t linear =
        by_rows ? row / 64 * leading() + row % 64 * 2 + column / 8 * group() + column % 8 * 128
                : row / 8 * group() + row % 8 * 128 + column * 2;
    return (start() + linear) ^ ((start() + linear) >> 7 & 7) << 4;
  }
  uint16_t element(int row, int column) const {
    uint16_t bits;
    std::memcpy(&bits, g_arena + offset(row, column), 2);
    return bits;
  }
  // Calls `body(address)` for every 16 bytes of these rows.
  template <typename Body>
  void each_piece(int rows, int first_row, const Body& body) const {
    for (int row = first_row; row < first_row + rows; row += by_rows ? 8 : 1) {
      for (int column = 0; column < 16; column += by_rows ? 1 : 8) {
        body(g_arena + offset(row, column));
      }
    }
  }
  // Whether these bytes meet a group that the matrix has a part of.
  bool overlaps(int rows, const unsigned char* p, size_t bytes) const {
    const int groups = by_rows ? rows / 64 * 2 : rows / 8;
    for (int i = 0; i < groups; ++i) {
      const unsigned char* begin = g_arena + start() / 128 * 128 +
                                   (by_rows ? i / 2 * leading() + i % 2 * group() : i * group());
      if (p < begin + 1024 && begin < p + bytes) return true;
    }
    return false;
  }
  // False after a report of what a product may not read now.
  bool check(int rows, int first_row) const {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
      report("wgmma: only matrices with a 128-byte swizzle are emulated");
      return false;
    }
    Thread* self = g_thread;
    g_thread = &g_block->threads[self->id / 32 * 32];
    bool allowed = true;
    each_piece(rows, first_row, [&](const unsigned char* p) {
      if (!allowed) return;
      if (const char* what = check_async_operand(p, 16)) {
        report("wgmma of warp %d reads bytes: %s", self->id / 32, what);
        allowed = false;
      } else {
        checker_access(p, 16, false, __builtin_return_address(0));
      }
    });
    g_thread = self;
    return allowed;
  }
};

SharedMatrix a_of(const Product& p) { return {p.a_matrix, false}; }
SharedMatrix b_of(const Product& p) { return {p.b_matrix, p.b_by_rows}; }

bool check_operands(const Product& p) {
  return b_of(p).check(kColumns, 0) &&
         (p.a[0] != nullptr || a_of(p).check(16, g_thread->id / 32 % 4 * 16));
}

void compute(const Product& p, WarpProducts& warp) {
  if (!check_operands(p)) return;
  static float a[16][16], b[16][kColumns], d[16][kColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4 && p.a[lane] != nullptr; ++i) {
      for (int e = 0; e < 2; ++e) {
        a[g + i % 2 * 8][2 * t + e + i / 2 * 8] = element(p.a[lane][i], e, p.is_bf16);
      }
    }
    const auto& held = warp.in_flight.at(p.d[lane]);
    for (int i = 0; i < 64; ++i) d[g + i % 4 / 2 * 8][i / 4 * 8 + 2 * t + i % 2] = held[i];
  }
  if (p.a[0] == nullptr) {
    const int first = g_thread->id / 32 % 4 * 16;
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        a[row][k] = element(a_of(p).element(first + row, k), 0, p.is_bf16);
      }
    }
  }
  for (int column = 0; column < kColumns; ++column) {
    for (int k = 0; k < 16; ++k) {
      b[k][column] = element(b_of(p).element(column, k), 0, p.is_bf16);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < kColumns; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    auto& held = warp.in_flight.at(p.d[lane]);
    for (int i = 0; i < 64; ++i) held[i] = d[g + i % 4 / 2 * 8][i / 4 * 8 + 2 * t + i % 2];
  }
}

bool is_in_flight(const WarpProducts& warp, const float* d) {
  const auto uses = [d](const Product& p) {
    for (const float* own : p.d) {
      if (own == d) return true;
    }
    return false;
  };
  for (const Product& p : warp.open) {
    if (uses(p)) return true;
  }
  for (const auto& group : warp.groups) {
    for (const Product& p : group) {
      if (uses(p)) return true;
    }
  }
  return false;
}

}  // namespace

void wgmma_fence(void* const (&)[32]) { products().fenced = true; }

namespace {

// 128 of the columns of a wgmma.
void start_product(void* const (&payload)[32], int half) {
  WarpProducts& warp = products();
  Product p = {};
  const Wgmma& first = *static_cast<const Wgmma*>(payload[0]);
  p.is_bf16 = first.is_bf16;
  p.b_by_rows = first.b_by_rows;
  p.a_matrix = first.a_matrix;
  const SharedMatrix b{first.b_matrix, first.b_by_rows};
  p.b_matrix = first.b_matrix + half * (b.by_rows ? 2 * b.leading() : 16 * b.group()) / 16;
  for (int lane = 0; lane < 32; ++lane) {
    const Wgmma& w = *static_cast<const Wgmma*>(payload[lane]);
    p.d[lane] = w.d + 64 * half;
    p.a[lane] = w.a;
    if (w.a_matrix != first.a_matrix || w.b_matrix != first.b_matrix) {
      report("wgmma: lanes of a warp name different matrices");
    }
  }
  if (!warp.fenced) report("wgmma of warp %d without wgmma.fence", g_thread->id / 32);
  auto& sequence = async_state().sequences[g_thread->id / 128];
  if (warp.issued == sequence.size()) sequence.push_back(p);
  if (!sequence[warp.issued++].same_operands(p)) {
    report("wgmma: warps of a warpgroup ask for different products");
  }
  check_operands(p);
  for (float* d : p.d) {
    if (warp.in_flight.count(d) != 0) continue;
    std::memcpy(warp.in_flight[d].data(), d, 64 * sizeof(float));
    std::memset(d, 0xff, 64 * sizeof(float));
    poison(d, 64 * sizeof(float));
  }
  warp.open.push_back(p);
}

}  // namespace

void wgmma(void* const (&payload)[32]) {
  const int halves = static_cast<const Wgmma*>(payload[0])->halves;
  for (int half = 0; half < halves; ++half) start_product(payload, half);
}

void wgmma_commit(void* const (&)[32]) {
  WarpProducts& warp = products();
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}

void wgmma_wait(void* const (&payload)[32]) {
  WarpProducts& warp = products();
  const auto pending = static_cast<size_t>(*static_cast<const int*>(payload[0]));
  while (warp.groups.size() > pending) {
    const std::vector<Product> group = std::move(warp.groups.front());
    warp.groups.erase(warp.groups.begin());
    for (const Product& p : group) compute(p, warp);
    for (const Product& p : group) {
      for (float* d : p.d) {
        const auto it = warp.in_flight.find(d);
        if (it == warp.in_flight.end() || is_in_flight(warp, d)) continue;
        unpoison(d, 64 * sizeof(float));
        std::memcpy(d, it->second.data(), 64 * sizeof(float));
        warp.in_flight.erase(it);
      }
    }
  }
  warp.fenced = false;  // the kernel may touch registers now
}

bool products_read(const unsigned char* p, size_t bytes) {
  const auto reads = [&](const Product& product) {
    return b_of(product).overlaps(kColumns, p, bytes) ||
           (product.a[0] == nullptr && a_of(product).overlaps(64, p, bytes));
  };
  for (const WarpProducts& warp : async_state().warps) {
    for (const Product& product : warp.open) {
      if (reads(product)) return true;
    }
    for (const auto& group : warp.groups) {
      for (const Product& product : group) {
        if (reads(product)) return true;
      }
    }
  }
  return false;
}

void finish_products() {
  const AsyncState& state = async_state();
  for (size_t i = 0; i < state.warps.size(); ++i) {
    if (!state.warps[i].in_flight.empty()) report("warp %zu never waited for its wgmma", i);
    if (state.warps[i].issued != state.sequences[i / 4].size()) {
      report("warp %zu asked for fewer wgmma than others of its warpgroup", i);
    }
  }
}

}  // namespace nf4::emulation
