// The interface of the CPU kernels: plain structs and one table of functions per instruction set.
// No torch here: whoever links the library injects a thread pool with set_parallel.
#pragma once

#include <cstdint>

namespace nf4::cpu {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// A matrix quantized as nf4/formats.py describes, flattened in row-major order.
struct Weight {
  const uint8_t* packed;       // [ceil(numel * bits / 8)]
  const float* absmax;         // [blocks], null when nested
  const uint8_t* codes;        // [blocks] 8-bit codes of the scales, null when not nested
  const float* nested_absmax;  // [ceil(blocks / 256)], null when not nested
  float offset;                // added to every nested scale
  int block_shift;             // log2 of the block size
  int format;                  // NF4_FORMAT_*
};

// A row-major matrix; data may be null where a function says so.
struct Matrix {
  const void* data;
  DType dtype;
};

// Dropout of a matrix's elements, as nf4/ops.py defines it. Off when multiplier is 0.
struct Dropout {
  uint64_t seed;
  uint64_t threshold;  // an element is kept when its 32-bit Philox word is at least this
  float multiplier;    // of the elements kept: 1 / (1 - p)
};

struct Lora {
  Matrix a;  // [rank, k]
  Matrix b;  // [n, rank]
  int64_t rank;
  float scaling;
  Dropout dropout;  // of x
};

// Gradients that linear_lora_backward writes; a null pointer skips that one.
struct LoraGradients {
  void* dx;  // [m, k] in x's dtype
  void* da;  // [rank, k] in a's dtype
  void* db;  // [n, rank] in b's dtype
};

// The scalars of an AdamW step, in the order of the op's tensor: see nf4/optim/adamw.py.
struct AdamWScalars {
  float beta1, gain1, beta2, gain2, inverse_c2, eps, decay, step_size;
};

struct AdamWParam {
  void* param;  // [numel] of dtype
  DType dtype;
  Matrix grad;          // [numel]
  void* state1;         // [numel] uint8 codes, or float32 when absmax1 is null
  void* state2;         // the same
  float* absmax1;       // [ceil(numel / 256)] or null
  float* absmax2;       // the same
  int64_t numel;        //
  int64_t offset;       // of its first random word
  int64_t first_block;  // blocks of 256 elements in the parameters before it
};

struct KernelTable {
  const char* name;

  void (*quantize)(Matrix x,                     // [numel]
                   int64_t numel,                //
                   int block_shift,              //
                   int format,                   //
                   uint8_t* packed,              // [ceil(numel * bits / 8)]
                   float* absmax);               // [blocks]
  void (*double_quantize)(const float* absmax,   // [blocks]
                          int64_t blocks,        //
                          uint8_t* codes,        // [blocks]
                          float* nested_absmax,  // [ceil(blocks / 256)]
                          float* offset);        // [1]
  void (*dequantize)(const Weight& weight,       //
                     int64_t numel,              //
                     DType dtype,                //
                     void* out);                 // [numel]
  void (*linear)(Matrix x,                       // [m, k]
                 const Weight& weight,           // [n, k]
                 Matrix bias,                    // [n] or null
                 int64_t m, int64_t n, int64_t k,
                 void* y);                       // [m, n] in x's dtype
  void (*linear_backward)(Matrix grad_y,         // [m, n]
                          const Weight& weight,  // [n, k]
                          int64_t m, int64_t n, int64_t k,
                          void* dx);         // [m, k] in grad_y's dtype
  void (*linear_lora)(Matrix x,              // [m, k]
                      const Weight& weight,  // [n, k]
                      Matrix bias,           // [n] or null
                      const Lora& lora, int64_t m, int64_t n, int64_t k,
                      void* y,                        // [m, n] in x's dtype
                      float* s);                      // [m, rank]
  void (*linear_lora_backward)(Matrix grad_y,         // [m, n]
                               Matrix x,              // [m, k]
                               const float* s,        // [m, rank]
                               const Weight& weight,  // [n, k]
                               const Lora& lora, int64_t m, int64_t n, int64_t k,
                               const LoraGradients& out);
  // Adds the number of blocks with non-finite moments, which are left as they were, to *skipped.
  void (*adamw_step)(const AdamWParam* params,  // [count]
                     int64_t count,             //
                     const AdamWScalars& scalars,
                     const uint64_t* seed,  // of stochastic rounding; null for none
                     int64_t* skipped);
};

// The kernels of the best instruction set that this machine has, at most the one named by
// NF4_CPU_ISA (portable, avx2, avx512, avx512_bf16) and by ATEN_CPU_CAPABILITY. Read once.
const KernelTable& kernels();

// Runs body(context, task) for every task in [0, tasks), in any order and on any thread.
using TaskBody = void (*)(void* context, int64_t task);

struct Pool {
  void (*run)(int64_t tasks, TaskBody body, void* context);
  int64_t (*threads)();  // how many run at once; a hint for the size of tasks
};

void set_pool(const Pool& pool);
const Pool& pool();

// 64-byte aligned buffers that are kept between calls, because faulting fresh pages in costs more
// than most kernels. Each belongs to the calling thread and is valid until it asks for that kind
// again: scratch for the work of one task, shared_scratch for what one call's tasks share.
void* scratch(int64_t bytes);
void* shared_scratch(int64_t bytes);

// Size of each core's first-level data cache; 32 KiB where the system does not tell.
int64_t l1_bytes();

// Asks for huge pages under a new buffer that nothing has been written to; small ones are left as
// they are. A matmul of few rows walks through its weight once per call, and with 4 KiB pages it
// waits for page tables: one row takes 1.5x as long (4096x4096, Zen 5, virtual machine).
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace nf4::cpu
