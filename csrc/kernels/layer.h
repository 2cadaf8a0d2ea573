// The three products of a linear layer as GEMM problems. Only this file says which operand a product transposes and
// what its epilogue adds.
#pragma once

#include "kernels/problem.h"

namespace fastlane {

struct LayerShape {
  int64_t rows, in_features, out_features;
  DType dtype;
};

// y = act(x Wᵀ + bias) + residual, with z = x Wᵀ + bias stored where `z.data` is given.
inline GemmProblem forward_gemm(const LayerShape& shape, ConstMatrix x, const Weight& weight, const void* bias,
                                Activation activation, ConstRowMajor residual, RowMajor z, RowMajor y) {
  GemmProblem p;
  p.m = shape.rows, p.n = shape.out_features, p.k = shape.in_features;
  p.dtype = shape.dtype;
  p.a = x, p.b = weight.matrix.transposed(), p.b_panels = weight.panels;
  p.epilogue.activation = activation, p.epilogue.bias = bias, p.epilogue.addend = residual;
  p.epilogue.z = z, p.epilogue.out = y;
  return p;
}

// dgrad: dx = dz W + shortcut_grad.
inline GemmProblem dgrad_gemm(const LayerShape& shape, ConstMatrix dz, ConstMatrix weight,
                              ConstRowMajor shortcut_grad, RowMajor dx) {
  GemmProblem p;
  p.m = shape.rows, p.n = shape.in_features, p.k = shape.out_features;
  p.dtype = shape.dtype;
  p.a = dz, p.b = weight;
  p.epilogue.addend = shortcut_grad, p.epilogue.out = dx;
  return p;
}

// A dgrad that goes on through the activation of the layer before, whose z and db these are. The output is that
// layer's dz = dx ⊙ act′(z) instead of dx; db is the sum of dz's rows.
inline GemmProblem through_activation(GemmProblem dgrad, Activation activation, ConstRowMajor z, void* db) {
  dgrad.ends_in_gradient = true;
  GradientEpilogue& gradient = dgrad.gradient;
  gradient.activation = activation, gradient.addend = dgrad.epilogue.addend, gradient.preactivation = z;
  gradient.out = dgrad.epilogue.out, gradient.column_sums = db;
  dgrad.epilogue = {};
  return dgrad;
}

// wgrad: dW = dzᵀ x, or its transpose xᵀ dz where the weight itself is stored column-major.
inline GemmProblem wgrad_gemm(const LayerShape& shape, ConstMatrix dz, ConstMatrix x, bool column_major,
                              RowMajor dweight) {
  GemmProblem p;
  p.k = shape.rows;
  p.dtype = shape.dtype;
  p.epilogue.out = dweight;
  if (column_major) {
    p.m = shape.in_features, p.n = shape.out_features;
    p.a = x.transposed(), p.b = dz;
  } else {
    p.m = shape.out_features, p.n = shape.in_features;
    p.a = dz.transposed(), p.b = x;
  }
  return p;
}

inline LayerShape shape_of(const LayerBackwardProblem& b) { return {b.rows, b.in_features, b.out_features, b.dtype}; }

inline bool forms_dz(const LayerBackwardProblem& b) {
  return b.activation != Activation::none && (b.dx.data || b.dweight.data);
}

// Computes dz and db of a layer's backward by the elementwise pass `preactivation_grad`. dz goes to `memory` if dx or
// dW needs it. Returns where dz lies: without an activation dz is dy.
template <class Pass>
ConstRowMajor form_dz(const LayerBackwardProblem& b, void* memory, Pass preactivation_grad) {
  if (!b.db && b.activation == Activation::none) return b.dy;
  PreActivationGradProblem p;
  p.rows = b.rows, p.cols = b.out_features, p.dtype = b.dtype, p.activation = b.activation;
  p.dy = b.dy, p.z = b.z, p.db = b.db;
  if (forms_dz(b)) p.dz = {memory, b.out_features};
  preactivation_grad(p);
  return forms_dz(b) ? ConstRowMajor{memory, b.out_features} : b.dy;
}

}  // namespace fastlane
