// The products of a LoRA branch that read a whole activation: P = in basis, and W^T in, both of
// rank r, in one pass over `in` and in float32.
//
// A task owns some columns of `in`. It copies a few rows of them at a time to its L2, as float32
// with dropout applied, and runs the register tiles of gemm.h over the copy. Tasks see only a part
// of P's sums; those parts are added in the order of the columns, so results do not depend on the
// number of threads.
#pragma once

#include "gemm.h"

namespace nf4::cpu {
namespace {

struct LowRankPass {
  Operand in;  // [m, width], dense
  int64_t m;
  int64_t width;
  int64_t rank;

  // projected [m, rank] = factor * in * basis. Null: not wanted.
  float* projected;
  Operand basis;    // dense: [rank, width] when transposed, else [width, rank]
  bool transposed;  //
  float factor;

  const float* weights;  // [rank, m] for weights * in. Null: not wanted.
};

constexpr int64_t kPassColumns = 256;
constexpr int64_t kPassRows = 64;
constexpr int64_t kMostParts = 16;  // of P: each is as large as P

// out[i][j] = basis of column `column + i` of `in`, j < rank, with zeros up to out's row length.
inline void pack_basis(const LowRankPass& pass, int64_t column, int64_t columns, int64_t row_length,
                       float* out) {
  if (!pass.transposed) {
    for (int64_t i = 0; i < columns; ++i, out += row_length) {
      read(pass.basis, column + i, 0, pass.rank, out);
      for (int64_t j = pass.rank; j < row_length; ++j) out[j] = 0.0f;
    }
    return;
  }
  alignas(64) float staged[kWidth * kPassColumns];
  for (int64_t group = 0; group < pass.rank; group += kWidth) {
    for (int64_t j = 0; j < kWidth; ++j) {
      float* row = staged + j * kPassColumns;
      if (group + j < pass.rank) {
        read(pass.basis, group + j, column, columns, row);
      } else {
        std::memset(row, 0, static_cast<size_t>(columns) * sizeof *row);
      }
    }
    for (int64_t i = 0; i < columns; i += kWidth) {
      transpose(reinterpret_cast<const uint32_t*>(staged + i), kPassColumns,
                reinterpret_cast<uint32_t*>(out + i * row_length + group), row_length);
    }
  }
}

inline const uint32_t* as_panel(const float* b) { return reinterpret_cast<const uint32_t*>(b); }

// Columns [column, column + columns), at most kPassColumns: part [m, row_length] (+)= their share
// of P. Returns sums [rank, kPassColumns] = weights * in, which lie in `memory`.
inline const float* pass_columns(const LowRankPass& pass, int64_t column, int64_t columns,
                                 int64_t row_length, float* memory, float* part, bool fresh) {
  float* in = memory;
  float* basis = in + kPassRows * kPassColumns;
  float* sums = basis + kPassColumns * row_length;
  if (pass.m == 0) {
    std::memset(sums, 0, static_cast<size_t>(pass.rank * kPassColumns) * sizeof *sums);
  }
  if (part) pack_basis(pass, column, columns, row_length, basis);
  for (int64_t first = 0; first < pass.m; first += kPassRows) {
    const int64_t rows = min(kPassRows, pass.m - first);
    for (int64_t r = 0; r < rows; ++r) {
      read(pass.in, first + r, column, columns, in + r * kPassColumns);
    }
    for (int64_t s = 0; part && s < columns; s += kShortChain) {
      const int64_t steps = min(kShortChain, columns - s);
      for (int64_t j = 0; j < row_length; j += kPanelColumns) {
        tiles<FloatMath>(in + s, kPassColumns, rows, as_panel(basis + s * row_length + j),
                         row_length, min(kPanelColumns, row_length - j), steps,
                         part + first * row_length + j, row_length, fresh && s == 0);
      }
    }
    for (int64_t i = 0; pass.weights && i < columns; i += kPanelColumns) {
      tiles<FloatMath>(pass.weights + first, pass.m, pass.rank, as_panel(in + i), kPassColumns,
                       min(kPanelColumns, columns - i), rows, sums + i, kPassColumns, first == 0);
    }
  }
  return sums;
}

// Calls finish(column, columns, sums) for each piece of weights * in, with sums
// [rank, kPassColumns] of columns [column, column + columns).
template <class Finish>
void run(const LowRankPass& pass, const Finish& finish) {
  const int64_t m = pass.m, width = pass.width, row_length = round_up(pass.rank, kWidth);
  if (pass.rank == 0) return;
  const int64_t each =
      pass.projected ? round_up(ceil_div(width, kMostParts), kPassColumns) : kPassColumns;
  const int64_t tasks = ceil_div(width, each), part_size = m * row_length;
  const auto bytes = [](int64_t floats) { return floats * static_cast<int64_t>(sizeof(float)); };
  auto* parts =
      pass.projected ? static_cast<float*>(shared_scratch(bytes(tasks * part_size))) : nullptr;
  parallel_for(tasks, [&](int64_t task) {
    auto* memory = static_cast<float*>(
        scratch(bytes(kPassRows * kPassColumns + 2 * kPassColumns * row_length)));
    const int64_t begin = task * each, end = min(width, begin + each);
    for (int64_t column = begin; column < end; column += kPassColumns) {
      const int64_t columns = min(kPassColumns, end - column);
      const float* sums = pass_columns(pass, column, columns, row_length, memory,
                                       parts ? parts + task * part_size : nullptr, column == begin);
      if (pass.weights) finish(column, columns, sums);
    }
  });
  if (!pass.projected) return;
  parallel_for(ceil_div(m, kPassRows), [&](int64_t task) {
    for (int64_t r = task * kPassRows; r < min(m, (task + 1) * kPassRows); ++r) {
      for (int64_t j = 0; j < pass.rank; ++j) {
        float sum = 0.0f;
        for (int64_t t = 0; t < tasks; ++t) sum += parts[t * part_size + r * row_length + j];
        pass.projected[r * pass.rank + j] = pass.factor * sum;
      }
    }
  });
}

}  // namespace
}  // namespace nf4::cpu
