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

// out [m, columns] = in [m, reduced] times the weight: forward columns = n, backward columns = k.
struct Matmul {
  const void* in;
  nf4_weight weight;
  const void* bias;  // of the element type; null: none
  void* out;
  int64_t m;
  int dtype;
  Up up;
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

// Hopper's tensor cores (hopper_tile.cu): 16-bit elements, every format, k % 8 == 0, many tokens.
// hopper_forward returns cudaErrorNotSupported, with nothing launched, where the driver encodes no
// tensor maps.
bool hopper_forward_takes(const Matmul& p);
size_t hopper_forward_workspace(const Matmul& p);
int hopper_forward(const Matmul& p, void* workspace, cudaStream_t stream);

// Everything else, in float32 FMA (linear_general.cu).
int general_forward(const Matmul& p, cudaStream_t stream);
int general_backward(const Matmul& p, cudaStream_t stream);

// The narrow products of LoRA (lora.cu). `down`: out [m, r] = scaling * dropout(in) right, with
// in [m, c] and right [r, c], or [c, r] when transposed. Several with the same m and dtypes go in
// one launch.
struct Down {
  const void* in;
  const void* right;
  float* out;
  int64_t c;
  int r;
  float scaling;
  Dropout dropout;
};
struct DownLaunch {
  int in_dtype, right_dtype;
  bool right_transposed;
  int64_t m;
};
int lora_down(const Down* members, int count, const DownLaunch& p, cudaStream_t stream);

// `outer`: out = scaling * left^T dropout(in), with left [m, r] float and in [m, c]; stored [r, c],
// or [c, r] when transposed. Partial sums over chunks of m are added in order by a second kernel.
struct Outer {
  const void* in;
  int in_dtype;
  const float* left;
  void* out;
  int out_dtype;
  bool out_transposed;
  int64_t m, c;
  int r;
  float scaling;
  Dropout dropout;
};
size_t lora_outer_workspace(const Outer& p);
int lora_outer(const Outer& p, void* workspace, cudaStream_t stream);

}  // namespace nf4::cuda
