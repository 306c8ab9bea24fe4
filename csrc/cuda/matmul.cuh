// What the matmul kernels share on the host side: one description of a problem, forward or
// backward, and the entry points that api.h's launchers choose between (linear.cu).
#pragma once

#include "api.h"
#include "formats.cuh"
#include "philox.cuh"

namespace nf4::cuda {

// What one launch takes of weights that share x.
constexpr int kMaxMembers = 4;

// The LoRA term of an output: out += mask * scaling * left right^T, where left is float [m, r].
// Forward: left = s, right = b [n, r]. Backward: left = ds, right^T = a [r, k], masked.
struct Up {
  const float* left;  // null: no LoRA
  const void* right;
  int right_dtype;
  int r;
  float scaling;
  Dropout dropout;
};

// A down-projection: out [m, r] = scaling * dropout(in) right^T, with in [m, c] and right [r, c].
struct Down {
  const void* in;
  const void* right;
  float* out;  // null: nothing to do
  int64_t c;
  int r, right_dtype;
  float scaling;
  Dropout dropout;
};

// out [m, columns] = in [m, reduced] times the weight: forward columns = n, backward columns = k.
struct Matmul {
  const void* in;
  nf4_weight weight;
  const void* bias;  // of the element type; null: none
  void* out;
  int64_t m;
  int dtype;
  Up up;
  const Down* downs;  // what the same launch computes before it reads up.left: own, or of a group
  int down_count;
};

// Tensor cores (linear_tile.cu, backward_tile.cu): 16-bit elements, 4-bit formats, k % 64 == 0.
bool tile_forward_takes(const Matmul& p);
size_t tile_forward_workspace(const Matmul& p);
int tile_forward(const Matmul& p, void* workspace, cudaStream_t stream);
bool tile_backward_takes(const Matmul& p);
size_t tile_backward_workspace(const Matmul& p);
int tile_backward(const Matmul& p, void* workspace, cudaStream_t stream);

// The same for up to four weights that share `in` and m, in one launch (linear_group.cu).
bool group_forward_takes(const Matmul* members, int count);
size_t group_forward_workspace(const Matmul* members, int count);
int group_forward(const Matmul* members, int count, void* workspace, cudaStream_t stream);

// The same for few tokens, k % 256 == 0, and one weight or several that share `in`, k and format
// (linear_few.cu).
constexpr int64_t kFewTokens = 32;
bool few_forward_takes(const Matmul* members, int count);
size_t few_forward_workspace(const Matmul* members, int count);
int few_forward(const Matmul* members, int count, void* workspace, cudaStream_t stream);

// Hopper's tensor cores (hopper_tile.cu): 16-bit elements, every format, k % 8 == 0, many tokens.
// hopper_forward returns cudaErrorNotSupported, with nothing launched, where the driver encodes no
// tensor maps.
bool hopper_forward_takes(const Matmul& p);
size_t hopper_forward_workspace(const Matmul& p);
int hopper_forward(const Matmul& p, void* workspace, cudaStream_t stream);
// The same for dx (hopper_backward.cu): also n % 8 == 0, and more tokens.
bool hopper_backward_takes(const Matmul& p);
size_t hopper_backward_workspace(const Matmul& p);
int hopper_backward(const Matmul& p, void* workspace, cudaStream_t stream);

// Everything else, in float32 FMA (linear_general.cu).
int general_forward(const Matmul& p, cudaStream_t stream);
int general_backward(const Matmul& p, cudaStream_t stream);

// The narrow products of LoRA.
//
// One pass over in [m, c]. down_out [m, r] = down_scaling * in right, with right [c, r]; and
// outer_out = outer_scaling * left^T dropout(in), with left [m, r] float, stored [r, c] or, when
// transposed, [c, r]. Either may be null. Partial sums are added in order by a second kernel.
struct Pass {
  const void* in;
  int in_dtype;
  int64_t m, c;
  int r;
  const void* right;
  int right_dtype;
  float* down_out;
  float down_scaling;
  const float* left;
  void* outer_out;
  int outer_dtype;
  bool outer_transposed;
  float outer_scaling;
  Dropout dropout;  // for the outer product
};

// On tensor cores (lora_pass.cu): 16-bit elements, c % 8 == 0.
bool pass_takes(const Pass& p);
size_t tile_pass_workspace(const Pass& p);
int tile_pass(const Pass& p, void* workspace, cudaStream_t stream);

// In float32 FMA (lora_general.cu), for every dtype and shape.
int general_down(const Down& p, int in_dtype, int64_t m, cudaStream_t stream);
size_t general_pass_workspace(const Pass& p);
int general_pass(const Pass& p, void* workspace, cudaStream_t stream);

}  // namespace nf4::cuda
