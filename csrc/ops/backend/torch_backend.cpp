// The backend of a CPU without vector kernels of ours: the library's products, and torch's own vectorised operators
// for the passes around them.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sum.h>

#include "ops/composition.h"
#include "ops/dense/layer_calls.h"

namespace fastlane {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::f64: return at::kDouble;
    case DType::bf16: return at::kBFloat16;
    case DType::f16: return at::kHalf;
    case DType::f32: break;
  }
  return at::kFloat;
}

at::Tensor tensor(const void* data, at::IntArrayRef sizes, at::IntArrayRef strides, DType dtype) {
  return at::from_blob(const_cast<void*>(data), sizes, strides, at::TensorOptions(scalar_type(dtype)));
}

// torch calls oneDNN for GELU, and oneDNN refuses rows that share memory.
at::Tensor operand(const ConstRowMajor& m, int64_t rows, int64_t cols, DType dtype) {
  const at::Tensor t = tensor(m.data, {rows, cols}, {m.row_stride, 1}, dtype);
  return m.row_stride < cols ? t.contiguous() : t;
}
at::Tensor result(const RowMajor& m, int64_t rows, int64_t cols, DType dtype) {
  return tensor(m.data, {rows, cols}, {m.row_stride, 1}, dtype);
}

TakenPath leave_gemm(const GemmProblem&) { return std::nullopt; }
TakenPath leave_layer_backward(const LayerBackwardProblem&) { return std::nullopt; }
bool take_no_dgrad(const GemmProblem&) { return false; }
TakenPath leave_mlp_forward(const MlpProblem&) { return std::nullopt; }
TakenPath leave_mlp_backward(const MlpBackwardProblem&) { return std::nullopt; }
bool is_never_one_kernel(const StackProblem&) { return false; }
void no_stack_kernel(const StackProblem&) { TORCH_INTERNAL_ASSERT(false, "a stack goes layer by layer here"); }

// The library's product has added the bias. If there is a z, the product lies in z.
void epilogue(const EpilogueProblem& p) {
  const Epilogue& e = p.epilogue;
  TORCH_INTERNAL_ASSERT(!e.bias && (!e.z.data || e.z.data == p.product.data));
  const OwnCalls own_calls;
  const at::Tensor z = operand(p.product, p.m, p.n, p.dtype);
  at::Tensor out = result(e.out, p.m, p.n, p.dtype);
  const at::Tensor addend =
      e.addend.data ? tensor(e.addend.data, {p.m, p.n}, {e.addend.row_stride, 1}, p.dtype) : at::Tensor();
  if (e.activation != Activation::none) {
    composition::activate_into(out, z, e.activation);
    if (addend.defined()) out.add_(addend);
  } else if (addend.defined()) {
    at::add_out(out, z, addend);
  } else if (e.out.data != p.product.data) {
    out.copy_(z);
  }
}

void preactivation_grad(const PreActivationGradProblem& p) {
  const OwnCalls own_calls;
  at::Tensor dz = operand(p.dy, p.rows, p.cols, p.dtype);
  if (p.activation != Activation::none) {
    const at::Tensor dy = dz, z = operand(p.z, p.rows, p.cols, p.dtype);
    dz = p.dz.data ? result(p.dz, p.rows, p.cols, p.dtype) : at::empty({p.rows, p.cols}, dy.options());
    composition::preactivation_grad_into(dz, dy, z, p.activation);
  } else if (p.dz.data && p.dz.data != p.dy.data) {
    result(p.dz, p.rows, p.cols, p.dtype).copy_(dz);
  }
  if (!p.db) return;
  at::Tensor db = tensor(p.db, {p.cols}, {1}, p.dtype);
  at::sum_out(db, dz, /*dim=*/0);
}

}  // namespace

const Backend& torch_backend() {
  static constexpr Backend backend{
      .gemm = leave_gemm,
      .layer_backward = leave_layer_backward,
      .dgrad = leave_gemm,
      .takes_dgrad = take_no_dgrad,
      .mlp_forward = leave_mlp_forward,
      .mlp_backward = leave_mlp_backward,
      .epilogue = epilogue,
      .preactivation_grad = preactivation_grad,
      .is_one_kernel = is_never_one_kernel,
      .stack_forward = no_stack_kernel,
      .stack_backward = no_stack_kernel,
      .in_passes = Path::torch,
  };
  return backend;
}

}  // namespace fastlane
