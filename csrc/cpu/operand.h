// Matmul operands: dense or quantized matrices that are read, decoded and converted in pieces.
#pragma once

#include "byte_planes.h"
#include "dequantize.h"
#include "dropout.h"

namespace nf4::cpu {
namespace {

// A row-major matrix with `columns` columns: quantized where weight is set, else dense.
struct Operand {
  const Weight* weight = nullptr;
  Matrix dense = {};
  int64_t columns = 0;
  Dropout dropout = {};  // of a dense matrix
};

inline Operand dense(Matrix matrix, int64_t columns, Dropout dropout = {}) {
  return {nullptr, matrix, columns, dropout};
}
inline Operand quantized(const Weight& weight, int64_t columns) {
  return {&weight, {}, columns, {}};
}

template <class T>
inline void convert(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}
template <class T>
inline void convert(const T* in, int64_t count, BFloat* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(in + i));
  for (; i < count; ++i) from_float(to_float(in[i]), out + i);
}
inline void convert(const BFloat* in, int64_t count, BFloat* out) {
  std::memcpy(out, in, static_cast<size_t>(count) * sizeof *in);
}

template <class T>
inline void convert(const Matrix& matrix, int64_t first, int64_t count, T* out) {
  with_type(matrix.dtype, [&](auto* type) {
    convert(static_cast<decltype(type)>(const_cast<void*>(matrix.data)) + first, count, out);
  });
}

// Row `row`, columns [column, column + count) as float or BFloat.
inline void read(const Operand& o, int64_t row, int64_t column, int64_t count, float* out) {
  const int64_t first = row * o.columns + column;
  if (o.weight) return decode_range(*o.weight, first, count, out);
  convert(o.dense, first, count, out);
  if (o.dropout.multiplier != 0.0f) apply_dropout(o.dropout, first, count, out);
}
inline void read(const Operand& o, int64_t row, int64_t column, int64_t count, BFloat* out) {
  const int64_t first = row * o.columns + column;
  if (o.weight) return decode_range(*o.weight, first, count, out);
  convert(o.dense, first, count, out);
}

}  // namespace
}  // namespace nf4::cpu
