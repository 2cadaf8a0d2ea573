// Tensors → plain structs → CPU kernels.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <array>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/scratch.h"
#include "../kernels/layer.h"
#include "checks.h"
#include "composition.h"
#include "path.h"
#include "policy.h"

namespace fastlane {
namespace {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: return DType::f32;
  }
}

Parallel torch_threads() {
  Parallel parallel;
  parallel.threads = at::get_num_threads();
  parallel.caches = caches();
  parallel.run = [](int64_t tasks, Parallel::Body body, void* context) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return parallel;
}

int64_t leading_size(const at::Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// (..., cols) → (rows, cols): a view where the strides allow it, otherwise a copy.
at::Tensor flatten_leading(const at::Tensor& t) {
  return t.dim() == 2 ? t : t.reshape({leading_size(t), t.size(-1)});
}

ConstMatrix matrix(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// The epilogue and the elementwise pass read rows of unit stride.
at::Tensor with_unit_column_stride(const at::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous();
}

ConstRowMajor row_major(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }
RowMajor mutable_row_major(const at::Tensor& t) { return {t.mutable_data_ptr(), t.stride(0)}; }

struct Operands {
  at::Tensor x, weight, bias, residual;  // 2-D, 2-D, contiguous 1-D, 2-D with unit column stride
  LayerShape shape;
};

Operands flatten_operands(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual) {
  Operands o;
  o.x = flatten_leading(x);
  o.weight = weight;
  if (bias) o.bias = bias->contiguous();
  o.shape = {o.x.size(0), o.x.size(1), weight.size(0), dtype_of(x)};
  if (residual) {
    at::DimVector sizes(x.sizes().begin(), x.sizes().end() - 1);
    sizes.push_back(weight.size(0));
    o.residual = with_unit_column_stride(flatten_leading(residual->expand(sizes)));
  }
  return o;
}

// An ATen call inside an operator is not the user's, to be cast or differentiated.
struct OwnCalls {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// `activated` receives act(z) + residual: a whole tensor, or a slice of the concatenation's rows.
void run_forward(Path path, const Operands& o, Activation activation, const at::Tensor& z,
                 const at::Tensor& activated) {
  const void* bias = o.bias.defined() ? o.bias.const_data_ptr() : nullptr;
  const ConstRowMajor residual = o.residual.defined() ? row_major(o.residual) : ConstRowMajor{};
  GemmProblem p = forward_gemm(o.shape, matrix(o.x), matrix(o.weight), bias, activation, residual,
                               z.defined() ? mutable_row_major(z) : RowMajor{}, mutable_row_major(activated));
  if (path == Path::fused) {
    kernels().gemm(p, torch_threads());
    return;
  }
  at::Tensor product = z.defined() ? z : activated;
  {
    const OwnCalls own_calls;
    if (o.bias.defined()) {
      // A 16-bit product is rounded when it is stored, so the bias comes before.
      at::addmm_out(product, o.bias, o.x, o.weight.t());
      p.bias = nullptr;
    } else {
      at::mm_out(product, o.x, o.weight.t());
    }
  }
  kernels().epilogue(p, row_major(product), torch_threads());
}

Path counted_forward_path(const LayerShape& shape) {
  const Path path = forward_path(shape);
  path == Path::fused ? policy::count_fused_forward() : policy::count_library_forward();
  return path;
}

at::Tensor empty_output(const at::Tensor& x, int64_t features) {
  at::DimVector sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(features);
  return at::empty(sizes, x.options());
}

using OutputAndZ = std::tuple<at::Tensor, at::Tensor>;

// z is undefined unless asked for.
OutputAndZ forward_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, Activation activation, bool with_z) {
  check_linear("linear_gelu_residual", x, weight, bias);
  if (residual) check_residual("linear_gelu_residual", x, weight, *residual);
  at::Tensor y = empty_output(x, weight.size(0)), z = with_z ? empty_output(x, weight.size(0)) : at::Tensor();
  const Operands o = flatten_operands(x, weight, bias, residual);
  const std::array<int64_t, 2> flat{o.shape.rows, o.shape.out_features};
  run_forward(counted_forward_path(o.shape), o, activation, with_z ? z.view(flat) : z, y.view(flat));
  return {std::move(y), std::move(z)};
}

OutputAndZ forward_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          Activation activation, bool with_z) {
  check_linear("linear_gelu_concat", x, weight, bias);
  const int64_t in_features = x.size(-1), out_features = weight.size(0);
  at::Tensor y = empty_output(x, in_features + out_features),
             z = with_z ? empty_output(x, out_features) : at::Tensor();
  const Operands o = flatten_operands(x, weight, bias, std::nullopt);
  const at::Tensor rows = y.view({o.shape.rows, in_features + out_features});
  {
    const OwnCalls own_calls;
    rows.narrow(1, 0, in_features).copy_(o.x);
  }
  run_forward(counted_forward_path(o.shape), o, activation, with_z ? z.view({o.shape.rows, out_features}) : z,
              rows.narrow(1, in_features, out_features));
  return {std::move(y), std::move(z)};
}

// Inference tensors come here without passing the autograd key, which asks for everything else.
bool composes_because_disabled() {
  if (!policy::disabled()) return false;
  policy::leave_fused_path(policy::kDisabled);
  return true;
}

at::Tensor linear_gelu_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, std::string_view activation_name, bool) {
  const Activation activation = parse_activation(activation_name);
  if (composes_because_disabled()) return composition::linear_gelu_residual(x, weight, bias, residual, activation);
  return std::get<0>(forward_residual(x, weight, bias, residual, activation, /*with_z=*/false));
}

