// The blocked matmul that every fused op is built from: C = sum of products A B, float32 sums.
//
// A task owns a tile of C (at most kTaskRows x kTaskColumns, float32, in its thread's L2). For each
// block of the depth it decodes B into panels of kPanelColumns columns that fit in L1, converts A
// where its type asks for that, and runs register tiles over them. Every element of C is summed in
// the order of the depth, whatever the tiling, so results do not depend on the number of threads.
#pragma once

#include "operand.h"

namespace nf4::cpu {
namespace {

constexpr int kPanelColumns = kTileVectors * kWidth;
constexpr int kTaskColumns = 2 * kPanelColumns > 64 ? 2 * kPanelColumns : 64;
constexpr int64_t kTaskRows = 512;

// How a product is computed: the element type of A and B, and the depth of one 32-bit lane.
struct FloatMath {
  using Element = float;
  static constexpr int kDepth = 1;
  static constexpr int kBlock = kWidth == 16 ? 128 : 256;  // a panel is 32 KiB at most
  static F multiply_add(const float* a, const uint32_t* b, F c) {
    return fma(broadcast(*a), load(reinterpret_cast<const float*>(b)), c);
  }
};

#if NF4_ISA >= NF4_ISA_AVX512_BF16
struct BFloatMath {
  using Element = BFloat;
  static constexpr int kDepth = 2;
  static constexpr int kBlock = 256;
  static F multiply_add(const BFloat* a, const uint32_t* b, F c) {
    int pair;
    std::memcpy(&pair, a, sizeof pair);
    return dot_pairs(c, splat(pair), load_words(b));
  }
};
#endif

template <class Math>
constexpr int kSteps = Math::kBlock / Math::kDepth;  // 32-bit lanes of a full depth block

struct Product {
  Operand a;  // [rows, depth]
  Operand b;  // [columns, depth] when transposed, else [depth, columns]
  int64_t rows;
  int64_t depth;
  bool transposed;
};

// Memory of one task, inside its thread's scratch.
template <class Math>
struct Workspace {
  static constexpr int kRowStride = kSteps<Math> + 16;  // off the power of two: L1 set conflicts
  alignas(64) float c[kTaskRows * kTaskColumns];
  alignas(64) uint32_t panel[kSteps<Math> * kPanelColumns];
  alignas(64) uint32_t rows[kWidth * kRowStride];
  alignas(64) uint32_t a[kTaskRows * kSteps<Math>];
};

// C[kRows, kVectors * kWidth] (+)= A panel.
template <class Math, int kRows, int kVectors>
void tile(const typename Math::Element* a, int64_t lda, const uint32_t* panel, int64_t steps,
          float* c, bool fresh) {
  F acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] =
            Math::multiply_add(a + r * lda + s * Math::kDepth, panel + v * kWidth, acc[r][v]);
      }
    }
    panel += kPanelColumns;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + r * kTaskColumns + v * kWidth;
      store(out, fresh ? acc[r][v] : add(load(out), acc[r][v]));
    }
  }
}

template <class Math, int kRows, int kVectors>
void last_tile(const typename Math::Element* a, int64_t lda, const uint32_t* panel, int64_t steps,
               float* c, bool fresh, int64_t rows) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<Math, kRows, kVectors>(a, lda, panel, steps, c, fresh);
    last_tile<Math, kRows - 1, kVectors>(a, lda, panel, steps, c, fresh, rows);
  }
}

template <class Math, int kVectors>
void tiles(const typename Math::Element* a, int64_t lda, int64_t rows, const uint32_t* panel,
           int64_t steps, float* c, bool fresh) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    tile<Math, kTileRows, kVectors>(a + r * lda, lda, panel, steps, c + r * kTaskColumns, fresh);
  }
  last_tile<Math, kTileRows - 1, kVectors>(a + r * lda, lda, panel, steps, c + r * kTaskColumns,
                                           fresh, rows - r);
}

