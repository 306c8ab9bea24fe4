// The matmul for the fewest rows of x: a row of W is read front to back with lanes along the row,
// which needs no transposition and gives the memory one plain stream. Very long rows are cut
// into segments.
#pragma once

#include "gemm.h"

namespace nf4::cpu {
namespace {

// Rows of W taken together, so that x is loaded from the cache half as often.
constexpr int kDotColumns = 2;

// `columns` of C: a single one has no partner.
template <class Math>
bool can_dot(const Product& p, int64_t columns) {
  return p.transposed && p.rows <= Math::kDotRows && columns % kDotColumns == 0 &&
         has_row_groups(p.b);
}

// Most elements of a segment. From half to four times as many, up to four rows of x of 14336 to
// 53248 columns took 1.04x to 1.2x as long (Zen 4; x then comes from L2, which costs less than to
// start more often).
constexpr int64_t kSegment = 16384;

// x in the order that the nibbles of kWidth dwords come in: [chunk][row][part][lane], zero-padded.
template <class Math>
void arrange_dots(const Product& p, uint32_t* out) {
  using Element = typename Math::Element;
  constexpr int kWords = kChunk / Math::kDepth;
  alignas(64) uint32_t chunk[kWords];
  for (int64_t first = 0; first < p.depth; first += kChunk) {
    const int64_t count = min(kChunk, p.depth - first);
    for (int64_t r = 0; r < p.rows; ++r, out += kWords) {
      std::memset(chunk, 0, sizeof chunk);
      Math::arrange(p.a.dense, r * p.depth + first, count, reinterpret_cast<Element*>(chunk));
      for (int lane = 0; lane < kWidth; ++lane) {
        for (int part = 0; part < Math::kParts; ++part) {
          out[part * kWidth + lane] = chunk[lane * Math::kParts + Math::lane_of_part(part)];
        }
      }
    }
  }
}

// sums[i][r] = x's row r times row i of W.
template <class Math, int kRows>
void dot_block(const uint8_t* packed,              // kDotColumns rows of depth / 2
               int64_t row_bytes,                  // from one row to the next
               int64_t depth,                      //
               const uint32_t* x,                  // [chunk][kRows][kParts][kWidth]
               const typename Math::Codes& codes,  //
               const float* scales,                // [kDotColumns, scale_stride]
               int64_t scale_stride, int block_shift, I scale_of_lane,
               int64_t skew,  // elements of the first block before the segment
               float (*sums)[kRows]) {
  constexpr int kWords = kChunk / Math::kDepth;
  F total[kDotColumns][kRows];
  for (auto& row : total) {
    for (F& t : row) t = zero();
  }
  const auto step = [&](const uint8_t* bytes, int64_t stride,
                        int64_t first) __attribute__((always_inline)) {
    I lanes[kDotColumns];
    F sum[kDotColumns][kRows];
    for (int i = 0; i < kDotColumns; ++i) {
      lanes[i] = load_dwords(bytes + i * stride);
      for (F& s : sum[i]) s = zero();
    }
#pragma GCC unroll 8
    for (int part = 0; part < Math::kParts; ++part) {
      typename Math::Vector w[kDotColumns];
      for (int i = 0; i < kDotColumns; ++i) w[i] = Math::part(codes, lanes[i], part);
      for (int r = 0; r < kRows; ++r) {
        const auto a = Math::load_b(x + r * kWords + part * kWidth);
        for (int i = 0; i < kDotColumns; ++i) sum[i][r] = Math::multiply_add(a, w[i], sum[i][r]);
      }
    }
    for (int i = 0; i < kDotColumns; ++i) {
      const float* of_chunk = scales + i * scale_stride + ((skew + first) >> block_shift);
      const F scale = find4(of_chunk, scale_of_lane);
      for (int r = 0; r < kRows; ++r) total[i][r] = fma(sum[i][r], scale, total[i][r]);
    }
    x += kRows * kWords;
  };
  int64_t first = 0;
  // Whole rows follow each other in memory. To which cache their bytes come ahead of use depends on
  // the first level's size: into 48 KiB beside at most 32 KiB of x, 8 KiB ahead (Zen 5: up to 1.5x
  // faster than other distances or L2); else into L2, 12 KiB ahead (Zen 4: 1.25x faster than L1).
  // Of segments, the same columns of later rows come to L2.
  const bool whole = depth == 2 * row_bytes;
  const int64_t x_bytes = depth * kRows * static_cast<int64_t>(sizeof(typename Math::Element));
  const bool near = whole && x_bytes <= 32 << 10 && l1_bytes() >= 40 << 10;
  const int64_t ahead = near ? 8192 : 12288;
  const uint8_t* next = packed + (whole ? ahead : kDotColumns * row_bytes * ceil_div(ahead, depth));
  const int64_t fetch_step = whole ? kDotColumns : 1, fetch_stride = whole ? kChunk / 2 : row_bytes;
  for (; first + kChunk <= depth; first += kChunk, next += fetch_step * kChunk / 2) {
    for (int i = 0; i < kDotColumns; ++i) {
      const uint8_t* line = next + i * fetch_stride;
      near ? __builtin_prefetch(line, 0, 3) : __builtin_prefetch(line, 0, 2);
    }
    step(packed + first / 2, row_bytes, first);
  }
  if (first < depth) {
    alignas(64) uint8_t rest[kDotColumns][kChunk / 2] = {};
    for (int i = 0; i < kDotColumns; ++i) {
      std::memcpy(rest[i], packed + i * row_bytes + first / 2,
                  static_cast<size_t>(depth - first) / 2);
    }
    step(rest[0], kChunk / 2, first);
  }
  for (int i = 0; i < kDotColumns; ++i) {
    for (int r = 0; r < kRows; ++r) sums[i][r] = sum(total[i][r]);
  }
}

template <class Math, int kRows>
void dot_rows(const Product& p, const uint32_t* x, int64_t column, int64_t columns, float* scales,
              float* c) {
  const Weight& weight = *p.b.weight;
  const auto codes = Math::codes(format_of(weight.format));
  const int64_t row_bytes = p.depth / 2, blocks = p.depth >> weight.block_shift;
  const int64_t block_mask = (int64_t{1} << weight.block_shift) - 1;
  const int64_t scale_stride = blocks + 4;  // what find4 reads past the last
  int32_t lane_scales[kWidth];
  for (int i = 0; i < kWidth; ++i) lane_scales[i] = (8 * i) >> weight.block_shift;
  const I scale_of_lane = load_dwords(lane_scales);
  // Segments of one length.
  const int64_t step = round_up(ceil_div(p.depth, ceil_div(p.depth, kSegment)), kChunk);
  for (int64_t first = 0; first < p.depth; first += step) {
    const int64_t depth = min(step, p.depth - first);
    const int64_t first_block = first >> weight.block_shift;
    const int64_t end_block = (first + depth + block_mask) >> weight.block_shift;
    for (int64_t i = 0; i < columns; i += kDotColumns) {
      for (int64_t j = 0; j < kDotColumns; ++j) {
        const int64_t row_block = (column + i + j) * blocks;
        float* out = scales + j * scale_stride;
        read_scales(weight, row_block + first_block, end_block - first_block, out);
        // The lanes past a short last chunk multiply zeros by these; stale memory may hold NaN.
        std::memset(out + end_block - first_block, 0, 4 * sizeof(float));
      }
      float sums[kDotColumns][kRows];
      dot_block<Math, kRows>(weight.packed + (column + i) * row_bytes + first / 2, row_bytes, depth,
                             x + first / Math::kDepth * kRows, codes, scales, scale_stride,
                             weight.block_shift, scale_of_lane, first & block_mask, sums);
      for (int64_t j = 0; j < kDotColumns; ++j) {
        for (int r = 0; r < kRows; ++r) {
          float& out = c[r * kTaskColumns + i + j];
          out = first == 0 ? sums[j][r] : out + sums[j][r];
        }
      }
    }
  }
}

// c[rows, columns] = the product. x comes from arrange_dots.
template <class Math, int kRows = Math::kDotRows>
void dots(const Product& p, const uint32_t* x, int64_t column, int64_t columns, float* scales,
          float* c) {
  if constexpr (kRows > 0) {
    if (p.rows == kRows) return dot_rows<Math, kRows>(p, x, column, columns, scales, c);
    dots<Math, kRows - 1>(p, x, column, columns, scales, c);
  }
}

}  // namespace
}  // namespace nf4::cpu
