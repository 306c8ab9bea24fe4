// y = x W^T + bias and dx = grad_y W, with W decoded in tiles.
#pragma once

#include "stream.h"

namespace nf4::cpu {
namespace {

// Adds the bias to a tile of C and writes it to columns [column, ...) of out [m, n].
inline void finish(float* c, int64_t row, int64_t rows, int64_t column, int64_t columns,
                   const Matrix& bias, DType dtype, void* out, int64_t n) {
  float added[kTaskColumns];
  if (bias.data) convert(bias, column, columns, added);
  for (int64_t r = 0; r < rows; ++r, c += kTaskColumns) {
    if (bias.data) {
      for (int64_t i = 0; i < columns; ++i) c[i] += added[i];
    }
    write_row(c, columns, dtype, out, (row + r) * n + column);
  }
}

// out [m, n] = the sum of the products, plus the bias.
inline void multiply(const Product* products, int count, const Matrix& bias, DType dtype, int64_t m,
                     int64_t n, void* out) {
  with_math(dtype, [&](auto math) {
    using Math = decltype(math);
    if (m > 0 && can_stream(products[0])) {
      const auto write = [&](int64_t column, int64_t columns, Workspace<Math>& w) {
        for (int i = 1; i < count; ++i) {
          accumulate<Math>(products[i], 0, m, column, columns, false, w);
        }
        finish(w.c, 0, m, column, columns, bias, dtype, out, n);
      };
      return stream<Math>(products[0], n, write);
    }
    for_tiles<Math>(
        m, n, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, Workspace<Math>& w) {
          for (int i = 0; i < count; ++i) {
            accumulate<Math>(products[i], row, rows, column, columns, i == 0, w);
          }
          finish(w.c, row, rows, column, columns, bias, dtype, out, n);
        });
  });
}

void linear(Matrix x, const Weight& weight, Matrix bias, int64_t m, int64_t n, int64_t k, void* y) {
  const Product base{dense(x, k), quantized(weight, k), m, k, true};
  multiply(&base, 1, bias, x.dtype, m, n, y);
}

void linear_backward(Matrix grad_y, const Weight& weight, int64_t m, int64_t n, int64_t k,
                     void* dx) {
  const Product base{dense(grad_y, n), quantized(weight, k), m, n, false};
  multiply(&base, 1, {}, grad_y.dtype, m, k, dx);
}

}  // namespace
}  // namespace nf4::cpu
