// The results of a stack's backward.
#pragma once

#include <ATen/ops/empty.h>

#include <vector>

#include "layer_calls.h"
#include "stack.h"

namespace fastlane {

// The gradients that are needed, and where a kernel writes them. Lives no longer than what it was made of.
class StackGradients {
 public:
  at::Tensor x;  // 2-D
  std::vector<WeightGradient> weights, projections;
  std::vector<at::Tensor> biases, projection_biases;

  StackGradients(const at::Tensor& input, const StackParameters& parameters, int64_t rows, at::IntArrayRef needed)
      : weights(parameters.layers()),
        projections(parameters.layers()),
        biases(parameters.layers()),
        projection_biases(parameters.layers()),
        input_(input),
        parameters_(parameters),
        rows_(rows),
        needed_(needed),
        is_needed_(1 + 4 * parameters.layers()) {
    for (const int64_t position : needed) is_needed_[static_cast<size_t>(position)] = true;
    for (size_t layer = 0; layer < parameters.layers(); ++layer) {
      allocate(kBiases, layer, biases[layer]);
      allocate(kProjectionBiases, layer, projection_biases[layer]);
    }
  }

  bool needs_x() const { return is_needed_[0]; }

  // The layer at which the backward ends.
  size_t first_needed() const {
    size_t i = 0;
    while (i < weights.size() && !(i == 0 && is_needed_[0]) && !any_needed(i)) ++i;
    return i;
  }

  // All but the biases'. To be called before a layer's backward: where layers run one after the other, those that
  // have run have given back memory by then.
  void allocate(size_t layer) {
    if (layer == 0 && is_needed_[0]) {
      x_gradient_ = empty_output(input_, input_.size(-1));
      x = x_gradient_.view({rows_, input_.size(-1)});
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
  // As they follow each other in `needed`.
  enum List { kWeights, kBiases, kProjections, kProjectionBiases, kLists };

  void allocate(List list, size_t layer, WeightGradient& gradient) const {
    if (!is_needed_[position_of(list, layer)]) return;
    const at::Tensor& t = tensor_at(list, layer);
    gradient = WeightGradient(t.size(0), t.size(1), is_column_major(t), input_.options());
  }
  void allocate(List list, size_t layer, at::Tensor& gradient) const {
    if (is_needed_[position_of(list, layer)])
      gradient = at::empty({tensor_at(list, layer).size(0)}, input_.options());
  }
  const at::Tensor& tensor_at(List list, size_t layer) const {
    return stack_tensor(input_, parameters_, static_cast<int64_t>(position_of(list, layer)));
  }
  size_t position_of(int list, size_t layer) const { return 1 + static_cast<size_t>(list) * weights.size() + layer; }
  bool any_needed(size_t layer) const {
    for (int list = 0; list < kLists; ++list)
      if (is_needed_[position_of(list, layer)]) return true;
    return false;
  }

  const at::Tensor& input_;
  const StackParameters& parameters_;
  int64_t rows_;
  at::IntArrayRef needed_;
  std::vector<bool> is_needed_;
  at::Tensor x_gradient_;
};

}  // namespace fastlane
