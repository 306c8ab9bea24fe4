// Panels: the decoded tiles of B that the register tiles run over.
#pragma once

#include "math.h"

namespace nf4::cpu {
namespace {

constexpr int kPanelColumns = kTileVectors * kWidth;
constexpr int kTaskColumns = 2 * kPanelColumns > 64 ? 2 * kPanelColumns : 64;
constexpr int64_t kTaskRows = 512;
constexpr int64_t kScaleBlocks = 64;  // of each row whose scales are decoded at once

// Memory of one task, inside its thread's scratch.
template <class Math>
struct Workspace {
  static constexpr int kRowStride = kSteps<Math> + 16;  // off the power of two: L1 set conflicts
  alignas(64) float c[kTaskRows * kTaskColumns];
  alignas(64) float scales[kScaleBlocks * kTaskColumns];
  alignas(64) uint32_t panel[kSteps<Math> * kPanelColumns];
  alignas(64) uint32_t rows[kWidth * kRowStride];
  alignas(64) uint32_t a[kTaskRows * kSteps<Math>];
};

// A 4-bit weight whose blocks do not cross rows can be read in groups of kWidth rows, one row a
// lane.
constexpr int kChunk = 8 * kWidth;  // elements of each row that a group holds at once

inline bool has_row_groups(const Operand& b) {
  if (!b.weight || !format_of(b.weight->format).four_bit) return false;
  const int64_t block_size = int64_t{1} << b.weight->block_shift;
  return b.columns % block_size == 0;
}

// dst[d * kWidth + r]: the 8 nibbles of row `row + r` at element first + 8 d, for a whole chunk of
// which depth elements are read. Rows from `rows` on are zeros.
// Prefetches what lies `prefetch` bytes ahead in each row.
inline void load_nibbles(const Operand& b, int64_t row, int64_t rows, int64_t first, int64_t depth,
                         int64_t prefetch, uint32_t* dst) {
  const int64_t row_bytes = b.columns / 2;
  const uint8_t* src = b.weight->packed + row * row_bytes + first / 2;
  if (rows >= kWidth && depth >= kChunk) {
    for (int64_t r = 0; prefetch > 0 && r < kWidth; ++r) {
      __builtin_prefetch(src + r * row_bytes + prefetch, 0, 2);
    }
    return transpose(reinterpret_cast<const uint32_t*>(src), row_bytes / 4, dst, kWidth);
  }
  alignas(64) uint32_t staged[kWidth * kWidth] = {};
  for (int64_t r = 0; r < min(rows, kWidth); ++r) {
    std::memcpy(staged + r * kWidth, src + r * row_bytes,
                static_cast<size_t>(min(depth, kChunk) / 2));
  }
  transpose(staged, kWidth, dst, kWidth);
}

// out[0..kWidth) = the scales of blocks [block, block + kWidth).
inline void read_scales(const Weight& w, int64_t block, float* out) {
  if (w.absmax) return store(out, load(w.absmax + block));
  const int64_t nested = block >> kNestedShift;
  if (nested != (block + kWidth - 1) >> kNestedShift) {
    for (int i = 0; i < kWidth; ++i) out[i] = block_scale(w, block + i);
    return;
  }
  const F codes = lookup256(kDynamic8Codes, load_bytes(w.codes + block));
  store(out, add(mul(codes, broadcast(w.nested_absmax[nested])), broadcast(w.offset)));
}

// out[0..count) = the scales of blocks [block, block + count).
inline void read_scales(const Weight& w, int64_t block, int64_t count, float* out) {
  int64_t i = 0;
#if NF4_ISA >= NF4_ISA_AVX512_BF16
  // Groups of kWidth that start at a multiple of it share a nested block.
  for (; !w.absmax && block % kWidth == 0 && i < count; i += 64) {
    const int64_t codes = min(64, count - i);
    F values[4];
    look_up(kSignedPlanes, w.codes + block + i, values, codes);
    for (int64_t j = 0; j < codes; j += kWidth) {
      const F by = broadcast(w.nested_absmax[(block + i + j) >> kNestedShift]);
      store(out + i + j, min(kWidth, codes - j),
            add(mul(values[j / kWidth], by), broadcast(w.offset)));
    }
  }
#endif
  for (; i + kWidth <= count; i += kWidth) read_scales(w, block + i, out + i);
  for (; i < count; ++i) out[i] = block_scale(w, block + i);
}

// dst[i * stride + r] = the scale of block first + i of row `row + r`, r < kWidth. Rows from `rows`
// on get zeros.
inline void load_scales(const Operand& b, int64_t row, int64_t rows, int64_t first, int64_t count,
                        float* dst, int64_t stride) {
  const Weight& w = *b.weight;
  const int64_t row_blocks = b.columns >> w.block_shift;
  alignas(64) float staged[kWidth * kScaleBlocks] = {};
  for (int64_t i = 0; i < count; i += kScaleBlocks) {
    const int64_t n = min(kScaleBlocks, count - i);
    for (int64_t r = 0; r < min(rows, kWidth); ++r) {
      const int64_t block = (row + r) * row_blocks + first + i;
      read_scales(w, block, n, staged + r * kScaleBlocks);
    }
    for (int64_t j = 0; j < n; j += kWidth) {
      const auto* in = reinterpret_cast<const uint32_t*>(staged + j);
      auto* out = reinterpret_cast<uint32_t*>(dst + (i + j) * stride);
      if (j + kWidth <= n) {
        transpose(in, kScaleBlocks, out, stride);
        continue;
      }
      alignas(64) uint32_t turned[kWidth * kWidth];
      transpose(in, kScaleBlocks, turned, kWidth);
      for (int64_t t = 0; t < n - j; ++t) {
        std::memcpy(out + t * stride, turned + t * kWidth, kWidth * sizeof *out);
      }
    }
  }
}

// pack_transposed for weights with row groups: the nibbles are transposed before they are decoded,
// which is a quarter to an eighth of the data.
template <class Math>
void pack_row_groups(const Operand& b, int64_t column, int64_t columns, int64_t first,
                     int64_t depth, const float* scales, Workspace<Math>& w) {
  const Lookup16 codes = lookup16(format_of(b.weight->format).codes);
  const int shift = b.weight->block_shift;
  const int64_t first_block = first >> shift;
  alignas(64) uint32_t nibbles[kWidth * kWidth];
  for (int64_t group = 0; group < columns; group += kWidth) {
    const int64_t rows = columns - group;
    for (int64_t chunk = 0; chunk < depth; chunk += kChunk) {
      load_nibbles(b, column + group, rows, first + chunk, depth - chunk, Math::kBlock / 2,
                   nibbles);
      for (int64_t d = 0; d < min(kWidth, (depth - chunk) / 8); ++d) {
        const int64_t block = ((first + chunk + 8 * d) >> shift) - first_block;
        const F scale = load(scales + block * kTaskColumns + group);
        const I lanes = load_dwords(nibbles + d * kWidth);
        uint32_t* out = w.panel + (chunk + 8 * d) / Math::kDepth * kPanelColumns + group;
        for (int e = 0; e < 8; e += Math::kDepth) {
          Math::decode(codes, lanes, e, scale, out);
          out += kPanelColumns;
        }
      }
    }
  }
}

// w.scales[block][column] = those of all blocks that hold some of depth [first, first + depth), at
// most kScaleBlocks, for columns [column, column + columns) of a B with row groups.
template <class Math>
void pack_scales(const Operand& b, int64_t column, int64_t columns, int64_t first, int64_t depth,
                 Workspace<Math>& w) {
  const int shift = b.weight->block_shift;
  const int64_t first_block = first >> shift;
  const int64_t count = ((first + depth - 1) >> shift) - first_block + 1;
  for (int64_t group = 0; group < columns; group += kWidth) {
    load_scales(b, column + group, columns - group, first_block, count, w.scales + group,
                kTaskColumns);
  }
}

// Rows [column, column + columns) of B, depth [first, first + depth), as panel[step][column].
// scales: from pack_scales, of the first column and block, where B has row groups.
template <class Math>
void pack_transposed(const Operand& b, int64_t column, int64_t columns, int64_t first,
                     int64_t depth, const float* scales, Workspace<Math>& w) {
  if (scales) return pack_row_groups(b, column, columns, first, depth, scales, w);
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

// Reads pieces of rows, a panel wide. Where each lies in one block of a 4-bit weight, what
// decode_range would find out for every piece is known beforehand, and the piece `ahead` rows on,
// which no hardware prefetcher finds, is fetched.
struct PieceReader {
  const Operand& b;
  const int64_t column, columns, ahead;
  const bool one_block;
  const Lookup16 codes;

  PieceReader(const Operand& operand, int64_t from, int64_t count, int64_t rows_ahead)
      : b(operand),
        column(from),
        columns(count),
        ahead(rows_ahead * operand.columns),
        one_block(count == kPanelColumns && from % kPanelColumns == 0 && has_row_groups(operand) &&
                  int64_t{1} << operand.weight->block_shift >= kPanelColumns),
        codes(lookup16(b.weight ? format_of(b.weight->format).codes : kNf4Codes)) {}

  template <class T>
  void operator()(int64_t row, T* out) const {
    if (!one_block) return read(b, row, column, columns, out);
    const Weight& w = *b.weight;
    const int64_t first = row * b.columns + column;
    __builtin_prefetch(w.packed + (first + ahead) / 2, 0, 2);
    if (w.codes) __builtin_prefetch(w.codes + ((first + ahead) >> w.block_shift), 0, 2);
    decode_nibbles<false>(w.packed, first, kPanelColumns, codes,
                          block_scale(w, first >> w.block_shift), out);
  }
};

// Rows [first, first + depth) of B, columns [column, column + columns), as panel[step][column].
template <class Math>
void pack_rows(const Operand& b, int64_t column, int64_t columns, int64_t first, int64_t depth,
               Workspace<Math>& w) {
  const int64_t padded = round_up(columns, kWidth);
  using Element = typename Math::Element;
  const PieceReader piece(b, column, columns, Math::kBlock);
  for (int64_t s = 0; s * Math::kDepth < depth; ++s) {
    uint32_t* out = w.panel + s * kPanelColumns;
    const int64_t row = first + s * Math::kDepth;
    if constexpr (Math::kDepth == 1) {
      piece(row, reinterpret_cast<Element*>(out));
    } else {
      alignas(64) Element pair[2][kPanelColumns];
      piece(row, pair[0]);
      if (s * 2 + 1 < depth) {
        piece(row + 1, pair[1]);
      } else {
        std::memset(pair[1], 0, sizeof pair[1]);
      }
      for (int64_t i = 0; i < columns; ++i) {
        out[i] = static_cast<uint32_t>(pair[1][i].bits) << 16 | pair[0][i].bits;
      }
    }
    for (int64_t i = columns; i < padded; ++i) out[i] = 0;
  }
}

}  // namespace
}  // namespace nf4::cpu
