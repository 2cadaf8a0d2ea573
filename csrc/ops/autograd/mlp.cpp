// Differentiation of an MLP as one node. It saves x and z, and computes the hidden activations again in backward.
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "ops/autograd/edges.h"
#include "ops/checks/mlp.h"
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

// x, fc1_weight, fc1_bias, fc2_weight, fc2_bias.
using Needed = std::array<bool, 5>;
using Gradients = std::array<Tensor, 5>;

struct Saved {
  Tensor x, fc1_weight, fc1_bias, fc2_weight, z;

  variable_list list() const { return {x, fc1_weight, fc1_bias, fc2_weight, z}; }
  static Saved of(const variable_list& list) { return {list[0], list[1], list[2], list[3], list[4]}; }
};

// The differentiable formula, for double backward. `grad_z` is the gradient of the output z: a first backward used z.
Gradients composed_backward(const Tensor& dy, const Tensor& grad_z, const Tensor& grad_shortcut, const Saved& saved,
                            Activation activation, const Needed& needed) {
  using differentiation::flatten_leading;
  const MlpNeeds needs(needed, activation);
  const Tensor z =
      needs.z && !saved.z.defined() ? at::linear(saved.x, saved.fc1_weight, optional(saved.fc1_bias)) : saved.z;
  Gradients g;
  if (needs.dz) {
    Tensor dz =
        dy.defined() ? composition::preactivation_grad(at::matmul(dy, saved.fc2_weight), z, activation) : Tensor();
    if (grad_z.defined()) dz = dz.defined() ? dz + grad_z : grad_z;
    if (needed[0]) g[0] = at::matmul(dz, saved.fc1_weight);
    if (needed[0] && grad_shortcut.defined()) g[0] = g[0] + grad_shortcut;
    if (needed[1]) g[1] = at::matmul(flatten_leading(dz).t(), flatten_leading(saved.x));
    if (needed[2]) g[2] = flatten_leading(dz).sum(0);
  }
  if (!dy.defined()) return g;
  if (needed[3]) {
    g[3] = at::matmul(flatten_leading(dy).t(), flatten_leading(composition::activated(z, activation)));
  }
  if (needed[4]) g[4] = flatten_leading(dy).sum(0);
  return g;
}

class MlpResidual : public torch::autograd::Function<MlpResidual> {
 public:
  // The tensors with respect to which the node differentiates. x and the parameters have the order of Needed.
  enum Role : size_t { kX, kFc1Weight, kFc1Bias, kFc2Weight, kFc2Bias, kResidual };

  // Compiled autograd may trace backward, which reads nothing but ctx.
  static constexpr bool is_traceable = true;

