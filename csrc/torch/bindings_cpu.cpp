// Registers the CPU kernels at the dispatcher's CPU key, through PyTorch's stable ABI.
//
// The schemas are nf4/ops.py's. Everything that the kernels rely on (shapes, dtypes, sizes of the
// packed data) is checked here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "checks.h"
#include "make_empty.h"
#include "nf4/codes.h"

namespace {

using nf4::cpu::Dropout;
using nf4::cpu::DType;
using nf4::cpu::Lora;
using nf4::cpu::LoraGradients;
using nf4::cpu::Matrix;
using nf4::cpu::Weight;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A contiguous dense matrix whose memory stays alive as long as this does.
struct Dense {
  Dense(const char* op, const char* name, const Tensor& t)
      : tensor(as_contiguous(t)), dtype(dtype_of(op, name, t.scalar_type())) {
    check(tensor.is_cpu(), op, name, " must be on the CPU");
  }
  Matrix matrix() const { return {tensor.const_data_ptr(), dtype}; }
  Tensor tensor;
  DType dtype;
};

int shift_of(const char* op, int64_t block_size) {
  int shift = 5;
  while (shift < 12 && int64_t{1} << shift != block_size) ++shift;
  check(int64_t{1} << shift == block_size, op,
        "block_size must be a power of two from 32 to 4096, got ", block_size);
  return shift;
}

bool is_four_bit(const char* op, int64_t format) {
  check(format >= NF4_FORMAT_NF4 && format <= NF4_FORMAT_DYNAMIC8_UNSIGNED, op,
        "format must be an id from 0 to 3, got ", format);
  return format == NF4_FORMAT_NF4 || format == NF4_FORMAT_FP4;
}

int64_t packed_bytes(bool four_bit, int64_t numel) { return four_bit ? (numel + 1) / 2 : numel; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The parts of a quantized weight of numel elements, checked and kept alive.
struct Quantized {
  Quantized(const char* op, const Tensor& packed_in, const Tensor& absmax_in,
            const Maybe& nested_in, const Maybe& offset_in, int64_t numel, int64_t block_size,
            int64_t format)
      : packed(as_contiguous(packed_in)), absmax(as_contiguous(absmax_in)) {
    const int64_t bytes = packed_bytes(is_four_bit(op, format), numel);
    const int64_t blocks =
        (weight.block_shift = shift_of(op, block_size), ceil_div(numel, block_size));
    check(packed.is_cpu() && absmax.is_cpu(), op, "the weight must be on the CPU");
    check(packed.scalar_type() == ScalarType::Byte, op, "packed must be uint8, got ",
          name_of(packed.scalar_type()));
    check(packed.numel() == bytes, op, "packed must hold ", bytes, " bytes for ", numel,
          " elements, got ", packed.numel());
    check(absmax.numel() == blocks, op, "absmax must hold ", blocks, " blocks of ", block_size,
          ", got ", absmax.numel());
    weight.format = static_cast<int>(format);
    weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    check(nested_in.has_value() == offset_in.has_value(), op,
          "nested_absmax and offset must be given together");
    if (!nested_in) {
      check(absmax.scalar_type() == ScalarType::Float, op, "absmax must be float32, got ",
            name_of(absmax.scalar_type()));
      weight.absmax = static_cast<const float*>(absmax.const_data_ptr());
      return;
    }
    nested = as_contiguous(*nested_in);
    check(absmax.scalar_type() == ScalarType::Byte, op,
          "absmax must be uint8 codes when nested, got ", name_of(absmax.scalar_type()));
    check(
        nested->scalar_type() == ScalarType::Float && offset_in->scalar_type() == ScalarType::Float,
        op, "nested_absmax and offset must be float32");
    check(nested->is_cpu() && offset_in->is_cpu(), op, "the weight must be on the CPU");
    check(nested->numel() == ceil_div(blocks, NF4_NESTED_BLOCK_SIZE), op,
          "nested_absmax must hold ", ceil_div(blocks, NF4_NESTED_BLOCK_SIZE), " blocks of ",
          NF4_NESTED_BLOCK_SIZE, ", got ", nested->numel());
    check(offset_in->numel() == 1, op, "offset must hold one value, got ", offset_in->numel());
    weight.codes = static_cast<const uint8_t*>(absmax.const_data_ptr());
    weight.nested_absmax = static_cast<const float*>(nested->const_data_ptr());
    weight.offset = *static_cast<const float*>(offset_in->const_data_ptr());
  }
  Tensor packed, absmax;
  Maybe nested;
  Weight weight = {};
};

struct LoraParts {
  LoraParts(const char* op, const Tensor& a_in, const Tensor& b_in, int64_t n, int64_t k,
            double scaling, double dropout_p, const Maybe& seed)
      : a(op, "lora_a", a_in), b(op, "lora_b", b_in) {
    check(a_in.dim() == 2 && a_in.size(1) == k, op, "lora_a must be [r, ", k, "], got ",
          shape_of(a_in));
    check(b_in.dim() == 2 && b_in.size(0) == n && b_in.size(1) == a_in.size(0), op,
          "lora_b must be [", n, ", ", a_in.size(0), "], got ", shape_of(b_in));
    lora = {a.matrix(), b.matrix(), a_in.size(0), static_cast<float>(scaling), {}};
    check(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p must be in [0, 1), got ", dropout_p);
    if (dropout_p == 0.0) return;
    check(seed.has_value(), op, "seed must be given when dropout_p > 0");
    check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(), op,
          "seed must be int64 [1] on the CPU, got ", name_of(seed->scalar_type()), ' ',
          shape_of(*seed));
    const auto value = *static_cast<const int64_t*>(seed->const_data_ptr());
    // nearbyint rounds half to even, as Python's round does.
    lora.dropout = {static_cast<uint64_t>(value),
                    static_cast<uint64_t>(std::nearbyint(dropout_p * 4294967296.0)),
                    static_cast<float>(1.0 / (1.0 - dropout_p))};
  }
  Dense a, b;
  Lora lora;
};

struct Bias {
  Bias(const char* op, const Maybe& bias, int64_t n) {
    if (!bias) return;
    dense.emplace(op, "bias", *bias);
    check(bias->dim() == 1 && bias->numel() == n, op, "bias must be [", n, "], got ",
          shape_of(*bias));
  }
  Matrix matrix() const { return dense ? dense->matrix() : Matrix{}; }
  std::optional<Dense> dense;
};

// Rows of x when its leading dimensions are flattened.
int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// A new tensor with x's leading dimensions and `last` columns.
Tensor like(const Tensor& x, int64_t last, std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return make_empty(x, sizes, dtype);
}

// A new tensor whose memory may be large.
Tensor new_large(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = make_empty(like, sizes, dtype);
  nf4::cpu::prefer_huge_pages(t.mutable_data_ptr(),
                              t.numel() * static_cast<int64_t>(t.element_size()));
  return t;
}

std::tuple<Tensor, Tensor> quantize(Tensor x, int64_t block_size, int64_t format) {
  const char* op = "quantize";
  const Dense in(op, "x", x);
  const int shift = shift_of(op, block_size);
  const int64_t numel = x.numel();
  Tensor packed = new_large(x, {packed_bytes(is_four_bit(op, format), numel), 1}, ScalarType::Byte);
  Tensor absmax =
      make_empty(x, std::vector<int64_t>{ceil_div(numel, block_size)}, ScalarType::Float);
  nf4::cpu::kernels().quantize(in.matrix(), numel, shift, static_cast<int>(format),
                               static_cast<uint8_t*>(packed.mutable_data_ptr()),
                               static_cast<float*>(absmax.mutable_data_ptr()));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor absmax) {
  const char* op = "double_quantize";
  check(absmax.scalar_type() == ScalarType::Float, op, "absmax must be float32, got ",
        name_of(absmax.scalar_type()));
  const Dense in(op, "absmax", absmax);
  const int64_t blocks = absmax.numel();
  Tensor codes = make_empty(absmax, absmax.sizes(), ScalarType::Byte);
  Tensor nested = make_empty(absmax, std::vector<int64_t>{ceil_div(blocks, NF4_NESTED_BLOCK_SIZE)});
  Tensor offset = make_empty(absmax, std::vector<int64_t>{});
  nf4::cpu::kernels().double_quantize(static_cast<const float*>(in.matrix().data), blocks,
                                      static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                      static_cast<float*>(nested.mutable_data_ptr()),
                                      static_cast<float*>(offset.mutable_data_ptr()));
  return {codes, nested, offset};
}

void dequantize_out(Tensor packed, Tensor absmax, Maybe nested, Maybe offset, int64_t block_size,
                    int64_t format, Tensor out) {
  const char* op = "dequantize";
  const Quantized q(op, packed, absmax, nested, offset, out.numel(), block_size, format);
  const DType dtype = dtype_of(op, "out", out.scalar_type());
  check(out.is_cpu(), op, "out must be on the CPU");
  if (out.is_contiguous()) {
    nf4::cpu::kernels().dequantize(q.weight, out.numel(), dtype, out.mutable_data_ptr());
    return;
  }
  const Tensor dense = make_empty(out, out.sizes());
  nf4::cpu::kernels().dequantize(q.weight, out.numel(), dtype, dense.mutable_data_ptr());
  torch::stable::copy_(out, dense);
}

Tensor dequantize(Tensor packed, Tensor absmax, Maybe nested, Maybe offset,
                  std::vector<int64_t> shape, int64_t block_size, int64_t format,
                  ScalarType dtype) {
  dtype_of("dequantize", "dtype", dtype);
  Tensor out = new_large(packed, shape, dtype);
  dequantize_out(packed, absmax, nested, offset, block_size, format, out);
  return out;
}

Tensor linear(Tensor x, Tensor packed, Tensor absmax, Maybe nested, Maybe offset, Maybe bias,
              int64_t n, int64_t block_size, int64_t format) {
  const char* op = "linear";
  const Dense in(op, "x", x);
  check(x.dim() >= 1, op, "x must have at least one dimension");
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1);
  const Quantized q(op, packed, absmax, nested, offset, n * k, block_size, format);
  const Bias added(op, bias, n);
  Tensor y = like(x, n);
  nf4::cpu::kernels().linear(in.matrix(), q.weight, added.matrix(), m, n, k, y.mutable_data_ptr());
  return y;
}

Tensor linear_backward(Tensor grad_y, Tensor packed, Tensor absmax, Maybe nested, Maybe offset,
                       int64_t k, int64_t block_size, int64_t format) {
  const char* op = "linear_backward";
  const Dense in(op, "grad_y", grad_y);
  check(grad_y.dim() >= 1, op, "grad_y must have at least one dimension");
  const int64_t m = rows_of(grad_y), n = grad_y.size(grad_y.dim() - 1);
  const Quantized q(op, packed, absmax, nested, offset, n * k, block_size, format);
  Tensor dx = like(grad_y, k);
  nf4::cpu::kernels().linear_backward(in.matrix(), q.weight, m, n, k, dx.mutable_data_ptr());
  return dx;
}

std::tuple<Tensor, Tensor> linear_lora(Tensor x, Tensor packed, Tensor absmax, Maybe nested,
                                       Maybe offset, Maybe bias, Tensor lora_a, Tensor lora_b,
                                       double scaling, double dropout_p, Maybe seed, int64_t n,
                                       int64_t block_size, int64_t format) {
  const char* op = "linear_lora";
  const Dense in(op, "x", x);
  check(x.dim() >= 1, op, "x must have at least one dimension");
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1);
  const Quantized q(op, packed, absmax, nested, offset, n * k, block_size, format);
  const LoraParts parts(op, lora_a, lora_b, n, k, scaling, dropout_p, seed);
  const Bias added(op, bias, n);
  Tensor y = like(x, n);
  Tensor s = like(x, parts.lora.rank, ScalarType::Float);
  nf4::cpu::kernels().linear_lora(in.matrix(), q.weight, added.matrix(), parts.lora, m, n, k,
                                  y.mutable_data_ptr(), static_cast<float*>(s.mutable_data_ptr()));
  return {y, s};
}

