// The matmul for a few rows of x: every weight is decoded in registers and used at once, and the
// packed bytes are prefetched in address order, so that a single row runs at the memory's speed.
//
// One lane holds one row of W. Codes are looked up unscaled; a block's sum is scaled when it is
// added to C, which also keeps the chains of additions short.
#pragma once

#include "dots.h"

namespace nf4::cpu {
namespace {

constexpr int kStreamColumns = kStreamVectors * kWidth;
// Above this many rows, decoding to panels once costs less than decoding for every 12 rows.
constexpr int64_t kStreamLimit = 2 * kStreamRows;

inline bool can_stream(const Product& p) {
  return p.transposed && p.rows <= kStreamLimit && has_row_groups(p.b);
}

// x in the order of the nibbles: [chunk][row][lane], zero-padded to whole chunks.
template <class Math>
struct Arranged {
  static constexpr int kLanes = kWidth * Math::kParts;  // of one row's chunk
  static int64_t bytes(const Product& p) {
    return ceil_div(p.depth, kChunk) * p.rows * kChunk * sizeof(typename Math::Element);
  }
  // Fills `memory`, of bytes(p).
  static void fill(const Product& p, typename Math::Element* memory) {
    for (int64_t first = 0; first < p.depth; first += kChunk) {
      const int64_t count = min(kChunk, p.depth - first);
      for (int64_t r = 0; r < p.rows; ++r, memory += kChunk) {
        Math::arrange(p.a.dense, r * p.depth + first, count, memory);
        std::memset(memory + count, 0, static_cast<size_t>(kChunk - count) * sizeof *memory);
      }
    }
  }
};

// Walks the packed bytes of a task ahead of their use.
struct Prefetcher {
  const uint8_t* next;
  const uint8_t* end;
  void advance(int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) {
      if (next + i < end) __builtin_prefetch(next + i, 0, 2);
    }
    next += bytes;
  }
};

// Transposes the next chunk's nibbles, a part beside each dword of this one: all at once, the
// shuffles would leave the multipliers idle (8 % at 12 rows, Zen 4).
struct Staging {
  const uint32_t* next;  // null: nothing to do
  int64_t row_dwords;
  uint32_t* between;  // [kStreamVectors][kWidth][kWidth]
  uint32_t* nibbles;  // the same
  void advance(int64_t d) const {
    static_assert(kTransposeParts * kStreamVectors <= kWidth);
    const int64_t v = d % kStreamVectors, part = d / kStreamVectors, size = kWidth * kWidth;
    if (part >= kTransposeParts) return;
    transpose_part(static_cast<int>(part), next + v * kWidth * row_dwords, row_dwords,
                   between + v * size, nibbles + v * size, kWidth);
  }
};

// c[kRows, kStreamColumns] += the products of dwords [from, to) of a chunk, scaled.
template <class Math, int kRows>
void stream_block(const uint32_t* nibbles,            // [kStreamVectors][kWidth][kWidth]
                  int64_t from, int64_t to,           //
                  const typename Math::Element* x,    // [kRows][kChunk]
                  const typename Math::Codes& codes,  //
                  const float* scales,                // [kStreamColumns]
                  Prefetcher& ahead, const Staging& staging, float* c) {
  // Additions take 4 to 6 cycles: few rows need several chains to keep both units busy.
  constexpr int kChains = kRows * kStreamVectors <= 4 ? 4 : kRows * kStreamVectors <= 8 ? 2 : 1;
  constexpr int kBytes = kRows * kChunk / kWidth * static_cast<int>(sizeof *x);
  F acc[kChains][kRows][kStreamVectors];
  for (auto& chain : acc) {
    for (auto& row : chain) {
      for (F& a : row) a = zero();
    }
  }
  for (int64_t d = from; d < to; ++d) {
    // A few lines at a time: a burst of prefetches fills the miss queue and stalls the arithmetic.
    ahead.advance(kStreamColumns * sizeof(uint32_t));
    if (kTransposeParts > 1 && staging.next) staging.advance(d);
    // x for this dword in the next chunk: its rows are too short for a hardware prefetcher.
    const auto* next_x = reinterpret_cast<const uint8_t*>(x + kRows * kChunk) + d * kBytes;
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(next_x + i, 0, 3);
    I lanes[kStreamVectors];
    for (int v = 0; v < kStreamVectors; ++v) {
      lanes[v] = load_dwords(nibbles + (v * kWidth + d) * kWidth);
    }
#pragma GCC unroll 8
    for (int p = 0; p < Math::kParts; ++p) {
      typename Math::Vector w[kStreamVectors];
      for (int v = 0; v < kStreamVectors; ++v) w[v] = Math::part(codes, lanes[v], p);
      const int64_t lane = d * Math::kParts + Math::lane_of_part(p);
      for (int r = 0; r < kRows; ++r) {
        const auto a = Math::splat_a(x + r * kChunk + lane * Math::kDepth);
        for (int v = 0; v < kStreamVectors; ++v) {
          F& sum = acc[p % kChains][r][v];
          sum = Math::multiply_add(a, w[v], sum);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kStreamVectors; ++v) {
      F sum = acc[0][r][v];
      for (int i = 1; i < kChains; ++i) sum = add(sum, acc[i][r][v]);
      float* out = c + r * kTaskColumns + v * kWidth;
      store(out, fma(sum, load(scales + v * kWidth), load(out)));
    }
  }
}

template <class Math, int kRows>
void stream_rows(int64_t rows, const uint32_t* nibbles, int64_t from, int64_t to,
                 const typename Math::Element* x, const typename Math::Codes& codes,
                 const float* scales, Prefetcher& ahead, const Staging& staging, float* c) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      return stream_block<Math, kRows>(nibbles, from, to, x, codes, scales, ahead, staging, c);
    }
    stream_rows<Math, kRows - 1>(rows, nibbles, from, to, x, codes, scales, ahead, staging, c);
  }
}