at::Tensor linear_gelu_concat(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              std::string_view activation_name) {
  const Activation activation = parse_activation(activation_name);
  if (composes_because_disabled()) return composition::linear_gelu_concat(x, weight, bias, activation);
  return std::get<0>(forward_concat(x, weight, bias, activation, /*with_z=*/false));
}

std::tuple<at::Tensor, at::Tensor> linear_gelu_forward(const at::Tensor& x, const at::Tensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& residual,
                                                       std::string_view activation, bool concat) {
  check_no_residual_with_concat(concat, residual);
  const Activation parsed = parse_activation(activation);
  return concat ? forward_concat(x, weight, bias, parsed, /*with_z=*/true)
                : forward_residual(x, weight, bias, residual, parsed, /*with_z=*/true);
}

at::Tensor recomputed_z(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  const Operands o = flatten_operands(x, weight, bias, std::nullopt);
  at::Tensor z = at::empty({o.shape.rows, o.shape.out_features}, x.options());
  run_forward(forward_path(o.shape), o, Activation::none, {}, z);
  return z;
}

bool forms_dz(const LayerBackwardProblem& b) {
  return b.activation != Activation::none && (b.dx.data || b.dweight.data);
}

// dz and db of a layer's backward, the elementwise pass; dz is written to `memory` if anybody needs it.
ConstRowMajor run_preactivation_grad(const LayerBackwardProblem& b, void* memory) {
  if (!b.db && b.activation == Activation::none) return b.dy;
  PreActivationGradProblem p;
  p.rows = b.rows, p.cols = b.out_features, p.dtype = b.dtype, p.activation = b.activation;
  p.dy = b.dy, p.z = b.z, p.db = b.db;
  if (forms_dz(b)) p.dz = {memory, b.out_features};
  kernels().preactivation_grad(p, torch_threads());
  return forms_dz(b) ? ConstRowMajor{memory, b.out_features} : b.dy;
}

// Two products after the elementwise pass, with dz in kept work memory: the page faults of a fresh tensor would cost
// as much as the pass itself.
void run_backward_in_passes(const LayerBackwardProblem& b, int64_t element_size) {
  const LayerShape shape{b.rows, b.in_features, b.out_features, b.dtype};
  const Scratch memory(ScratchSlot::dz,
                       static_cast<size_t>(forms_dz(b) ? b.rows * b.out_features * element_size : 0));
  const ConstRowMajor dz = run_preactivation_grad(b, memory.as<void>());
  const ConstMatrix dz_matrix{dz.data, dz.row_stride, 1};
  if (b.dx.data) kernels().gemm(dgrad_gemm(shape, dz_matrix, b.weight, b.shortcut_grad, b.dx), torch_threads());
  if (b.dweight.data)
    kernels().gemm(wgrad_gemm(shape, dz_matrix, b.x, b.dweight_transposed, b.dweight), torch_threads());
}

// The operands and results of a backward as 2-D tensors; undefined where not needed.
struct BackwardTensors {
  at::Tensor dy, z, x, weight, grad_shortcut;
  at::Tensor dx, dweight, db;
  bool dweight_transposed = false;
};

