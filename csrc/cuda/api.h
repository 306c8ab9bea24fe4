// The C interface of the CUDA kernels: raw device pointers, a workspace and a stream.
//
// Every launcher returns a cudaError_t as int (0 is success; 801, cudaErrorNotSupported, for a
// dtype or format it does not take), allocates nothing, never synchronizes, and launches on the
// given stream of the current device only. A workspace is scratch memory of at least the bytes its
// query returns, aligned to 256; its contents need no preparation. Pointers are aligned to their
// element unless said otherwise; 16-byte alignment is faster and never required.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

enum { NF4_FLOAT32 = 0, NF4_FLOAT16 = 1, NF4_BFLOAT16 = 2 };

// A quantized weight [n, k]; see nf4/formats.py for the bytes.
typedef struct {
  const uint8_t* packed;
  const void* absmax;          // float[blocks], or uint8[blocks] when nested
  const float* nested_absmax;  // float[ceil(blocks / 256)], or null when not nested
  const float* offset;         // float[1], or null when not nested
  int64_t n;
  int64_t k;
  int32_t block_size;
  int32_t format;
} nf4_weight;

// A LoRA pair: a [r, k], b [n, r], both of one dtype; seed is null without dropout.
typedef struct {
  const void* a;
  const void* b;
  const int64_t* seed;
  double scaling;
  double dropout_p;
  int64_t r;
  int32_t dtype;
} nf4_lora;

// One of several weights that share x [m, k]: y [m, n] and s [m, r] are its outputs.
typedef struct {
  nf4_weight weight;
  const void* bias;  // [n] in x's dtype, or null
  nf4_lora lora;
  void* y;
  float* s;
} nf4_member;

// x [numel] -> packed, absmax [ceil(numel / block_size)].
int nf4_cuda_quantize(const void* x, int dtype, int64_t numel, int block_size, int format,
                      uint8_t* packed, float* absmax, cudaStream_t stream);

// absmax [count] -> codes [count], nested_absmax [ceil(count / 256)], offset [1].
size_t nf4_cuda_double_quantize_workspace(int64_t count);
int nf4_cuda_double_quantize(const float* absmax, int64_t count, uint8_t* codes,
                             float* nested_absmax, float* offset, void* workspace,
                             cudaStream_t stream);

// The first `numel` elements of the weight -> out [numel]; weight.n and weight.k are not read.
int nf4_cuda_dequantize(const nf4_weight* weight, int64_t numel, void* out, int dtype,
                        cudaStream_t stream);

// y [m, n] = x [m, k] W^T + bias [n] (null: none), in x's dtype.
size_t nf4_cuda_linear_workspace(const nf4_weight* weight, int64_t m, int dtype);
int nf4_cuda_linear(const void* x, const nf4_weight* weight, const void* bias, void* y, int64_t m,
                    int dtype, void* workspace, cudaStream_t stream);

// dx [m, k] = grad_y [m, n] W.
size_t nf4_cuda_linear_backward_workspace(const nf4_weight* weight, int64_t m, int dtype);
int nf4_cuda_linear_backward(const void* grad_y, const nf4_weight* weight, void* dx, int64_t m,
                             int dtype, void* workspace, cudaStream_t stream);

// y = x W^T + bias + scaling * s b^T and s [m, r] = dropout(x) a^T in float.
size_t nf4_cuda_linear_lora_workspace(const nf4_weight* weight, const nf4_lora* lora, int64_t m,
                                      int dtype);
int nf4_cuda_linear_lora(const void* x, const nf4_weight* weight, const void* bias,
                         const nf4_lora* lora, void* y, float* s, int64_t m, int dtype,
                         void* workspace, cudaStream_t stream);

// The same for every member; their adapters have one dtype. All down-projections are one launch,
// and so are all matmuls of up to four members and of as many tokens as linear_tile.cuh takes.
size_t nf4_cuda_linear_lora_group_workspace(const nf4_member* members, int count, int64_t m,
                                            int dtype);
int nf4_cuda_linear_lora_group(const void* x, const nf4_member* members, int count, int64_t m,
                               int dtype, void* workspace, cudaStream_t stream);

// Gradients of linear_lora; dx, or da and db together, may be null when not wanted.
size_t nf4_cuda_linear_lora_backward_workspace(const nf4_weight* weight, const nf4_lora* lora,
                                               int64_t m, int dtype);
int nf4_cuda_linear_lora_backward(const void* grad_y, const void* x, const float* s,
                                  const nf4_weight* weight, const nf4_lora* lora, void* dx,
                                  void* da, void* db, int64_t m, int dtype, void* workspace,
                                  cudaStream_t stream);

// One parameter of an AdamW step, its gradient and its moments, all contiguous. absmax1 and absmax2
// are float[ceil(numel / 256)] and the states uint8[numel], or null and the states float[numel].
typedef struct {
  void* param;
  const void* grad;
  void* state1;
  void* state2;
  float* absmax1;
  float* absmax2;
  int64_t numel;
  int64_t offset;  // a multiple of 4: the parameter's first random word
  int32_t param_dtype;
  int32_t grad_dtype;
} nf4_adamw_param;

// The adamw_step of nf4/ops.py. `params` [count] is host memory and read before the call returns;
// hyper is float[8], seed null or one value, skipped one value, all on the device.
size_t nf4_cuda_adamw_step_workspace(int64_t count);
int nf4_cuda_adamw_step(const nf4_adamw_param* params, int64_t count, const float* hyper,
                        const int64_t* seed, int64_t* skipped, void* workspace,
                        cudaStream_t stream);

#if defined(__cplusplus)
}
#endif