// C's columns [column, column + columns), at most kStreamColumns: c[rows, ...] = the product.
template <class Math>
void stream_columns(const Product& p, const typename Math::Element* x, int64_t column,
                    int64_t columns, Prefetcher& ahead, float* scales, float* c) {
  const Weight& weight = *p.b.weight;
  const auto codes = Math::codes(format_of(weight.format));
  const int64_t block = int64_t{1} << weight.block_shift;
  const int64_t blocks = p.depth >> weight.block_shift;
  const int64_t flush = min(block, 64);  // elements summed before they are scaled
  const int64_t passes = ceil_div(p.rows, kStreamRows), height = ceil_div(p.rows, passes);
  for (int v = 0; v < kStreamVectors; ++v) {
    load_scales(p.b, column + v * kWidth, columns - v * kWidth, 0, blocks, scales + v * kWidth,
                kStreamColumns);
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int v = 0; v < kStreamVectors; ++v) store(c + r * kTaskColumns + v * kWidth, zero());
  }
  constexpr int64_t kSize = kStreamVectors * kWidth * kWidth;
  alignas(64) uint32_t nibbles[2][kSize], between[kSize];
  const auto load = [&](int64_t first, uint32_t* out) {
    for (int v = 0; v < kStreamVectors; ++v) {
      load_nibbles(p.b, column + v * kWidth, columns - v * kWidth, first, p.depth - first, 0,
                   out + v * kWidth * kWidth);
    }
  };
  load(0, nibbles[0]);
  const int64_t row_bytes = p.depth / 2;
  const uint8_t* packed = weight.packed + column * row_bytes;
  bool odd = false;
  for (int64_t first = 0; first < p.depth; first += kChunk, x += p.rows * kChunk, odd = !odd) {
    const int64_t depth = min(kChunk, p.depth - first), next = first + kChunk;
    const bool whole = kTransposeParts > 1 && columns >= kStreamColumns && next + kChunk <= p.depth;
    Staging staging{};
    if (whole) {
      staging = {reinterpret_cast<const uint32_t*>(packed + next / 2), row_bytes / 4, between,
                 nibbles[!odd]};
    } else if (next < p.depth) {
      load(next, nibbles[!odd]);
    }
    for (int64_t r = 0; r < p.rows; r += height) {
      Prefetcher none{ahead.end, ahead.end};
      if (r > 0) staging.next = nullptr;
      for (int64_t from = 0; from < depth; from += flush) {
        stream_rows<Math, kStreamRows>(
            min(height, p.rows - r), nibbles[odd], from / 8, min(from + flush, depth) / 8,
            x + r * kChunk, codes, scales + ((first + from) >> weight.block_shift) * kStreamColumns,
            r == 0 ? ahead : none, staging, c + r * kTaskColumns);
      }
    }
  }
}

// Calls finish(column, columns, workspace) for every tile of C, whole in rows, with the product in
// workspace.c.
template <class Math, class Fn>
void stream(const Product& p, int64_t n, const Fn& finish) {
  using Element = typename Math::Element;
  void* arranged = shared_scratch(Arranged<Math>::bytes(p));
  auto* x = static_cast<Element*>(arranged);
  const bool by_dots = can_dot<Math>(p, n);
  if (by_dots) {
    arrange_dots<Math>(p, static_cast<uint32_t*>(arranged));
  } else {
    Arranged<Math>::fill(p, x);
  }
  const int64_t row_bytes = p.depth / 2;
  // Dots need two rows of scales, each with room for find4 to read past the last.
  const int64_t scale_count =
      (p.depth >> p.b.weight->block_shift) * max(kStreamColumns, kDotColumns) + kDotColumns * 4;
  // Long tasks: each starts with a group of rows that nothing has fetched yet.
  const int64_t tiles = ceil_div(n, kTaskColumns);
  const int64_t tiles_each = max(1, min(8, tiles / (4 * threads())));
  parallel_for(ceil_div(tiles, tiles_each), [&](int64_t task) {
    const int64_t begin = task * tiles_each * kTaskColumns;
    const int64_t end = min(n, begin + tiles_each * kTaskColumns);
    auto* w = static_cast<Workspace<Math>*>(
        scratch(static_cast<int64_t>(sizeof(Workspace<Math>) + scale_count * sizeof(float))));
    auto* scales = reinterpret_cast<float*>(w + 1);
    if (by_dots) {
      for (int64_t tile = begin; tile < end; tile += kTaskColumns) {
        const int64_t columns = min(kTaskColumns, end - tile);
        dots<Math>(p, static_cast<const uint32_t*>(arranged), tile, columns, scales, w->c);
        finish(tile, columns, *w);
      }
      return;
    }
    const uint8_t* bytes = p.b.weight->packed;
    Prefetcher ahead{bytes + begin * row_bytes, bytes + end * row_bytes};
    ahead.advance(kStreamColumns * row_bytes);
    for (int64_t tile = begin; tile < end; tile += kTaskColumns) {
      const int64_t columns = min(kTaskColumns, end - tile);
      for (int64_t i = 0; i < columns; i += kStreamColumns) {
        stream_columns<Math>(p, x, tile + i, columns - i, ahead, scales, w->c + i);
      }
      finish(tile, columns, *w);
    }
  });
}

}  // namespace
}  // namespace nf4::cpu