  // z is an output of the node for the sake of second derivatives, as in autograd/layer.cpp. If the residual is x
  // itself, `adds_x` is true and `tensors` has no residual.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, int64_t roles, Activation activation,
                               bool adds_x, bool recompute) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto arguments = Edges::by_role(tensors, roles);
    const Tensor &x = arguments[kX], &fc1_weight = arguments[kFc1Weight], &fc2_weight = arguments[kFc2Weight];
    const OptionalTensor fc1_bias = optional(arguments[kFc1Bias]), fc2_bias = optional(arguments[kFc2Bias]),
                         residual = optional(arguments[kResidual]);
    const auto needs_grad = [](const OptionalTensor& t) { return t && t->requires_grad(); };
    const Needed needed{x.requires_grad(), fc1_weight.requires_grad(), needs_grad(fc1_bias),
                        fc2_weight.requires_grad(), needs_grad(fc2_bias)};
    const MlpNeeds needs(needed, activation);
    const OptionalTensor shortcut = adds_x ? x : residual;
    Tensor y, z;
    if (needs.z && !recompute) {
      std::tie(y, z) = call_mlp_forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, shortcut, name_of(activation));
    } else {
      y = call_mlp_residual(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, shortcut, name_of(activation), recompute);
    }
    const bool recompute_z = needs.z && recompute;
    Saved saved;
    if (needed[1] || recompute_z) saved.x = x;
    if (needed[0] || recompute_z) saved.fc1_weight = fc1_weight;
    if (recompute_z && fc1_bias) saved.fc1_bias = *fc1_bias;
    if (needs.dz) saved.fc2_weight = fc2_weight;
    saved.z = z;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(saved.list());
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    ctx->saved_data["adds_x"] = adds_x;
    ctx->saved_data["roles"] = roles;
    ctx->saved_data["fc1_column_major"] = needed[1] && is_column_major(fc1_weight);
    ctx->saved_data["fc2_column_major"] = needed[3] && is_column_major(fc2_weight);
    if (needs_grad(residual)) ctx->saved_data["residual_sizes"] = residual->sym_sizes();
    return z.defined() ? variable_list{y, z} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& dy = grads[0];
    const Tensor grad_z = grads.size() > 1 ? grads[1] : Tensor();
    auto& data = ctx->saved_data;
    const int64_t roles = data["roles"].toInt();
    Needed needed{};
    bool need_residual = false;
    size_t edges = 0;
    Edges::for_each(roles, [&](size_t place, size_t role) {
      (role == kResidual ? need_residual : needed[role]) = ctx->needs_input_grad(place);
      edges = place + 1;
    });
    variable_list result(edges + kOtherArguments);
    if (!dy.defined() && !grad_z.defined()) return result;
    Gradients g;
    if (std::any_of(needed.begin(), needed.end(), [](bool need) { return need; }))
      g = gradients(data, Saved::of(ctx->get_saved_variables()), dy, grad_z, needed);
    Edges::for_each(roles, [&](size_t place, size_t role) {
      if (role != kResidual) {
        result[place] = g[role];
      } else if (need_residual && dy.defined()) {
        result[place] = differentiation::residual_grad(dy, data["residual_sizes"].toSymIntVector());
      }
    });
    return result;
  }

 private:
  static constexpr size_t kOtherArguments = 4;

  template <class Data>
  static Gradients gradients(Data& data, const Saved& saved, const Tensor& dy, const Tensor& grad_z,
                             const Needed& needed) {
    const auto activation = static_cast<Activation>(data["activation"].toInt());
    const Tensor grad_shortcut = data["adds_x"].toBool() ? dy : Tensor();
    if (at::GradMode::is_enabled() || grad_z.defined()) {
      policy::leave_fused_path("backward with create_graph=True");
      return composed_backward(dy, grad_z, grad_shortcut, saved, activation, needed);
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Gradients g;
    std::tie(g[0], g[1], g[2], g[3], g[4]) = call_mlp_backward(
        dy, optional(saved.z), optional(saved.x), optional(saved.fc1_weight), optional(saved.fc1_bias),
        optional(saved.fc2_weight), optional(grad_shortcut), name_of(activation), data["fc1_column_major"].toBool(),
        data["fc2_column_major"].toBool(), needed);
    return g;
  }
};

Tensor mlp_residual(const Tensor& x, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& residual,
                    std::string_view activation_name, bool recompute) {
  const Activation activation = parse_activation(activation_name);
  const Tensor no_tensor;
  const Tensor &b1 = fc1_bias ? *fc1_bias : no_tensor, &b2 = fc2_bias ? *fc2_bias : no_tensor,
               &r = residual ? *residual : no_tensor;
  const bool has_values = !lacks_values(fc1_weight) && !lacks_values(fc2_weight);
  if (const char* reason = has_values ? reason_to_compose({x, fc1_weight, b1, fc2_weight, b2, r}) : nullptr) {
    check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual);
    policy::leave_fused_path(reason);
    return composition::mlp_residual(x, plain_weight(fc1_weight), fc1_bias, plain_weight(fc2_weight), fc2_bias,
                                     residual, activation);
  }
  check_backend("mlp_residual", {{"x", x},
                                 {"fc1_weight", fc1_weight},
                                 {"fc1_bias", b1},
                                 {"fc2_weight", fc2_weight},
                                 {"fc2_bias", b2},
                                 {"residual", r}});
  if (has_values && !recompute && policy::runs_torch(x))
    return torch_path::mlp_residual(x, plain_weight(fc1_weight), fc1_bias, plain_weight(fc2_weight), fc2_bias,
                                    residual, activation);
  if (!torch::autograd::compute_requires_grad(x, fc1_weight, b1, fc2_weight, b2, r)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_mlp_residual(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation_name, recompute);
  }
  check_not_packed("mlp_residual", "fc1_weight", fc1_weight);
  check_not_packed("mlp_residual", "fc2_weight", fc2_weight);
  const bool adds_x = residual && residual->is_same(x);
  const bool x_first = reaches_x_before_weight(x, b1.defined());
  using Node = MlpResidual;
  const std::pair<size_t, const Tensor&> of_x{Node::kX, x}, of_weight{Node::kFc1Weight, fc1_weight};
  const Edges edges({{Node::kResidual, adds_x ? no_tensor : r},
                     {Node::kFc2Bias, b2},
                     {Node::kFc2Weight, fc2_weight},
                     {Node::kFc1Bias, b1},
                     x_first ? of_x : of_weight,
                     x_first ? of_weight : of_x});
  return Node::apply(at::TensorList(edges.tensors), edges.roles, activation, adds_x, recompute)[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, Autograd, m) {
  m.impl("mlp_residual", mlp_residual);
  m.impl("mlp_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("mlp_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastlane
