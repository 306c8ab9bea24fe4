// The blocked matmul that every fused op is built from: C = sum of products A B, float32 sums.
//
// A task owns a tile of C (at most kTaskRows x kTaskColumns, float32, in its thread's L2). For each
// block of the depth it decodes B into panels of kPanelColumns columns that fit in L1, converts A
// where its type asks for that, and runs register tiles over them. Every element of C is summed in
// the order of the depth, whatever the tiling, so results do not depend on the number of threads.
#pragma once

#include "panel.h"

namespace nf4::cpu {
namespace {

// C[kRows, kVectors * kWidth] (+)= A B, where a row of B is one step of the depth.
template <class Math, int kRows, int kVectors>
void tile(const typename Math::Element* a, int64_t lda, const uint32_t* b, int64_t ldb,
          int64_t steps, float* c, int64_t ldc, bool fresh) {
  constexpr int kLine = 16;  // steps in a cache line of A
  F acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  }
  for (int64_t s = 0; s < steps; ++s) {
    // The rows of the next tile are far apart: no hardware prefetcher finds them.
    if (kRows == kTileRows && s % kLine < kRows) {
      __builtin_prefetch(a + (kRows + s % kLine) * lda + s / kLine * kLine * Math::kDepth, 0, 2);
    }
    typename Math::Vector w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = Math::load_b(b + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const auto x = Math::splat_a(a + r * lda + s * Math::kDepth);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Math::multiply_add(x, w[v], acc[r][v]);
    }
    b += ldb;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + r * ldc + v * kWidth;
      store(out, fresh ? acc[r][v] : add(load(out), acc[r][v]));
    }
  }
}

template <class Math, int kRows, int kVectors>
void last_tile(const typename Math::Element* a, int64_t lda, int64_t rows, const uint32_t* b,
               int64_t ldb, int64_t steps, float* c, int64_t ldc, bool fresh) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<Math, kRows, kVectors>(a, lda, b, ldb, steps, c, ldc, fresh);
    last_tile<Math, kRows - 1, kVectors>(a, lda, rows, b, ldb, steps, c, ldc, fresh);
  }
}

template <class Math, int kVectors>
void row_tiles(const typename Math::Element* a, int64_t lda, int64_t rows, const uint32_t* b,
               int64_t ldb, int64_t steps, float* c, int64_t ldc, bool fresh) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    tile<Math, kTileRows, kVectors>(a + r * lda, lda, b, ldb, steps, c + r * ldc, ldc, fresh);
  }
  last_tile<Math, kTileRows - 1, kVectors>(a + r * lda, lda, rows - r, b, ldb, steps, c + r * ldc,
                                           ldc, fresh);
}

// C[rows, columns] (+)= A B for at most kPanelColumns columns, which B and C hold in whole vectors.
template <class Math, int kVectors = kTileVectors>
void tiles(const typename Math::Element* a, int64_t lda, int64_t rows, const uint32_t* b,
           int64_t ldb, int64_t columns, int64_t steps, float* c, int64_t ldc, bool fresh) {
  if constexpr (kVectors > 1) {
    if (columns <= (kVectors - 1) * kWidth) {
      return tiles<Math, kVectors - 1>(a, lda, rows, b, ldb, columns, steps, c, ldc, fresh);
    }
  }
  row_tiles<Math, kVectors>(a, lda, rows, b, ldb, steps, c, ldc, fresh);
}

// w.c (+)= the product's rows [row, row + rows), columns [column, column + columns).
template <class Math>
void accumulate(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                bool fresh, Workspace<Math>& w) {
  using Element = typename Math::Element;
  // A pair must not reach into the next row, so an odd depth is copied and padded.
  const bool direct = p.a.dense.dtype == kDTypeOf<Element> && p.a.dropout.multiplier == 0.0f &&
                      p.depth % Math::kDepth == 0;
  const int64_t block = p.rows < kTileRows ? kShortChain : Math::kBlock;
  const bool by_groups = p.transposed && has_row_groups(p.b);
  const int64_t span = by_groups ? kScaleBlocks << p.b.weight->block_shift : p.depth;
  for (int64_t first = 0; first < p.depth; first += block) {
    const int64_t depth = min(block, p.depth - first);
    if (by_groups && first % span == 0) {
      pack_scales(p.b, column, columns, first, min(span, p.depth - first), w);
    }
    const int64_t steps = ceil_div(depth, Math::kDepth);
    const Element* a = static_cast<const Element*>(p.a.dense.data) + row * p.depth + first;
    int64_t lda = p.depth;
    if (!direct) {
      for (int64_t r = 0; r < rows; ++r) {
        w.a[r * kSteps<Math> + steps - 1] = 0;
        read(p.a, row + r, first, depth, reinterpret_cast<Element*>(w.a + r * kSteps<Math>));
      }
      a = reinterpret_cast<const Element*>(w.a);
      lda = Math::kBlock;
    }
    for (int64_t i = 0; i < columns; i += kPanelColumns) {
      const int64_t width = min(kPanelColumns, columns - i);
      if (p.transposed) {
        const float* scales =
            by_groups ? w.scales + (first % span >> p.b.weight->block_shift) * kTaskColumns + i
                      : nullptr;
        pack_transposed(p.b, column + i, width, first, depth, scales, w);
      } else {
        pack_rows(p.b, column + i, width, first, depth, w);
      }
      tiles<Math>(a, lda, rows, w.panel, kPanelColumns, width, steps, w.c + i, kTaskColumns, fresh);
    }
    fresh = false;
  }
  if (fresh) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(w.c + r * kTaskColumns, 0, static_cast<size_t>(columns) * sizeof(float));
    }
  }
}

// Calls task(row, rows, column, columns, workspace) for every tile of an [m, n] result.
template <class Math, class Fn>
void for_tiles(int64_t m, int64_t n, const Fn& task) {
  if (m == 0 || n == 0) return;
  const int64_t column_tasks = ceil_div(n, kTaskColumns);
  // Few columns: cut the rows finer, so that there is work for every thread.
  const int64_t wanted = max(ceil_div(m, kTaskRows), ceil_div(16, column_tasks));
  const int64_t rows_each = max(4 * kTileRows, round_up(ceil_div(m, wanted), kTileRows));
  const int64_t height = min(rows_each, kTaskRows);
  const int64_t row_tasks = ceil_div(m, height);
  parallel_for(row_tasks * column_tasks, [&](int64_t t) {
    const int64_t row = t / column_tasks * height, column = t % column_tasks * kTaskColumns;
    auto* workspace = static_cast<Workspace<Math>*>(scratch(sizeof(Workspace<Math>)));
    task(row, min(height, m - row), column, min(kTaskColumns, n - column), *workspace);
  });
}

// out[row, column...] = one row of C, converted.
inline void write_row(const float* c, int64_t count, DType dtype, void* out, int64_t first) {
  with_type(dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(out) + first;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load(c + i));
    for (; i < count; ++i) from_float(c[i], to + i);
  });
}

}  // namespace
}  // namespace nf4::cpu
