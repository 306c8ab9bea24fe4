// Quantization: 4-bit and 8-bit blockwise, and double quantization of the scales.
#pragma once

#include "formats.h"
#include "simd.h"

namespace nf4::cpu {
namespace {

// Elements whose ranks are held at once; a multiple of every kPackStep.
constexpr int64_t kQuantizeStep = 256;

// Bits of the largest magnitude of x[0..count), NaN if there is one.
template <class T>
float block_absmax(const T* x, int64_t count) {
  I best = splat(0);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) best = max(best, magnitude_bits(load(x + i)));
  uint32_t bits = static_cast<uint32_t>(reduce_max(best));
  for (; i < count; ++i) {
    const uint32_t b = float_bits(to_float(x[i])) & 0x7fffffff;
    bits = b > bits ? b : bits;
  }
  return bits_float(bits);
}

// Tree leaf of every element of v = x * scale, or x / scale: 16 + rank or 256 + rank, low byte.
template <class T>
void rank_elements(const T* x, int64_t count, float scale, bool divide, const Format& format,
                   uint8_t* leaves) {
  const F by = broadcast(scale);
  const Lookup16 tree16 = lookup16(format.tree);
  auto ranks = [&](F raw, uint8_t* out) {
    const F v = divide ? div(raw, by) : mul(raw, by);
    I node = splat(1);
    for (int level = 0; level < 4; ++level) node = descend(node, v, find(tree16, node));
    if (!format.four_bit) {
      for (int level = 4; level < 8; ++level) node = descend(node, v, gather(format.tree, node));
    }
    store_bytes(out, node);
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) ranks(load(x + i), leaves + i);
  if (i < count) {
    T last[kWidth] = {};
    uint8_t out[kWidth];
    const auto rest = static_cast<size_t>(count - i);
    std::memcpy(last, x + i, rest * sizeof *x);
    ranks(load(last), out);
    std::memcpy(leaves + i, out, rest);
  }
}

// One block. packed points at the byte of its first element: blocks have an even size.
template <class T>
void quantize_block(const T* x, int64_t count, bool is_short, const Format& format, uint8_t* packed,
                    float* absmax) {
  float largest = block_absmax(x, count);
  // NaN stays NaN: the comparison is false.
  const float floored = largest < NF4_ABSMAX_FLOOR ? NF4_ABSMAX_FLOOR : largest;
  const bool divide = is_short && format.four_bit;
  if (divide) largest = floored;
  *absmax = largest;
  const float scale = divide ? floored : 1.0f / floored;
  if (!format.four_bit) return rank_elements(x, count, scale, false, format, packed);
  alignas(64) uint8_t leaves[kQuantizeStep];
  for (int64_t i = 0; i < count; i += kQuantizeStep) {
    const int64_t n = min(kQuantizeStep, count - i);
    rank_elements(x + i, n, scale, divide, format, leaves);
    uint8_t* out = packed + i / 2;
    int64_t j = 0;
    for (; j + kPackStep <= n; j += kPackStep) pack_nibbles(leaves + j, format.order, out + j / 2);
    for (; j < n; j += 2) {
      const uint8_t second = j + 1 < n ? format.order[leaves[j + 1] & 15] : format.zero_code;
      out[j / 2] = static_cast<uint8_t>(format.order[leaves[j] & 15] << 4 | second);
    }
  }
}

void quantize(Matrix x, int64_t numel, int block_shift, int format_id, uint8_t* packed,
              float* absmax) {
  const Format format = format_of(format_id);
  const int64_t block_size = int64_t{1} << block_shift;
  const int64_t blocks = ceil_div(numel, block_size);
  const int64_t per_task = max(1, (int64_t{1} << 15) >> block_shift);  // 32k elements
  with_type(x.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(x.data));
    parallel_for(ceil_div(blocks, per_task), [&](int64_t task) {
      const int64_t end = min(blocks, (task + 1) * per_task);
      for (int64_t b = task * per_task; b < end; ++b) {
        const int64_t first = b << block_shift;
        const int64_t count = min(block_size, numel - first);
        quantize_block(data + first, count, count < block_size, format,
                       packed + (format.four_bit ? first / 2 : first), absmax + b);
      }
    });
  });
}

// Sum of up to 256 values in index order, in float64.
double chunk_sum(const float* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<double>(values[i]);
  return total;
}

// The sums of kChunks whole chunks side by side: each is a serial chain of additions.
template <int kChunks>
void chunk_sums(const float* values, double* sums) {
  double total[kChunks] = {};
  for (int64_t i = 0; i < NF4_OFFSET_CHUNK; ++i) {
    for (int c = 0; c < kChunks; ++c) {
      total[c] += static_cast<double>(values[c * NF4_OFFSET_CHUNK + i]);
    }
  }
  for (int c = 0; c < kChunks; ++c) sums[c] = total[c];
}

float mean(const float* values, int64_t count) {
  constexpr int kGroup = 8;
  double total = 0.0;
  int64_t i = 0;
  for (; i + kGroup * NF4_OFFSET_CHUNK <= count; i += kGroup * NF4_OFFSET_CHUNK) {
    double sums[kGroup];
    chunk_sums<kGroup>(values + i, sums);
    for (double s : sums) total += s;
  }
  for (; i < count; i += NF4_OFFSET_CHUNK) {
    total += chunk_sum(values + i, min(NF4_OFFSET_CHUNK, count - i));
  }
  return static_cast<float>(total / static_cast<double>(max(count, 1)));
}

void double_quantize(const float* absmax, int64_t blocks, uint8_t* codes, float* nested_absmax,
                     float* offset) {
  const Format format = format_of(NF4_FORMAT_DYNAMIC8);
  const float center = mean(absmax, blocks);
  *offset = center;
  constexpr int64_t kPerTask = 32;  // nested blocks
  parallel_for(ceil_div(blocks, kPerTask * kNestedBlock), [&](int64_t task) {
    const int64_t end = min(blocks, (task + 1) * kPerTask * kNestedBlock);
    for (int64_t first = task * kPerTask * kNestedBlock; first < end; first += kNestedBlock) {
      const int64_t count = min(kNestedBlock, blocks - first);
      float centered[kNestedBlock];
      for (int64_t i = 0; i < count; ++i) centered[i] = absmax[first + i] - center;
      quantize_block(centered, count, count < kNestedBlock, format, codes + first,
                     nested_absmax + (first >> kNestedShift));
    }
  });
}

}  // namespace
}  // namespace nf4::cpu
