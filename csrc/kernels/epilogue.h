// An epilogue turns the finished sums of a product, m × n, into its results. A product ends in one of the two
// epilogues below. An absent operand has a null data pointer.
#pragma once

#include "kernels/activation.h"
#include "kernels/matrix.h"

namespace fastlane {

// z = sums + bias;  out = act(z) + addend.
struct Epilogue {
  Activation activation = Activation::none;
  const void* bias = nullptr;  // n elements
  ConstRowMajor addend;
  RowMajor z;
  RowMajor slope;  // act′(z), float for 16-bit dtypes; for CPU kernels alone
  RowMajor out;
};

// Goes on through the activation of the layer before, whose z is `preactivation`:
//   unscaled = sums + addend;  out = unscaled ⊙ act′(preactivation);  column_sums = Σ_rows out
// Without an activation preactivation is not read. CPU kernels take neither addend nor unscaled, and need memory for
// column_sums.
struct GradientEpilogue {
  Activation activation = Activation::none;
  ConstRowMajor addend;
  ConstRowMajor preactivation;
  RowMajor unscaled;
  RowMajor out;
  void* column_sums = nullptr;  // n elements, summed before out is rounded
};

}  // namespace fastlane
