// linear with a LoRA branch, forward and backward. The low-rank products run in float32, which
// costs about 2 % at rank 16; their sum joins the base matmul as extra steps of its depth.
#pragma once

#include "linear.h"
#include "low_rank.h"

namespace nf4::cpu {
namespace {

// A float array that lives for one call.
struct Floats {
  explicit Floats(int64_t count) : data(new float[static_cast<size_t>(count)]) {}
  ~Floats() { delete[] data; }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  Matrix matrix() const { return {data, DType::kFloat32}; }
  float* data;
};

// out [columns, rows] = factor * in^T.
inline void scaled_transpose(const float* in, int64_t rows, int64_t columns, float factor,
                             float* out) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * rows + r] = factor * in[r * columns + c];
  }
}

void linear_lora(Matrix x, const Weight& weight, Matrix bias, const Lora& lora, int64_t m,
                 int64_t n, int64_t k, void* y, float* s) {
  const int64_t rank = lora.rank;
  run({dense(x, k, lora.dropout), m, k, rank, s, dense(lora.a, k), true, 1.0f, nullptr},
      [](int64_t, int64_t, const float*) {});
  Floats scaled_s(m * rank);
  for (int64_t i = 0; i < m * rank; ++i) scaled_s.data[i] = lora.scaling * s[i];
  const Product products[] = {
      {dense(x, k), quantized(weight, k), m, k, true},
      {dense(scaled_s.matrix(), rank), dense(lora.b, rank), m, rank, true},
  };
  multiply(products, 2, bias, x.dtype, m, n, y);
}

// dx = mask(ds a) + grad_y W. The low-rank product comes first: the mask must not touch the rest.
inline void lora_dx(const Matrix& grad_y, const Weight& weight, const Lora& lora, const Matrix& ds,
                    int64_t m, int64_t n, int64_t k, void* dx) {
  const Product branch{dense(ds, lora.rank), dense(lora.a, k), m, lora.rank, false};
  const Product base{dense(grad_y, n), quantized(weight, k), m, n, false};
  with_math(grad_y.dtype, [&](auto math) {
    using Math = decltype(math);
    for_tiles<Math>(
        m, k, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, Workspace<Math>& w) {
          accumulate<Math>(branch, row, rows, column, columns, true, w);
          if (lora.dropout.multiplier != 0.0f) {
            for (int64_t r = 0; r < rows; ++r) {
              apply_dropout(lora.dropout, (row + r) * k + column, columns, w.c + r * kTaskColumns);
            }
          }
          accumulate<Math>(base, row, rows, column, columns, false, w);
          finish(w.c, row, rows, column, columns, {}, grad_y.dtype, dx, k);
        });
  });
}

void linear_lora_backward(Matrix grad_y, Matrix x, const float* s, const Weight& weight,
                          const Lora& lora, int64_t m, int64_t n, int64_t k,
                          const LoraGradients& out) {
  const int64_t rank = lora.rank;
  Floats ds(m * rank), weights(m * rank);
  if (out.db) scaled_transpose(s, m, rank, lora.scaling, weights.data);
  run({dense(grad_y, n), m, n, rank, ds.data, dense(lora.b, rank), false, lora.scaling,
       out.db ? weights.data : nullptr},
      [&](int64_t column, int64_t columns, const float* sums) {
        Floats turned(columns * rank);
        for (int64_t i = 0; i < columns; ++i) {
          for (int64_t r = 0; r < rank; ++r) {
            turned.data[i * rank + r] = sums[r * kPassColumns + i];
          }
        }
        write_row(turned.data, columns * rank, lora.b.dtype, out.db, column * rank);
      });
  if (out.dx) lora_dx(grad_y, weight, lora, ds.matrix(), m, n, k, out.dx);
  if (!out.da) return;
  scaled_transpose(ds.data, m, rank, 1.0f, weights.data);
  run({dense(x, k, lora.dropout), m, k, rank, nullptr, {}, false, 1.0f, weights.data},
      [&](int64_t column, int64_t columns, const float* sums) {
        for (int64_t r = 0; r < rank; ++r) {
          write_row(sums + r * kPassColumns, columns, lora.a.dtype, out.da, r * k + column);
        }
      });
}

}  // namespace
}  // namespace nf4::cpu
