// Differentiation of a layer as one node: the tensors that it saves, the gradients that it computes, and the calls
// that the ATen composition takes over.
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "ops/autograd/edges.h"
#include "ops/composition.h"
#include "ops/differentiation.h"
#include "ops/operators.h"
#include "ops/packed_weight.h"
#include "ops/policy.h"
#include "ops/torch_path.h"

namespace fastlane {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The source of the layer's addend. With `identity` the residual is x itself, and dgrad adds dy in its epilogue.
enum class Shortcut : int64_t { tensor_or_none, identity, concat };

struct LayerGradients {
  Tensor x, weight, bias;
};

// The differentiable formula, for double backward. `grad_z` is the gradient of the output z: a first backward used z.
LayerGradients composed_backward(const Tensor& grad_activated, const Tensor& grad_z, const Tensor& grad_shortcut,
                                 const Tensor& z, const Tensor& x, const Tensor& weight, Activation activation,
                                 bool need_x, bool need_weight, bool need_bias) {
  using differentiation::flatten_leading;
  Tensor dz = grad_activated.defined() ? composition::preactivation_grad(grad_activated, z, activation) : Tensor();
  if (grad_z.defined()) dz = dz.defined() ? dz + grad_z : grad_z;
  LayerGradients g;
  if (need_x) {
    g.x = at::matmul(dz, weight);
    if (grad_shortcut.defined()) g.x = g.x + grad_shortcut;
  }
  if (need_weight) g.weight = at::matmul(flatten_leading(dz).t(), flatten_leading(x));
  if (need_bias) g.bias = flatten_leading(dz).sum(0);
  return g;
}

class LinearGelu : public torch::autograd::Function<LinearGelu> {
 public:
  // The tensors with respect to which the node differentiates.
  enum Role : size_t { kX, kWeight, kBias, kResidual };

  // Compiled autograd may trace backward, which reads nothing but ctx.
  static constexpr bool is_traceable = true;

  // z is an output of the node, although no caller sees it. So a backward with create_graph unpacks a z that carries
  // its own history, and second derivatives need no other saved tensor.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, int64_t roles, Activation activation,
                               Shortcut shortcut, bool recompute) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto arguments = Edges::by_role(tensors, roles);
    const Tensor &x = arguments[kX], &weight = arguments[kWeight];
    const OptionalTensor bias = optional(arguments[kBias]), residual = optional(arguments[kResidual]);
    const bool need_x = x.requires_grad(), need_weight = weight.requires_grad();
    const bool need_bias = bias && bias->requires_grad();
    const bool need_z = (need_x || need_weight || need_bias) && activation != Activation::none;
    const bool concat = shortcut == Shortcut::concat;

    Tensor y, z;
    if (need_z && !recompute) {
      std::tie(y, z) = call_linear_gelu_forward(x, weight, bias, shortcut == Shortcut::identity ? x : residual,
                                                name_of(activation), concat);
    } else if (concat) {
      y = call_linear_gelu_concat(x, weight, bias, name_of(activation));
    } else {
      y = call_linear_gelu_residual(x, weight, bias, shortcut == Shortcut::identity ? x : residual,
                                    name_of(activation), recompute);
    }

    const bool recompute_z = need_z && recompute;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({need_weight || recompute_z ? x : Tensor(), need_x || recompute_z ? weight : Tensor(), z,
                            recompute_z && bias ? *bias : Tensor()});
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    ctx->saved_data["shortcut"] = static_cast<int64_t>(shortcut);
    ctx->saved_data["roles"] = roles;
    if (residual && residual->requires_grad()) ctx->saved_data["residual_sizes"] = residual->sym_sizes();
    if (concat) ctx->saved_data["in_features"] = x.sym_size(-1);
    if (need_weight) ctx->saved_data["weight_column_major"] = is_column_major(weight);
    return z.defined() ? variable_list{y, z} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& dy = grads[0];
    const Tensor grad_z = grads.size() > 1 ? grads[1] : Tensor();
    auto& saved = ctx->saved_data;
    std::array<bool, Edges::kMaxRoles> needed{};
    size_t edges = 0;
    Edges::for_each(saved["roles"].toInt(), [&](size_t place, size_t role) {
      needed[role] = ctx->needs_input_grad(place);
      edges = place + 1;
    });
    variable_list result(edges + kOtherArguments);
    if (!dy.defined() && !grad_z.defined()) return result;

    const auto activation = static_cast<Activation>(saved["activation"].toInt());
    const auto shortcut = static_cast<Shortcut>(saved["shortcut"].toInt());
    const bool need_x = needed[kX], need_weight = needed[kWeight], need_bias = needed[kBias];

