// The products of an MLP as GEMM problems, built from the products of its two layers.
#pragma once

#include "kernels/layer.h"

namespace fastlane {

template <class Problem>
LayerShape fc1_shape(const Problem& p) {
  return {p.rows, p.in_features, p.hidden, p.dtype};
}
template <class Problem>
LayerShape fc2_shape(const Problem& p) {
  return {p.rows, p.hidden, p.out_features, p.dtype};
}

// Rows [row, row + rows) of the problem.
inline MlpProblem rows_of(const MlpProblem& p, int64_t row, int64_t rows) {
  const int64_t bytes = element_size(p.dtype);
  const auto at = [&](const void* data, int64_t row_stride) {
    return data ? static_cast<const char*>(data) + row * row_stride * bytes : nullptr;
  };
  const auto mutable_at = [&](void* data, int64_t row_stride) {
    return data ? static_cast<char*>(data) + row * row_stride * bytes : nullptr;
  };
  MlpProblem part = p;
  part.rows = rows;
  part.x.data = at(p.x.data, p.x.row_stride);
  part.residual.data = at(p.residual.data, p.residual.row_stride);
  part.z.data = mutable_at(p.z.data, p.z.row_stride);
  part.y.data = mutable_at(p.y.data, p.y.row_stride);
  return part;
}

inline GemmProblem fc1_gemm(const MlpProblem& p, RowMajor hidden) {
  return forward_gemm(fc1_shape(p), p.x, p.fc1_weight, p.fc1_bias, p.activation, {}, p.z, hidden);
}
inline GemmProblem fc2_gemm(const MlpProblem& p, ConstRowMajor hidden) {
  return forward_gemm(fc2_shape(p), {hidden.data, hidden.row_stride, 1}, p.fc2_weight, p.fc2_bias, Activation::none,
                      p.residual, {}, p.y);
}

inline bool forms_dz(const MlpBackwardProblem& p) { return p.dx.data || p.dfc1_weight.data || p.dfc1_bias; }

// fc2's dgrad, which goes on through the activation and writes dz. `bias_gradient` gets the column sums of dz, even
// if nobody needs them.
inline GemmProblem dz_gemm(const MlpBackwardProblem& p, RowMajor dz, void* bias_gradient) {
  return through_activation(dgrad_gemm(fc2_shape(p), {p.dy.data, p.dy.row_stride, 1}, p.fc2_weight, {}, dz),
                            p.activation, p.z, bias_gradient);
}

// fc2's wgrad reads z. The product computes the hidden activations where it packs z.
inline GemmProblem fc2_wgrad_gemm(const MlpBackwardProblem& p) {
  GemmProblem gemm = wgrad_gemm(fc2_shape(p), {p.dy.data, p.dy.row_stride, 1}, {p.z.data, p.z.row_stride, 1},
                                p.dfc2_transposed, p.dfc2_weight);
  (p.dfc2_transposed ? gemm.a_activation : gemm.b_activation) = p.activation;
  return gemm;
}

}  // namespace fastlane
