#include "ops/dense/layer_calls.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

namespace fastlane {
namespace {

int64_t leading_size(const at::Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

LayerBackwardProblem problem_of(const BackwardTensors& t, Activation activation) {
  LayerBackwardProblem b;
  b.rows = t.dy.size(0), b.out_features = t.dy.size(1);
  if (t.weight.defined()) b.in_features = t.weight.size(1);
  if (t.x.defined()) b.in_features = t.x.size(1);
  b.dtype = dtype_of(t.dy), b.activation = activation;
  b.dy = row_major(t.dy), b.z = row_major(t.z), b.shortcut_grad = row_major(t.grad_shortcut);
  b.x = matrix(t.x), b.weight = matrix(t.weight);
  b.dx = mutable_row_major(t.dx), b.dweight = mutable_row_major(t.dweight),
  b.dweight_transposed = t.dweight_transposed;
  b.db = mutable_data_of(t.db);
  return b;
}

Path dgrad(const GemmProblem& p, const BackwardTensors& t, const at::Tensor& dz) {
  if (const TakenPath taken = backend_of(dz).dgrad(p)) return *taken;
  const OwnCalls own_calls;
  at::Tensor dx = t.dx;
  if (t.grad_shortcut.defined()) {
    at::addmm_out(dx, t.grad_shortcut, dz, t.weight);
  } else {
    at::mm_out(dx, dz, t.weight);
  }
  return Path::library;
}

// Forms dx and, in the dgrad kernel's epilogue, dz and db of the layer before; or does nothing if there is no such
// kernel.
TakenPath dgrad_through_in_epilogue(const GemmProblem& dgrad, const BackwardTensors& t, NetworkLayer& before) {
  const Backend& backend = backend_of(t.dx);
  GemmProblem p = through_activation(dgrad, before.activation, row_major(before.z), mutable_data_of(before.db));
  if (before.needs_dh) p.gradient.unscaled = dgrad.out();
  if (!backend.takes_dgrad(p)) return std::nullopt;
  at::Tensor dz = before.needs_dh ? at::empty(t.dx.sizes(), t.dx.options()) : t.dx;
  p.gradient.out = mutable_row_major(dz);
  const TakenPath taken = backend.dgrad(p);
  if (taken) before.dz = std::move(dz);
  return taken;
}

// Forms dx, and dz and db of the layer before: in dgrad's epilogue, or by a pass in place. If the layer before needs
// dx as its dh, it makes the pass itself, when this layer's memory is free again.
Path dgrad_through(const GemmProblem& problem, const BackwardTensors& t, const at::Tensor& dz, NetworkLayer& before) {
  if (const TakenPath taken = dgrad_through_in_epilogue(problem, t, before)) return *taken;
  const Path path = dgrad(problem, t, dz);
  if (before.needs_dh) return path;
  before.dz = t.dx;
  PreActivationGradProblem p;
  p.rows = problem.m, p.cols = problem.n, p.dtype = problem.dtype, p.activation = before.activation;
  p.dy = row_major(t.dx), p.z = row_major(before.z), p.dz = mutable_row_major(before.dz);
  p.db = mutable_data_of(before.db);
  backend_of(dz).preactivation_grad(p);
  return path;
}

// One elementwise pass, then dx by a kernel or the library, dW by the library.
Path backward_in_products(const LayerBackwardProblem& b, const BackwardTensors& t, NetworkLayer* before) {
  at::Tensor dz = forms_dz(b) ? at::empty({b.rows, b.out_features}, t.dy.options()) : t.dy;
  form_dz(b, forms_dz(b) ? dz.mutable_data_ptr() : nullptr, backend_of(t.dy).preactivation_grad);
  Path path = Path::library;
  if (t.dx.defined()) {
    const GemmProblem problem = dgrad_gemm(shape_of(b), matrix(dz), b.weight, b.shortcut_grad, b.dx);
    const bool goes_on = before && before->activation != Activation::none;
    path = goes_on ? dgrad_through(problem, t, dz, *before) : dgrad(problem, t, dz);
  }
  at::Tensor dweight = t.dweight;
  if (!dweight.defined()) return path;
  const OwnCalls own_calls;
  if (b.dweight_transposed) {
    at::mm_out(dweight, t.x.t(), dz);
  } else {
    at::mm_out(dweight, dz.t(), t.x);
  }
  return path;
}

Path backward_of(const BackwardTensors& t, Activation activation, NetworkLayer* before) {
  const LayerBackwardProblem b = problem_of(t, activation);
  const TakenPath taken = backend_of(t.dy).layer_backward(b);
  return taken ? *taken : backward_in_products(b, t, before);
}

}  // namespace

at::Tensor flatten_leading(const at::Tensor& t) {
  return t.dim() == 2 ? t : t.reshape({leading_size(t), t.size(-1)});
}

at::Tensor with_unit_column_stride(const at::Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous();
}

at::Tensor empty_output(const at::Tensor& x, int64_t features) {
  at::DimVector sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(features);
  return at::empty(sizes, x.options());
}

WeightGradient::WeightGradient(int64_t out_features, int64_t in_features, bool column_major,
                               const at::TensorOptions& options)
    : storage(column_major ? at::empty({in_features, out_features}, options)
                           : at::empty({out_features, in_features}, options)),
      transposed(column_major) {
  gradient = column_major ? storage.t() : storage;
}

at::Tensor flatten_residual(const at::Tensor& residual, const at::Tensor& x, int64_t out_features) {
  at::DimVector sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(out_features);
  return with_unit_column_stride(flatten_leading(residual.expand(sizes)));
}

Operands flatten_operands(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, bool may_be_frozen) {
  Operands o;
  o.x = flatten_leading(x);
  o.weight = operand_weight(weight, may_be_frozen ? std::optional(o.x.size(0)) : std::nullopt);
  if (bias) o.bias = bias->contiguous();
  if (residual) o.residual = flatten_residual(*residual, x, weight.size(0));
  o.shape = {o.x.size(0), o.x.size(1), weight.size(0), dtype_of(x)};
  return o;
}

at::Tensor computed_z(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  const Operands o = flatten_operands(x, weight, bias, std::nullopt, /*may_be_frozen=*/false);
  at::Tensor z = at::empty({o.shape.rows, o.shape.out_features}, x.options());
  layer_forward(o, Activation::none, {}, z);
  return z;
}

Path layer_forward(const Operands& o, Activation activation, const at::Tensor& z, const at::Tensor& activated) {
  const GemmProblem p = forward_gemm(o.shape, matrix(o.x), weight_of(o.weight), data_of(o.bias), activation,
                                     row_major(o.residual), mutable_row_major(z), mutable_row_major(activated));
  if (const TakenPath taken = backend_of(o.x).gemm(p)) return *taken;
  at::Tensor product = z.defined() ? z : activated;
  EpilogueProblem rest;
  rest.m = p.m, rest.n = p.n, rest.dtype = p.dtype, rest.product = row_major(product), rest.epilogue = p.epilogue;
  {
    const OwnCalls own_calls;
    if (o.bias.defined()) {
      // A 16-bit product is rounded when it is stored, so the library has to add the bias before.
      at::addmm_out(product, o.bias, o.x, o.weight.t());
      rest.epilogue.bias = nullptr;
    } else {
      at::mm_out(product, o.x, o.weight.t());
    }
  }
  const bool is_finished =
      p.out().data == product.const_data_ptr() && activation == Activation::none && !p.addend().data;
  if (!is_finished) backend_of(o.x).epilogue(rest);
  return Path::library;
}

Path layer_backward(const BackwardTensors& t, Activation activation) { return backward_of(t, activation, nullptr); }

Path layer_backward(BackwardTensors t, const NetworkLayer& layer, const at::Tensor& dh, NetworkLayer* before) {
  t.dy = layer.dz.defined() ? layer.dz : dh;
  if (layer.dz.defined()) return backward_of(t, Activation::none, before);
  t.db = layer.db;
  if (layer.activation != Activation::none) t.z = layer.z;
  return backward_of(t, layer.activation, before);
}

}  // namespace fastlane
