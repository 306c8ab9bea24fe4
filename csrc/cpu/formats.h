// Code tables of the storage formats in the form that the kernels search and look up.
#pragma once

#include <cstdint>

#include "nf4/codes.h"

namespace nf4::cpu {
namespace {

constexpr int64_t kNestedBlock = NF4_NESTED_BLOCK_SIZE;
constexpr int kNestedShift = 8;
static_assert(kNestedBlock == 1 << kNestedShift);

// Thresholds as an implicit binary tree (node i has children 2i and 2i + 1, root 1): from i = 1,
// `i = 2 * i + !(v <= node[i])` ends at kSize + rank after log2(kSize) steps. NaN gets the last
// rank.
template <int kSize>
struct ThresholdTree {
  float node[kSize] = {};
};

template <int kSize>
constexpr void fill_tree(ThresholdTree<kSize>& tree, const float* sorted, int first, int count,
                         int node) {
  if (count == 0) return;
  const int middle = count / 2;
  tree.node[node] = sorted[first + middle];
  fill_tree(tree, sorted, first, middle, 2 * node);
  fill_tree(tree, sorted, first + middle + 1, count - middle - 1, 2 * node + 1);
}

template <int kSize>
constexpr ThresholdTree<kSize> make_tree(const float (&sorted)[kSize - 1]) {
  ThresholdTree<kSize> tree;
  fill_tree(tree, sorted, 0, kSize - 1, 1);
  return tree;
}

alignas(64) constexpr float kNf4Codes[16] = NF4_NF4_CODES;
alignas(64) constexpr float kFp4Codes[16] = NF4_FP4_CODES;
alignas(64) constexpr float kDynamic8Codes[256] = NF4_DYNAMIC8_CODES;
alignas(64) constexpr float kDynamic8UnsignedCodes[256] = NF4_DYNAMIC8_UNSIGNED_CODES;
alignas(64) constexpr ThresholdTree<16> kNf4Tree = make_tree<16>(NF4_NF4_THRESHOLDS);
alignas(64) constexpr ThresholdTree<16> kFp4Tree = make_tree<16>(NF4_FP4_THRESHOLDS);
alignas(64) constexpr ThresholdTree<256> kDynamic8Tree = make_tree<256>(NF4_DYNAMIC8_THRESHOLDS);
alignas(64) constexpr ThresholdTree<256> kDynamic8UnsignedTree =
    make_tree<256>(NF4_DYNAMIC8_UNSIGNED_THRESHOLDS);
alignas(16) constexpr uint8_t kNf4Order[16] = NF4_NF4_ORDER;
alignas(16) constexpr uint8_t kFp4Order[16] = NF4_FP4_ORDER;

// Code of a zero: the number of thresholds below it, in code order.
constexpr uint8_t zero_code(const ThresholdTree<16>& tree, const uint8_t (&order)[16]) {
  int rank = 0;
  for (int i = 1; i < 16; ++i) rank += tree.node[i] < 0.0f;
  return order[rank];
}

struct Format {
  bool four_bit;
  const float* codes;    // [16] or [256], in code order
  const float* tree;     // [16] or [256]
  const uint8_t* order;  // [16] code of each rank; null for 8-bit formats, whose codes are ranks
  uint8_t zero_code;     // fills the last nibble of an odd count
};

inline Format format_of(int id) {
  switch (id) {
    case NF4_FORMAT_NF4:
      return {true, kNf4Codes, kNf4Tree.node, kNf4Order, zero_code(kNf4Tree, kNf4Order)};
    case NF4_FORMAT_FP4:
      return {true, kFp4Codes, kFp4Tree.node, kFp4Order, zero_code(kFp4Tree, kFp4Order)};
    case NF4_FORMAT_DYNAMIC8:
      return {false, kDynamic8Codes, kDynamic8Tree.node, nullptr, 0};
    default:
      return {false, kDynamic8UnsignedCodes, kDynamic8UnsignedTree.node, nullptr, 0};
  }
}

}  // namespace
}  // namespace nf4::cpu