    LayerGradients g;
    if (need_x || need_weight || need_bias) {
      Tensor grad_activated = dy, grad_shortcut = shortcut == Shortcut::identity ? dy : Tensor();
      if (shortcut == Shortcut::concat && dy.defined()) {
        const auto in_features = saved["in_features"].toSymInt();
        grad_shortcut = dy.narrow_symint(-1, 0, in_features);
        grad_activated = dy.narrow_symint(-1, in_features, dy.sym_size(-1) - in_features);
      }
      const bool column_major = need_weight && saved["weight_column_major"].toBool();
      g = gradients(ctx->get_saved_variables(), grad_activated, grad_z, grad_shortcut, activation, column_major,
                    {need_x, need_weight, need_bias});
    }
    Tensor grad_residual;
    if (needed[kResidual] && dy.defined())
      grad_residual = differentiation::residual_grad(dy, saved["residual_sizes"].toSymIntVector());
    const Tensor* const by_role[] = {&g.x, &g.weight, &g.bias, &grad_residual};
    Edges::for_each(saved["roles"].toInt(), [&](size_t place, size_t role) { result[place] = *by_role[role]; });
    return result;
  }

 private:
  static constexpr size_t kOtherArguments = 4;

  static LayerGradients gradients(const variable_list& saved, const Tensor& grad_activated, const Tensor& grad_z,
                                  const Tensor& grad_shortcut, Activation activation, bool weight_column_major,
                                  std::array<bool, 3> needed) {
    const Tensor &x = saved[0], &weight = saved[1], &saved_z = saved[2], &bias = saved[3];
    LayerGradients g;
    if (at::GradMode::is_enabled() || grad_z.defined()) {
      policy::leave_fused_path("backward with create_graph=True");
      const bool recompute = activation != Activation::none && !saved_z.defined();
      const Tensor z = recompute ? at::linear(x, weight, optional(bias)) : saved_z;
      return composed_backward(grad_activated, grad_z, grad_shortcut, z, x, weight, activation, needed[0], needed[1],
                               needed[2]);
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(g.x, g.weight, g.bias) =
        call_linear_gelu_backward(grad_activated, optional(saved_z), optional(x), optional(weight), optional(bias),
                                  optional(grad_shortcut), name_of(activation), weight_column_major, needed);
    return g;
  }
};

Tensor differentiable(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual,
                      Activation activation, Shortcut shortcut, bool recompute) {
  const bool x_first = reaches_x_before_weight(x, bias.defined());
  using Node = LinearGelu;
  const std::pair<size_t, const Tensor&> of_x{Node::kX, x}, of_weight{Node::kWeight, weight};
  const Edges edges(
      {{Node::kResidual, residual}, {Node::kBias, bias}, x_first ? of_x : of_weight, x_first ? of_weight : of_x});
  return Node::apply(at::TensorList(edges.tensors), edges.roles, activation, shortcut, recompute)[0];
}

Tensor linear_gelu_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, std::string_view activation_name, bool recompute) {
  const Activation activation = parse_activation(activation_name);
  const Tensor no_tensor;
  const Tensor &b = bias ? *bias : no_tensor, &r = residual ? *residual : no_tensor;
  const bool has_values = !lacks_values(weight);
  if (const char* reason = has_values ? reason_to_compose({x, weight, b, r}) : nullptr) {
    check_layer(x, weight, bias, residual);
    policy::leave_fused_path(reason);
    return composition::linear_gelu_residual(x, plain_weight(weight), bias, residual, activation);
  }
  check_backend("linear_gelu_residual", {{"x", x}, {"weight", weight}, {"bias", b}, {"residual", r}});
  if (has_values && !recompute && policy::runs_torch(x))
    return torch_path::linear_gelu_residual(x, plain_weight(weight), bias, residual, activation);
  if (!torch::autograd::compute_requires_grad(x, weight, b, r)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_linear_gelu_residual(x, weight, bias, residual, activation_name, recompute);
  }
  check_not_packed("linear_gelu_residual", "weight", weight);
  const bool identity = residual && residual->is_same(x);
  return differentiable(x, weight, b, identity ? no_tensor : r, activation,
                        identity ? Shortcut::identity : Shortcut::tensor_or_none, recompute);
}

Tensor linear_gelu_concat(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          std::string_view activation_name) {
  const Activation activation = parse_activation(activation_name);
  const Tensor no_tensor;
  const Tensor& b = bias ? *bias : no_tensor;
  const bool has_values = !lacks_values(weight);
  if (const char* reason = has_values ? reason_to_compose({x, weight, b}) : nullptr) {
    check_linear("linear_gelu_concat", x, weight, bias);
    policy::leave_fused_path(reason);
    return composition::linear_gelu_concat(x, plain_weight(weight), bias, activation);
  }
  check_backend("linear_gelu_concat", {{"x", x}, {"weight", weight}, {"bias", b}});
  if (has_values && policy::runs_torch(x))
    return torch_path::linear_gelu_concat(x, plain_weight(weight), bias, activation);
  if (!torch::autograd::compute_requires_grad(x, weight, b)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_linear_gelu_concat(x, weight, bias, activation_name);
  }
  check_not_packed("linear_gelu_concat", "weight", weight);
  return differentiable(x, weight, b, no_tensor, activation, Shortcut::concat, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, Autograd, m) {
  m.impl("linear_gelu_residual", linear_gelu_residual);
  m.impl("linear_gelu_concat", linear_gelu_concat);
  // Users call these only by mistake. The backward of such a call raises an error.
  m.impl("linear_gelu_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear_gelu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastlane
