#include "cpu_layer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "../kernels/cpu/dispatch.h"
#include "../kernels/cpu/scratch.h"

namespace fastlane {
namespace {

int64_t leading_size(const at::Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
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

void run_backward_by_library(const LayerBackwardProblem& b, const BackwardTensors& t) {
  at::Tensor dz = forms_dz(b) ? at::empty({b.rows, b.out_features}, t.dy.options()) : t.dy;
  run_preactivation_grad(b, forms_dz(b) ? dz.mutable_data_ptr() : nullptr);
  const OwnCalls own_calls;
  at::Tensor dx = t.dx, dweight = t.dweight;
  if (dx.defined()) {
    if (t.grad_shortcut.defined()) {
      at::addmm_out(dx, t.grad_shortcut, dz, t.weight);
    } else {
      at::mm_out(dx, dz, t.weight);
    }
  }
  if (!dweight.defined()) return;
  if (b.dweight_transposed) {
    at::mm_out(dweight, t.x.t(), dz);
  } else {
    at::mm_out(dweight, dz.t(), t.x);
  }
}

}  // namespace

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

void run_backward(Path path, const BackwardTensors& t, Activation activation) {
  const LayerBackwardProblem b = problem_of(t, activation);
  if (path == Path::library) {
    run_backward_by_library(b, t);
  } else if (!kernels().layer_backward(b, torch_threads())) {
    run_backward_in_passes(b, t.dy.element_size());
  }
}

}  // namespace fastlane
