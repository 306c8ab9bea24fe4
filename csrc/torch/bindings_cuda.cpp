// Registers the CUDA kernels at the dispatcher's CUDA key, through PyTorch's stable ABI.
//
// The schemas are nf4/ops.py's. Checks what kernels rely on, allocates outputs and workspace with
// torch's allocator, and launches on the current stream of the tensors' device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_call.h"
#include "nf4/codes.h"

namespace {

using Maybe = std::optional<Tensor>;

void check_layout(const char* op, int64_t block_size, int64_t format) {
  check(block_size >= 32 && block_size <= 4096 && (block_size & (block_size - 1)) == 0, op,
        "block_size must be a power of two from 32 to 4096, got ", block_size);
  check(format >= NF4_FORMAT_NF4 && format <= NF4_FORMAT_DYNAMIC8_UNSIGNED, op,
        "format must be an id from 0 to 3, got ", format);
}

int64_t packed_bytes(int64_t format, int64_t numel) {
  return format <= NF4_FORMAT_FP4 ? (numel + 1) / 2 : numel;
}

// The parts of a quantized weight [n, k], checked and kept alive.
struct Weight {
  Weight(const char* op, const Call& call, const Tensor& packed_in, const Tensor& absmax_in,
         const Maybe& nested_in, const Maybe& offset_in, int64_t n, int64_t k, int64_t block_size,
         int64_t format)
      : packed(dense(packed_in)), absmax(dense(absmax_in)) {
    check_layout(op, block_size, format);
    const int64_t bytes = packed_bytes(format, n * k), blocks = ceil_div(n * k, block_size);
    call.same_device("packed", packed);
    call.same_device("absmax", absmax);
    check(packed.scalar_type() == ScalarType::Byte && packed.numel() == bytes, op,
          "packed must hold ", bytes, " bytes of uint8 for ", n * k, " elements, got ",
          packed.numel());
    check(absmax.numel() == blocks, op, "absmax must hold ", blocks, " blocks of ", block_size,
          ", got ", absmax.numel());
    check(nested_in.has_value() == offset_in.has_value(), op,
          "nested_absmax and offset must be given together");
    check(absmax.scalar_type() == (nested_in ? ScalarType::Byte : ScalarType::Float), op,
          "absmax must be float32, or uint8 codes when nested");
    value = {static_cast<const uint8_t*>(packed.const_data_ptr()),
             absmax.const_data_ptr(),
             nullptr,
             nullptr,
             n,
             k,
             static_cast<int32_t>(block_size),
             static_cast<int32_t>(format)};
    if (!nested_in) return;
    nested = dense(*nested_in);
    offset = *offset_in;
    call.same_device("nested_absmax", *nested);
    call.same_device("offset", *offset);
    check(nested->scalar_type() == ScalarType::Float &&
              offset->scalar_type() == ScalarType::Float &&
              nested->numel() == ceil_div(blocks, NF4_NESTED_BLOCK_SIZE) && offset->numel() == 1,
          op, "nested_absmax must be float32 with ", ceil_div(blocks, NF4_NESTED_BLOCK_SIZE),
          " values and offset float32 with one");
    value.nested_absmax = static_cast<const float*>(nested->const_data_ptr());
    value.offset = static_cast<const float*>(offset->const_data_ptr());
  }
  Tensor packed, absmax;
  Maybe nested, offset;
  nf4_weight value = {};
};

struct Lora {
  Lora(const char* op, const Call& call, const Tensor& a_in, const Tensor& b_in, int64_t n,
       int64_t k, double scaling, double dropout_p, const Maybe& seed_in)
      : a(dense(a_in)), b(dense(b_in)), seed(seed_in) {
    check(a.dim() == 2 && a.size(1) == k, op, "lora_a must be [r, ", k, "]");
    check(b.dim() == 2 && b.size(0) == n && b.size(1) == a.size(0), op, "lora_b must be [", n, ", ",
          a.size(0), "]");
    check(a.scalar_type() == b.scalar_type(), op, "lora_a and lora_b must have one dtype");
    check(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p must be in [0, 1), got ", dropout_p);
    call.same_device("lora_a", a);
    call.same_device("lora_b", b);
    const int64_t* seed_pointer = nullptr;
    if (dropout_p > 0.0) {
      check(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
            "seed must be int64 [1] when dropout_p > 0");
      call.same_device("seed", *seed);
      seed_pointer = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    value = {a.const_data_ptr(),
             b.const_data_ptr(),
             seed_pointer,
             scaling,
             dropout_p,
             a.size(0),
             dtype_of(op, "lora_a", a.scalar_type())};
  }
  Tensor a, b;
  Maybe seed;
  nf4_lora value;
};

// x as a contiguous matrix; the last dimension is its columns.
struct Matrix {
  Matrix(const char* op, const char* name, const Tensor& t)
      : tensor(dense(t)), dtype(dtype_of(op, name, t.scalar_type())) {
    check(t.dim() >= 1, op, name, " must have at least one dimension");
    columns = t.size(t.dim() - 1);
    for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  }
  const void* data() const { return tensor.const_data_ptr(); }
  // A new tensor with the leading dimensions and `last` columns.
  Tensor like(int64_t last, std::optional<ScalarType> dtype = std::nullopt) const {
    Sizes sizes(tensor.sizes().begin(), tensor.sizes().end());
    sizes.back() = last;
    return make_empty(tensor, sizes, dtype);
  }
  Tensor tensor;
  int dtype;
  int64_t rows = 1, columns = 0;
};

// The bias in x's dtype.
Maybe bias_of(const char* op, const Call& call, const Maybe& bias, const Matrix& x, int64_t n) {
  if (!bias) return std::nullopt;
  call.same_device("bias", *bias);
  check(bias->dim() == 1 && bias->numel() == n, op, "bias must be [", n, "]");
  if (bias->scalar_type() == x.tensor.scalar_type()) return dense(*bias);
  Tensor converted = make_empty(*bias, Sizes{n}, x.tensor.scalar_type());
  torch::stable::copy_(converted, *bias);
  return converted;
}
const void* data_of(const Maybe& t) { return t ? t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> quantize(Tensor x, int64_t block_size, int64_t format) {
  const char* op = "quantize";
  check_layout(op, block_size, format);
  const Call call(op, x);
  const Tensor in = dense(x);
  const int64_t numel = x.numel();
  Tensor packed = make_empty(x, Sizes{packed_bytes(format, numel), 1}, ScalarType::Byte);
  Tensor absmax = make_empty(x, Sizes{ceil_div(numel, block_size)}, ScalarType::Float);
  call.done(nf4_cuda_quantize(in.const_data_ptr(), dtype_of(op, "x", x.scalar_type()), numel,
                              static_cast<int>(block_size), static_cast<int>(format),
                              static_cast<uint8_t*>(packed.mutable_data_ptr()),
                              static_cast<float*>(absmax.mutable_data_ptr()), call.stream()));
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor absmax) {
  const char* op = "double_quantize";
  check(absmax.scalar_type() == ScalarType::Float, op, "absmax must be float32");
  const Call call(op, absmax);
  const Tensor in = dense(absmax);
  const int64_t count = absmax.numel();
  Tensor codes = make_empty(absmax, absmax.sizes(), ScalarType::Byte);
  Tensor nested = make_empty(absmax, Sizes{ceil_div(count, NF4_NESTED_BLOCK_SIZE)});
  Tensor offset = make_empty(absmax, Sizes{});
  const Tensor work = call.workspace(nf4_cuda_double_quantize_workspace(count));
  call.done(nf4_cuda_double_quantize(static_cast<const float*>(in.const_data_ptr()), count,
                                     static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                     static_cast<float*>(nested.mutable_data_ptr()),
                                     static_cast<float*>(offset.mutable_data_ptr()),
                                     work.mutable_data_ptr(), call.stream()));
  return {codes, nested, offset};
}

void dequantize_out(Tensor packed, Tensor absmax, Maybe nested, Maybe offset, int64_t block_size,
                    int64_t format, Tensor out) {
  const char* op = "dequantize";
  const Call call(op, packed);
  call.same_device("out", out);
  const Weight w(op, call, packed, absmax, nested, offset, 1, out.numel(), block_size, format);
  const int dtype = dtype_of(op, "out", out.scalar_type());
  const bool direct = out.is_contiguous();
  Tensor to = direct ? out : make_empty(out, out.sizes());
  call.done(
      nf4_cuda_dequantize(&w.value, out.numel(), to.mutable_data_ptr(), dtype, call.stream()));
  if (!direct) torch::stable::copy_(out, to);
}

Tensor dequantize(Tensor packed, Tensor absmax, Maybe nested, Maybe offset, Sizes shape,
                  int64_t block_size, int64_t format, ScalarType dtype) {
  dtype_of("dequantize", "dtype", dtype);
  Tensor out = make_empty(packed, shape, dtype);
  dequantize_out(packed, absmax, nested, offset, block_size, format, out);
  return out;
}

Tensor linear(Tensor x, Tensor packed, Tensor absmax, Maybe nested, Maybe offset, Maybe bias,
              int64_t n, int64_t block_size, int64_t format) {
  const char* op = "linear";
  const Call call(op, x);
  const Matrix in(op, "x", x);
  const Weight w(op, call, packed, absmax, nested, offset, n, in.columns, block_size, format);
  const Maybe added = bias_of(op, call, bias, in, n);
  Tensor y = in.like(n);
  const Tensor work = call.workspace(nf4_cuda_linear_workspace(&w.value, in.rows, in.dtype));
  call.done(nf4_cuda_linear(in.data(), &w.value, data_of(added), y.mutable_data_ptr(), in.rows,
                            in.dtype, work.mutable_data_ptr(), call.stream()));
  return y;
}

Tensor linear_backward(Tensor grad_y, Tensor packed, Tensor absmax, Maybe nested, Maybe offset,
                       int64_t k, int64_t block_size, int64_t format) {
  const char* op = "linear_backward";
  const Call call(op, grad_y);
  const Matrix in(op, "grad_y", grad_y);
  const Weight w(op, call, packed, absmax, nested, offset, in.columns, k, block_size, format);
  Tensor dx = in.like(k);
  const Tensor work =
      call.workspace(nf4_cuda_linear_backward_workspace(&w.value, in.rows, in.dtype));
  call.done(nf4_cuda_linear_backward(in.data(), &w.value, dx.mutable_data_ptr(), in.rows, in.dtype,
                                     work.mutable_data_ptr(), call.stream()));
  return dx;
}

std::tuple<Tensor, Tensor> linear_lora(Tensor x, Tensor packed, Tensor absmax, Maybe nested,
                                       Maybe offset, Maybe bias, Tensor lora_a, Tensor lora_b,
                                       double scaling, double dropout_p, Maybe seed, int64_t n,
                                       int64_t block_size, int64_t format) {
  const char* op = "linear_lora";
  const Call call(op, x);
  const Matrix in(op, "x", x);
  const Weight w(op, call, packed, absmax, nested, offset, n, in.columns, block_size, format);
  const Lora lora(op, call, lora_a, lora_b, n, in.columns, scaling, dropout_p, seed);
  const Maybe added = bias_of(op, call, bias, in, n);
  Tensor y = in.like(n);
  Tensor s = in.like(lora.value.r, ScalarType::Float);
  const Tensor work =
      call.workspace(nf4_cuda_linear_lora_workspace(&w.value, &lora.value, in.rows, in.dtype));
  call.done(nf4_cuda_linear_lora(in.data(), &w.value, data_of(added), &lora.value,
                                 y.mutable_data_ptr(), static_cast<float*>(s.mutable_data_ptr()),
                                 in.rows, in.dtype, work.mutable_data_ptr(), call.stream()));
  return {y, s};
}

using Tensors = std::vector<Tensor>;
using Maybes = std::vector<Maybe>;

std::tuple<Tensors, Tensors> linear_lora_group(Tensor x, Tensors packed, Tensors absmax,
                                               Maybes nested, Maybes offset, Maybes bias,
                                               Tensors lora_a, Tensors lora_b,
                                               std::vector<double> scaling, double dropout_p,
                                               Maybe seeds, int64_t block_size, int64_t format) {
  const char* op = "linear_lora_group";
  const Call call(op, x);
  const Matrix in(op, "x", x);
  const size_t count = packed.size();
  check(absmax.size() == count && nested.size() == count && offset.size() == count &&
            bias.size() == count && lora_a.size() == count && lora_b.size() == count &&
            scaling.size() == count,
        op, "every list must have ", count, " members");
  if (dropout_p > 0.0) {
    check(seeds && seeds->scalar_type() == ScalarType::Long &&
              seeds->numel() == static_cast<int64_t>(count),
          op, "seeds must be int64 [", count, "] when dropout_p > 0");
  }
  std::vector<Weight> weights;
  std::vector<Lora> loras;
  Maybes added;
  Tensors ys, ss;
  std::vector<nf4_member> members;
  for (size_t i = 0; i < count; ++i) {
    const int64_t n = lora_b[i].size(0);
    const auto at = static_cast<int64_t>(i);
    const Maybe seed = seeds ? Maybe(torch::stable::narrow(*seeds, 0, at, 1)) : std::nullopt;
    weights.emplace_back(op, call, packed[i], absmax[i], nested[i], offset[i], n, in.columns,
                         block_size, format);
    loras.emplace_back(op, call, lora_a[i], lora_b[i], n, in.columns, scaling[i], dropout_p, seed);
    check(loras[i].value.dtype == loras[0].value.dtype, op, "all adapters must have one dtype");
    added.push_back(bias_of(op, call, bias[i], in, n));
    ys.push_back(in.like(n));
    ss.push_back(in.like(loras[i].value.r, ScalarType::Float));
    members.push_back({weights[i].value, data_of(added[i]), loras[i].value,
                       ys[i].mutable_data_ptr(), static_cast<float*>(ss[i].mutable_data_ptr())});
  }
  const auto size = static_cast<int>(count);
  const Tensor work =
      call.workspace(nf4_cuda_linear_lora_group_workspace(members.data(), size, in.rows, in.dtype));
  call.done(nf4_cuda_linear_lora_group(in.data(), members.data(), size, in.rows, in.dtype,
                                       work.mutable_data_ptr(), call.stream()));
  return {ys, ss};
}

std::tuple<Tensor, Tensor, Tensor> linear_lora_backward(
    Tensor grad_y, Tensor x, Tensor s, Tensor packed, Tensor absmax, Maybe nested, Maybe offset,
    Tensor lora_a, Tensor lora_b, double scaling, double dropout_p, Maybe seed, int64_t block_size,
    int64_t format, bool needs_dx, bool needs_dab) {
  const char* op = "linear_lora_backward";
  const Call call(op, x);
  const Matrix g(op, "grad_y", grad_y), in(op, "x", x);
  const Tensor low = dense(s);
  check(g.dtype == in.dtype && g.rows == in.rows, op, "grad_y must have x's dtype and rows");
  const Weight w(op, call, packed, absmax, nested, offset, g.columns, in.columns, block_size,
                 format);
  const Lora lora(op, call, lora_a, lora_b, g.columns, in.columns, scaling, dropout_p, seed);
  check(low.scalar_type() == ScalarType::Float && low.numel() == in.rows * lora.value.r, op,
        "s must be float32 with ", in.rows * lora.value.r, " elements, got ", low.numel());
  call.same_device("grad_y", g.tensor);
  call.same_device("s", low);
  const Sizes none{0};
  const auto output = [&](bool wanted, const Tensor& like) {
    return wanted ? make_empty(like, like.sizes()) : make_empty(like, none);
  };
  Tensor dx = output(needs_dx, x), da = output(needs_dab, lora_a), db = output(needs_dab, lora_b);
  const Tensor work = call.workspace(
      nf4_cuda_linear_lora_backward_workspace(&w.value, &lora.value, in.rows, in.dtype));
  call.done(nf4_cuda_linear_lora_backward(
      g.data(), in.data(), static_cast<const float*>(low.const_data_ptr()), &w.value, &lora.value,
      needs_dx ? dx.mutable_data_ptr() : nullptr, needs_dab ? da.mutable_data_ptr() : nullptr,
      needs_dab ? db.mutable_data_ptr() : nullptr, in.rows, in.dtype, work.mutable_data_ptr(),
      call.stream()));
  return {dx, da, db};
}

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

#define NF4_TEXT(name) #name
#define NF4_TEXT_OF(macro) NF4_TEXT(macro)
// The architectures that the library was built for. nf4/backends/cuda.py finds this text in the
// file, before it decides whether to load it: loading registers the ops.
extern "C" __attribute__((visibility("default"))) const char* nf4_cuda_architectures() {
  return "nf4_cuda_architectures=" NF4_TEXT_OF(NF4_CUDA_ARCHS) ";";
}

STABLE_TORCH_LIBRARY_IMPL(nf4, CUDA, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(nf4_cuda, CUDA, m) { register_ops(m); }