using Tensors = std::vector<Tensor>;
using Maybes = std::vector<Maybe>;

// Member after member, in one dispatch; each has its own dropout mask, so they share only x itself.
std::tuple<Tensors, Tensors> linear_lora_group(Tensor x, Tensors packed, Tensors absmax,
                                               Maybes nested, Maybes offset, Maybes bias,
                                               Tensors lora_a, Tensors lora_b,
                                               std::vector<double> scaling, double dropout_p,
                                               Maybe seeds, int64_t block_size, int64_t format) {
  const char* op = "linear_lora_group";
  const size_t count = packed.size();
  check(absmax.size() == count && nested.size() == count && offset.size() == count &&
            bias.size() == count && lora_a.size() == count && lora_b.size() == count &&
            scaling.size() == count,
        op, "every list must have ", count, " members");
  check(!seeds || seeds->numel() == static_cast<int64_t>(count), op, "seeds must be int64 [", count,
        "]");
  Tensors ys, ss;
  for (size_t i = 0; i < count; ++i) {
    Maybe seed;
    if (seeds) seed = torch::stable::narrow(*seeds, 0, static_cast<int64_t>(i), 1);
    check(lora_b[i].dim() == 2, op, "lora_b must be a matrix");
    auto [y, s] =
        linear_lora(x, packed[i], absmax[i], nested[i], offset[i], bias[i], lora_a[i], lora_b[i],
                    scaling[i], dropout_p, seed, lora_b[i].size(0), block_size, format);
    ys.push_back(y);
    ss.push_back(s);
  }
  return {ys, ss};
}

