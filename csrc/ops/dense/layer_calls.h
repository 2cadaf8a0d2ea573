// One layer on 2-D tensors: the parts of every operator.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/layer.h"
#include "ops/checks/checks.h"
#include "ops/dense/backend.h"
#include "ops/own_calls.h"
#include "ops/packed_weight.h"

namespace fastlane {

// (..., cols) → (rows, cols): a view where the strides allow it, otherwise a copy.
at::Tensor flatten_leading(const at::Tensor& t);

// The epilogue and the elementwise pass read rows of unit stride.
at::Tensor with_unit_column_stride(const at::Tensor& t);

// An undefined tensor has no data.
inline const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* mutable_data_of(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
inline ConstMatrix matrix(const at::Tensor& t) {
  return t.defined() ? ConstMatrix{t.const_data_ptr(), t.stride(0), t.stride(1)} : ConstMatrix{};
}
inline ConstRowMajor row_major(const at::Tensor& t) {
  return t.defined() ? ConstRowMajor{t.const_data_ptr(), t.stride(0)} : ConstRowMajor{};
}
inline RowMajor mutable_row_major(const at::Tensor& t) {
  return t.defined() ? RowMajor{t.mutable_data_ptr(), t.stride(0)} : RowMajor{};
}

// The weight of a forward's problem: a plain one, or one whose panels kernels read (packed_weight.h).
inline Weight weight_of(const at::Tensor& t) {
  return is_packed(t) ? Weight{{}, panels_of(t)} : Weight{matrix(t), {}};
}

// The leading sizes of x, then `features`; contiguous.
at::Tensor empty_output(const at::Tensor& x, int64_t features);

// The gradient of a weight, in the weight's own layout. A kernel writes its rows to `storage`.
struct WeightGradient {
  at::Tensor gradient, storage;
  bool transposed = false;

  WeightGradient() = default;
  WeightGradient(int64_t out_features, int64_t in_features, bool column_major, const at::TensorOptions& options);
};

struct Operands {
  at::Tensor x, weight, bias, residual;  // 2-D, 2-D or packed, contiguous 1-D, 2-D with unit column stride
  LayerShape shape;
};

// `may_be_frozen`: no gradient is needed, so a frozen weight may give its packed copy.
Operands flatten_operands(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, bool may_be_frozen);

// Expands to (leading sizes of x..., out_features), then flattens; the result has unit column stride.
at::Tensor flatten_residual(const at::Tensor& residual, const at::Tensor& x, int64_t out_features);

// x Wᵀ + b, (rows, out_features).
at::Tensor computed_z(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias);

// Writes act(z) + residual to `activated`: a whole tensor, or a slice of the concatenation's rows. Returns the path.
Path layer_forward(const Operands& o, Activation activation, const at::Tensor& z, const at::Tensor& activated);

// The operands and results of a backward as 2-D tensors; undefined where not needed.
struct BackwardTensors {
  at::Tensor dy, z, x, weight, grad_shortcut;
  at::Tensor dx, dweight, db;
  bool dweight_transposed = false;
};

Path layer_backward(const BackwardTensors& t, Activation activation);

// A layer of a network, as the backward of the layer after it sees it. That backward forms dh, the gradient of this
// layer's output, and may form this layer's dz = dh ⊙ act′(z) and db with it.
struct NetworkLayer {
  Activation activation = Activation::none;
  at::Tensor z, db;  // db is undefined where not needed
  bool needs_dh = false;  // this layer's shortcut reads dh beside dz; otherwise dz may overwrite dh
  at::Tensor dz;  // undefined until it is formed; db is written with it
};

// The backward of `layer`. It starts from layer.dz if layer.dz is defined, otherwise from dh; `t` holds the other
// tensors. With `before`, the layer before it, t.dx is the dh of `before`, and before->dz may be formed.
Path layer_backward(BackwardTensors t, const NetworkLayer& layer, const at::Tensor& dh,
                    NetworkLayer* before = nullptr);

}  // namespace fastlane