// Rows [column, column + columns) of B, depth [first, first + depth), as panel[step][column].
template <class Math>
void pack_transposed(const Operand& b, int64_t column, int64_t columns, int64_t first,
                     int64_t depth, Workspace<Math>& w) {
  const int64_t steps = ceil_div(depth, Math::kDepth), padded = round_up(steps, kWidth);
  for (int64_t group = 0; group < columns; group += kWidth) {
    for (int64_t i = 0; i < kWidth; ++i) {
      uint32_t* row = w.rows + i * Workspace<Math>::kRowStride;
      if (group + i < columns) {
        row[steps - 1] = 0;  // half of it stays so when the depth is odd
        read(b, column + group + i, first, depth, reinterpret_cast<typename Math::Element*>(row));
        for (int64_t s = steps; s < padded; ++s) row[s] = 0;
      } else {
        for (int64_t s = 0; s < padded; ++s) row[s] = 0;
      }
    }
    for (int64_t s = 0; s < padded; s += kWidth) {
      transpose(w.rows + s, Workspace<Math>::kRowStride, w.panel + s * kPanelColumns + group,
                kPanelColumns);
    }
  }
}

// Rows [first, first + depth) of B, columns [column, column + columns), as panel[step][column].
template <class Math>
void pack_rows(const Operand& b, int64_t column, int64_t columns, int64_t first, int64_t depth,
               Workspace<Math>& w) {
  const int64_t padded = round_up(columns, kWidth);
  using Element = typename Math::Element;
  for (int64_t s = 0; s * Math::kDepth < depth; ++s) {
    uint32_t* out = w.panel + s * kPanelColumns;
    const int64_t row = first + s * Math::kDepth;
    if constexpr (Math::kDepth == 1) {
      read(b, row, column, columns, reinterpret_cast<Element*>(out));
    } else {
      Element pair[2][kPanelColumns] = {};
      read(b, row, column, columns, pair[0]);
      if (s * 2 + 1 < depth) read(b, row + 1, column, columns, pair[1]);
      for (int64_t i = 0; i < columns; ++i) {
        out[i] = static_cast<uint32_t>(pair[1][i].bits) << 16 | pair[0][i].bits;
      }
    }
    for (int64_t i = columns; i < padded; ++i) out[i] = 0;
  }
}

template <class Element>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<BFloat> = DType::kBFloat16;

// w.c (+)= the product's rows [row, row + rows), columns [column, column + columns).
template <class Math>
void accumulate(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                bool fresh, Workspace<Math>& w) {
  using Element = typename Math::Element;
  // A pair must not reach into the next row, so an odd depth is copied and padded.
  const bool direct = p.a.dense.dtype == kDTypeOf<Element> && p.a.dropout.multiplier == 0.0f &&
                      p.depth % Math::kDepth == 0;
  // A few rows are compared with dot products, which BLAS sums in many short chains: do as well.
  const int64_t block = p.rows < kTileRows ? 32 : Math::kBlock;
  for (int64_t first = 0; first < p.depth; first += block) {
    const int64_t depth = min(block, p.depth - first);
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
        pack_transposed(p.b, column + i, width, first, depth, w);
      } else {
        pack_rows(p.b, column + i, width, first, depth, w);
      }
      float* c = w.c + i;
      if (width <= kWidth) {
        tiles<Math, 1>(a, lda, rows, w.panel, steps, c, fresh);
      } else if (width <= 2 * kWidth) {
        tiles<Math, 2>(a, lda, rows, w.panel, steps, c, fresh);
      } else {
        tiles<Math, kTileVectors>(a, lda, rows, w.panel, steps, c, fresh);
      }
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
  // Few columns (a LoRA rank): cut the rows finer, so that there is work for every thread.
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

// Calls fn with the arithmetic for activations of this dtype: bfloat16 products where the
// instruction set has them and x is bfloat16, else float32.
template <class Fn>
void with_math([[maybe_unused]] DType dtype, const Fn& fn) {
#if NF4_ISA >= NF4_ISA_AVX512_BF16
  if (dtype == DType::kBFloat16) return fn(BFloatMath{});
#endif
  fn(FloatMath{});
}

}  // namespace
}  // namespace nf4::cpu