LayerBackwardProblem problem_of(const BackwardTensors& t, Activation activation) {
  const auto rows_of = [](const at::Tensor& m) { return m.defined() ? row_major(m) : ConstRowMajor{}; };
  const auto mutable_rows_of = [](const at::Tensor& m) { return m.defined() ? mutable_row_major(m) : RowMajor{}; };
  const auto matrix_of = [](const at::Tensor& m) { return m.defined() ? matrix(m) : ConstMatrix{}; };
  LayerBackwardProblem b;
  b.rows = t.dy.size(0), b.out_features = t.dy.size(1);
  if (t.weight.defined()) b.in_features = t.weight.size(1);
  if (t.x.defined()) b.in_features = t.x.size(1);
  b.dtype = dtype_of(t.dy), b.activation = activation;
  b.dy = rows_of(t.dy), b.z = rows_of(t.z), b.shortcut_grad = rows_of(t.grad_shortcut);
  b.x = matrix_of(t.x), b.weight = matrix_of(t.weight);
  b.dx = mutable_rows_of(t.dx), b.dweight = mutable_rows_of(t.dweight), b.dweight_transposed = t.dweight_transposed;
  if (t.db.defined()) b.db = t.db.mutable_data_ptr();
  return b;
}

void run_backward_by_library(const LayerBackwardProblem& b, BackwardTensors& t) {
  at::Tensor dz = forms_dz(b) ? at::empty({b.rows, b.out_features}, t.dy.options()) : t.dy;
  run_preactivation_grad(b, forms_dz(b) ? dz.mutable_data_ptr() : nullptr);
  const OwnCalls own_calls;
  if (t.dx.defined()) {
    if (t.grad_shortcut.defined()) {
      at::addmm_out(t.dx, t.grad_shortcut, dz, t.weight);
    } else {
      at::mm_out(t.dx, dz, t.weight);
    }
  }
  if (!t.dweight.defined()) return;
  if (b.dweight_transposed) {
    at::mm_out(t.dweight, t.x.t(), dz);
  } else {
    at::mm_out(t.dweight, dz.t(), t.x);
  }
}

void run_backward(const LayerBackwardProblem& b, BackwardTensors& t) {
  if (backward_path({b.rows, b.in_features, b.out_features, b.dtype}) == Path::library) {
    policy::count_library_backward();
    run_backward_by_library(b, t);
    return;
  }
  policy::count_fused_backward();
  if (!kernels().layer_backward(b, torch_threads())) run_backward_in_passes(b, t.dy.element_size());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_gelu_backward(
    const at::Tensor& grad_activated, const OptionalTensor& saved_z, const OptionalTensor& x,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& grad_shortcut,
    std::string_view activation_name, bool weight_column_major, std::array<bool, 3> output_mask) {
  const auto [need_x, need_weight, need_bias] = output_mask;
  const Activation activation = parse_activation(activation_name);
  check_backward(grad_activated, saved_z, x, weight, bias, grad_shortcut, activation, output_mask);
  const auto options = grad_activated.options();
  BackwardTensors t;
  t.dy = with_unit_column_stride(flatten_leading(grad_activated));
  if (activation != Activation::none)
    t.z = saved_z ? with_unit_column_stride(flatten_leading(*saved_z)) : recomputed_z(*x, *weight, bias);
  at::Tensor grad_x, grad_weight;
  if (need_x) {
    t.weight = *weight;
    grad_x = empty_output(grad_activated, weight->size(1));
    t.dx = grad_x.view({t.dy.size(0), weight->size(1)});
    if (grad_shortcut) t.grad_shortcut = with_unit_column_stride(flatten_leading(*grad_shortcut));
  }
  if (need_weight) {
    t.x = flatten_leading(*x);
    t.dweight_transposed = weight_column_major;
    const int64_t in_features = t.x.size(1), out_features = t.dy.size(1);
    t.dweight = weight_column_major ? at::empty({in_features, out_features}, options)
                                    : at::empty({out_features, in_features}, options);
    grad_weight = weight_column_major ? t.dweight.t() : t.dweight;
  }
  if (need_bias) t.db = at::empty({t.dy.size(1)}, options);
  run_backward(problem_of(t, activation), t);
  return {std::move(grad_x), std::move(grad_weight), std::move(t.db)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, CPU, m) {
  m.impl("linear_gelu_residual", linear_gelu_residual);
  m.impl("linear_gelu_concat", linear_gelu_concat);
  m.impl("linear_gelu_forward", linear_gelu_forward);
  m.impl("linear_gelu_backward", linear_gelu_backward);
}

}  // namespace fastlane
