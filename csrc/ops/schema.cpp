#include <torch/library.h>

// For the layer, the MLP and the stack, the public operators come first. Autograd decides which tensors to save and
// calls the _forward and _backward operators. These appear in compiled graphs and have no derivative of their own.
TORCH_LIBRARY(fastlane, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "linear_gelu_residual(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, *, "
      "str activation='gelu', bool recompute=False) -> Tensor",
      tags);
  m.def("linear_gelu_concat(Tensor x, Tensor weight, Tensor? bias=None, *, str activation='gelu') -> Tensor", tags);
  m.def(
      "linear_gelu_forward(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, *, str activation, "
      "bool concat) -> (Tensor y, Tensor z)",
      tags);
  m.def(
      "linear_gelu_backward(Tensor grad_activated, Tensor? z=None, Tensor? x=None, Tensor? weight=None, "
      "Tensor? bias=None, Tensor? grad_shortcut=None, *, str activation, bool weight_column_major, bool[3] "
      "output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
      tags);
  m.def(
      "mlp_residual(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "Tensor? residual=None, *, str activation='gelu', bool recompute=False) -> Tensor",
      tags);
  m.def(
      "mlp_forward(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias=None, "
      "Tensor? residual=None, *, str activation) -> (Tensor y, Tensor z)",
      tags);
  m.def(
      "mlp_backward(Tensor grad, Tensor? z=None, Tensor? x=None, Tensor? fc1_weight=None, Tensor? fc1_bias=None, "
      "Tensor? fc2_weight=None, Tensor? grad_shortcut=None, *, str activation, bool fc1_column_major, bool "
      "fc2_column_major, bool[5] output_mask) "
      "-> (Tensor grad_x, Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor "
      "grad_fc2_bias)",
      tags);
  m.def(
      "residual_stack(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] projections, "
      "Tensor?[] projection_biases, *, str shortcut='identity', str activation='gelu', "
      "bool recompute=False) -> Tensor",
      tags);
  // z holds every layer's z, one after the other; a backward without z computes it again. `needed` and `column_major`
  // list positions (ops/checks/stack.h), and the result lists the gradients of `needed`. `features` are x's, then
  // each layer's output features, because a tensor that is not read may be absent. Only a device's own backward can
  // read the z of its forward: a narrow stack on CUDA stores its layers' outputs in z (kernels/cuda/narrow/stack.h).
  m.def(
      "residual_stack_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] projections, "
      "Tensor?[] projection_biases, *, str shortcut, str activation) -> (Tensor y, Tensor z)",
      tags);
  m.def(
      "residual_stack_backward(Tensor grad, Tensor? x, Tensor?[] weights, Tensor?[] biases, Tensor?[] projections, "
      "Tensor?[] projection_biases, Tensor? z=None, *, SymInt[] features, str shortcut, str activation, int[] "
      "needed, "
      "int[] column_major) -> Tensor[]",
      tags);
}
