// The plain structs that pass from the torch side to the kernels.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/epilogue.h"
#include "kernels/matrix.h"

namespace fastlane {

// A B and an epilogue. Forward, dgrad and wgrad are this one problem with different operand layouts and epilogues
// (see layer.h).
struct GemmProblem {
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::f32;  // of every operand
  ConstMatrix a;  // m × k
  ConstMatrix b;  // k × n; not read where `b_panels` is present
  Panels b_panels;
  // If set, memory holds this operand's pre-activation, and the product multiplies its activation.
  Activation a_activation = Activation::none, b_activation = Activation::none;
  bool ends_in_gradient = false;  // `gradient` ends the product, otherwise `epilogue`
  Epilogue epilogue;
  GradientEpilogue gradient;

  const ConstRowMajor& addend() const { return ends_in_gradient ? gradient.addend : epilogue.addend; }
  const RowMajor& out() const { return ends_in_gradient ? gradient.out : epilogue.out; }
};

// Copies B, k × n, to panels: of type T's compute type, or of pairs along k where the kernel set multiplies pairs.
// Only the set that wrote panels can read them.
struct PanelsProblem {
  int64_t n = 0, k = 0;
  DType dtype = DType::f32;
  ConstMatrix b;
  void* panels = nullptr;
};

// The way back: writes B's values to memory with these strides.
struct UnpackProblem {
  int64_t n = 0, k = 0;
  DType dtype = DType::f32;
  const void* panels = nullptr;
  void* b = nullptr;
  int64_t n_stride = 0, k_stride = 0;
};

// The epilogue of a product that lies in memory, m × n. The product may lie in z or out.
struct EpilogueProblem {
  int64_t m = 0, n = 0;
  DType dtype = DType::f32;  // of every operand
  ConstRowMajor product;
  Epilogue epilogue;
};

// dz = dy ⊙ act′(z) and, in the same pass, db = Σ_rows dz. Either result may be absent. Without an activation z is
// not read. dz may lie in dy's memory.
struct PreActivationGradProblem {
  int64_t rows = 0, cols = 0;
  DType dtype = DType::f32;  // of every operand
  Activation activation = Activation::none;
  ConstRowMajor dy;
  ConstRowMajor z;
  RowMajor dz;
  void* db = nullptr;  // summed before dz is rounded
};

// The whole backward of a layer. dz is as above, then
//   dx = dz W + shortcut_grad        dW = dzᵀ x        db = Σ_rows dz
// An absent result has a null data pointer. Operands that only this result needs are not read.
struct LayerBackwardProblem {
  int64_t rows = 0, in_features = 0, out_features = 0;
  DType dtype = DType::f32;  // of every operand
  Activation activation = Activation::none;
  ConstRowMajor dy;
  ConstRowMajor z;
  ConstMatrix x;
  ConstMatrix weight;  // out_features × in_features
  ConstRowMajor shortcut_grad;
  RowMajor dx;
  RowMajor dweight;  // dW, or its transpose if `dweight_transposed`
  bool dweight_transposed = false;
  void* db = nullptr;
};

// z = x W₁ᵀ + b₁;  y = act(z) W₂ᵀ + b₂ + residual. Absent operands have a null data pointer.
struct MlpProblem {
  int64_t rows = 0, in_features = 0, hidden = 0, out_features = 0;
  DType dtype = DType::f32;  // of every operand
  Activation activation = Activation::none;
  ConstMatrix x;
  Weight fc1_weight;  // hidden × in_features
  const void* fc1_bias = nullptr;
  Weight fc2_weight;  // out_features × hidden
  const void* fc2_bias = nullptr;
  ConstRowMajor residual;
  RowMajor z, y;
};

// The backward of an MLP, which computes the hidden activations again from z:
//   dz = (dy W₂) ⊙ act′(z)    dx = dz W₁ + shortcut_grad    dW₁ = dzᵀ x    dW₂ = dyᵀ act(z)
// The biases' gradients are the sums of dz and dy over the rows. An absent result has a null data pointer. Operands
// that only this result needs are not read.
struct MlpBackwardProblem {
  int64_t rows = 0, in_features = 0, hidden = 0, out_features = 0;
  DType dtype = DType::f32;  // of every operand
  Activation activation = Activation::none;
  ConstRowMajor dy, z;
  ConstMatrix x, fc1_weight, fc2_weight;
  ConstRowMajor shortcut_grad;
  RowMajor dx;
  RowMajor dfc1_weight, dfc2_weight;  // the gradients, or their transposes if `…_transposed`
  bool dfc1_transposed = false, dfc2_transposed = false;
  void *dfc1_bias = nullptr, *dfc2_bias = nullptr;
};

// A layer of a stack, with the results of its backward. Absent operands have a null data pointer.
struct StackLayer {
  int64_t in_features = 0, out_features = 0;
  ConstMatrix weight;  // out_features × in_features
  Panels panels;  // if present, forward reads these instead
  const void* bias = nullptr;
  // The shortcut is the layer's input, the input's projection, or none. A concatenating stack sets neither field.
  bool adds_input = false;
  ConstMatrix projection;  // out_features × in_features
  Panels projection_panels;
  const void* projection_bias = nullptr;
  RowMajor z;  // rows × out_features; forward writes z if present, backward reads it

  RowMajor dweight, dprojection;  // the gradients, or their transposes if `…_transposed`
  bool dweight_transposed = false, dprojection_transposed = false;
  void *db = nullptr, *dprojection_bias = nullptr;

  bool projects() const { return projection.data || projection_panels.data; }
};

// h₀ = x, hᵢ₊₁ = act(zᵢ) + shortcut(hᵢ) with zᵢ = hᵢ Wᵢᵀ + bᵢ, or [hᵢ, act(zᵢ)] where `concat`; y is the last h.
struct StackProblem {
  int64_t rows = 0;
  DType dtype = DType::f32;  // of every operand
  Activation activation = Activation::none;
  bool concat = false;
  const StackLayer* layers = nullptr;
  int64_t count = 0;
  ConstRowMajor x;
  RowMajor y;
  ConstRowMajor dy;
  RowMajor dx;
};

}  // namespace fastlane
