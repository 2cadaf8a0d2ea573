// The results of a stack's backward.
#pragma once

#include <ATen/ops/empty.h>

#include <vector>

#include "ops/checks/stack.h"
#include "ops/dense/layer_calls.h"

namespace fastlane {

// The gradients that are needed, and the memory that a kernel writes them to. Keeps references to its arguments.
class StackGradients {
 public:
  at::Tensor x;  // 2-D
  std::vector<WeightGradient> weights, projections;
  std::vector<at::Tensor> biases, projection_biases;

  // `column_major` lists the positions of column-major parameters; their gradients get the same layout.
  StackGradients(const at::Tensor& grad, const std::vector<StackLayer>& layers, int64_t rows, at::IntArrayRef needed,
                 at::IntArrayRef column_major)
      : weights(layers.size()),
        projections(layers.size()),
        biases(layers.size()),
        projection_biases(layers.size()),
        grad_(grad),
        layers_(layers),
        rows_(rows),
        needed_(needed),
        is_needed_(stack_flags(needed, layers.size())),
        is_column_major_(stack_flags(column_major, layers.size())) {
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      allocate(kBiases, layer, biases[layer]);
      allocate(kProjectionBiases, layer, projection_biases[layer]);
    }
  }

  bool needs_x() const { return is_needed_[0]; }

  // Allocates a layer's gradients, except those of biases. Call it just before the layer's backward: if layers run
  // one after the other, earlier ones have given back memory by then.
  void allocate(size_t layer) {
    if (layer == 0 && is_needed_[0]) {
      x_gradient_ = empty_output(grad_, layers_[0].in_features);
      x = x_gradient_.view({rows_, layers_[0].in_features});
    }
    allocate(kWeights, layer, weights[layer]);
    allocate(kProjections, layer, projections[layer]);
  }

  std::vector<at::Tensor> in_order() const {
    std::vector<at::Tensor> gradients;
    for (const int64_t position : needed_) {
      if (position == 0) {
        gradients.push_back(x_gradient_);
        continue;
      }
      const auto index = static_cast<size_t>(position - 1);
      const size_t list = index / weights.size(), i = index % weights.size();
      gradients.push_back(list % 2 == 0 ? (list == 0 ? weights : projections)[i].gradient
                                        : (list == 1 ? biases : projection_biases)[i]);
    }
    return gradients;
  }

 private:
  void allocate(StackList list, size_t layer, WeightGradient& gradient) const {
    const size_t position = position_of(list, layer);
    if (!is_needed_[position]) return;
    const StackLayer& l = layers_[layer];
    gradient = WeightGradient(l.out_features, l.in_features, is_column_major_[position], grad_.options());
  }
  void allocate(StackList list, size_t layer, at::Tensor& gradient) const {
    if (is_needed_[position_of(list, layer)]) gradient = at::empty({layers_[layer].out_features}, grad_.options());
  }
  size_t position_of(StackList list, size_t layer) const { return 1 + list * weights.size() + layer; }

  const at::Tensor& grad_;
  const std::vector<StackLayer>& layers_;
  int64_t rows_;
  at::IntArrayRef needed_;
  std::vector<bool> is_needed_, is_column_major_;
  at::Tensor x_gradient_;
};

}  // namespace fastlane
