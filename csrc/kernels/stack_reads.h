// A stack's backward reads these tensors again. Autograd saves no other, and the kernels read no other.
#pragma once

#include <cstdint>

namespace fastlane {

// A layer's shortcut, whether it keeps z, and which of its gradients are needed.
struct StackLayerUse {
  bool adds_input = false, projects = false;
  bool keeps_z = false;
  bool dweight = false, db = false, dprojection = false, dprojection_bias = false;

  bool any_gradient() const { return dweight || db || dprojection || dprojection_bias; }
};

struct StackLayerReads {
  bool dh = false;  // forms the gradient of the layer's input, from weight and projection
  bool slope = false;  // act′(z)
  bool output = false;  // forms the layer's output again, from z and from the input or its projection with a bias
  bool input = false;  // the layer's input
  bool forms_z = false;  // computes z again, from input, weight and bias

  bool z() const { return slope || output; }
  bool weight() const { return dh || forms_z; }
  bool projection() const { return dh || output; }
};

// Calls `layer_reads(i, StackLayerReads)` from the last layer to the first; `use_of(i)` returns a StackLayerUse.
// Returns the layer at which the backward ends.
template <class UseOf, class LayerReads>
int64_t stack_reads(int64_t count, bool needs_dx, bool has_slope, bool concat, UseOf use_of, LayerReads layer_reads) {
  int64_t first = 0;
  while (!needs_dx && first < count && !use_of(first).any_gradient()) ++first;
  bool output = false;
  for (int64_t i = count - 1; i >= 0; --i) {
    const StackLayerUse use = use_of(i);
    StackLayerReads r;
    r.dh = i > first || (i == 0 && needs_dx);
    r.slope = has_slope && i >= first;
    r.output = output;
    r.forms_z = r.z() && !use.keeps_z;
    r.input = use.dweight || use.dprojection || r.forms_z || (r.output && (use.adds_input || use.projects || concat));
    output = r.input;
    layer_reads(i, r);
  }
  return first;
}

}  // namespace fastlane