std::tuple<Tensor, Tensor, Tensor> linear_lora_backward(
    Tensor grad_y, Tensor x, Tensor s, Tensor packed, Tensor absmax, Maybe nested, Maybe offset,
    Tensor lora_a, Tensor lora_b, double scaling, double dropout_p, Maybe seed, int64_t block_size,
    int64_t format, bool needs_dx, bool needs_dab) {
  const char* op = "linear_lora_backward";
  const Dense g(op, "grad_y", grad_y), in(op, "x", x), low(op, "s", s);
  check(g.dtype == in.dtype, op, "grad_y must have x's dtype ", name_of(x.scalar_type()), ", got ",
        name_of(grad_y.scalar_type()));
  check(x.dim() >= 1 && grad_y.dim() >= 1, op, "x and grad_y must have at least one dimension");
  const int64_t m = rows_of(x), k = x.size(x.dim() - 1), n = grad_y.size(grad_y.dim() - 1);
  const Quantized q(op, packed, absmax, nested, offset, n * k, block_size, format);
  const LoraParts parts(op, lora_a, lora_b, n, k, scaling, dropout_p, seed);
  check(rows_of(grad_y) == m, op, "grad_y must have ", m, " rows, got ", shape_of(grad_y));
  check(low.dtype == DType::kFloat32 && s.numel() == m * parts.lora.rank, op,
        "s must be float32 with ", m * parts.lora.rank, " elements, got ", name_of(s.scalar_type()),
        ' ', shape_of(s));
  const std::vector<int64_t> none{0};
  Tensor dx = needs_dx ? make_empty(x, x.sizes()) : make_empty(x, none);
  Tensor da = needs_dab ? make_empty(lora_a, lora_a.sizes()) : make_empty(lora_a, none);
  Tensor db = needs_dab ? make_empty(lora_b, lora_b.sizes()) : make_empty(lora_b, none);
  LoraGradients out = {};
  if (needs_dx) out.dx = dx.mutable_data_ptr();
  if (needs_dab) out.da = da.mutable_data_ptr();
  if (needs_dab) out.db = db.mutable_data_ptr();
  nf4::cpu::kernels().linear_lora_backward(g.matrix(), in.matrix(),
                                           static_cast<const float*>(low.matrix().data), q.weight,
                                           parts.lora, m, n, k, out);
  return {dx, da, db};
}

// Runs tasks on torch's own pool. Threads take the next task when they are free, so a slow core
// holds up at most one task, and whatever team the pool really gives does all of them.
int64_t torch_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void run_on_torch(int64_t tasks, nf4::cpu::TaskBody body, void* context) {
  const int64_t threads = torch_threads();
  if (threads == 1 || tasks == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(context, i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) body(context, i);
  });
}

const bool kInjected = (nf4::cpu::set_pool({run_on_torch, torch_threads}), true);

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("double_quantize", TORCH_BOX(&double_quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("linear_lora", TORCH_BOX(&linear_lora));
  m.impl("linear_lora_group", TORCH_BOX(&linear_lora_group));
  m.impl("linear_lora_backward", TORCH_BOX(&linear_lora_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nf4, CPU, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(nf4_cpu, CPU, m) { register_ops(m); }
