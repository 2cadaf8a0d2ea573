// Differentiation of a whole stack as one node: it saves x, the parameters and, where that pays, one tensor with
// every layer's z.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "composition.h"
#include "keeps_z.h"
#include "differentiation.h"
#include "operators.h"
#include "stack.h"

namespace fastlane {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "residual_stack";

std::string_view name_of(StackShortcut shortcut) {
  switch (shortcut) {
    case StackShortcut::identity: return "identity";
    case StackShortcut::projection: return "projection";
    case StackShortcut::concat: return "concat";
    case StackShortcut::none: return "none";
  }
  return {};
}

OptionalTensors optional_list(const std::vector<Tensor>& tensors) {
  OptionalTensors list;
  list.reserve(tensors.size());
  for (const Tensor& t : tensors) list.push_back(optional(t));
  return list;
}

// x and the parameters that are there, with their positions (stack.h).
struct Present {
  std::vector<Tensor> tensors;
  std::vector<int64_t> positions;

  Present(const Tensor& x, const StackParameters& p) {
    int64_t position = 0;
    tensors.push_back(x), positions.push_back(position++);
    for (const auto* list : {&p.weights, &p.biases, &p.projections, &p.projection_biases})
      for (const Tensor& t : *list) {
        if (t.defined()) tensors.push_back(t), positions.push_back(position);
        ++position;
      }
  }

  static StackParameters parameters(const variable_list& tensors, const std::vector<int64_t>& positions,
                                    int64_t layers) {
    StackParameters p;
    std::vector<Tensor>* const lists[] = {&p.weights, &p.biases, &p.projections, &p.projection_biases};
    for (auto* list : lists) list->resize(layers);
    for (size_t i = 1; i < positions.size(); ++i)
      (*lists[(positions[i] - 1) / layers])[(positions[i] - 1) % layers] = tensors[i];
    return p;
  }
};

class ResidualStack : public torch::autograd::Function<ResidualStack> {
 public:
  // Compiled autograd may trace backward: all that it reads is in ctx.
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& positions,
                        int64_t layers, StackShortcut shortcut, Activation activation, bool recompute) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const StackParameters p = Present::parameters(tensors.vec(), positions, layers);
    const OptionalTensors biases = optional_list(p.biases), projections = optional_list(p.projections),
                          projection_biases = optional_list(p.projection_biases);
    Tensor y, z;
    if (recompute || !keeps_z(tensors[0], p, shortcut)) {
      y = call_residual_stack(tensors[0], p.weights, biases, projections, projection_biases, name_of(shortcut),
                              fastlane::name_of(activation), recompute);
    } else {
      std::tie(y, z) = call_residual_stack_forward(tensors[0], p.weights, biases, projections, projection_biases,
                                                   name_of(shortcut), fastlane::name_of(activation));
    }
    ctx->set_materialize_grads(false);
    variable_list saved = tensors.vec();
    saved.push_back(z);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["positions"] = positions;
    ctx->saved_data["layers"] = layers;
    ctx->saved_data["shortcut"] = static_cast<int64_t>(shortcut);
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& data = ctx->saved_data;
    const std::vector<int64_t> positions = data["positions"].toIntVector();
    const int64_t layers = data["layers"].toInt();
    variable_list result(positions.size() + kOtherArguments);
    if (!grads[0].defined()) return result;

    variable_list saved = ctx->get_saved_variables();
    const Tensor z = saved.back();
    saved.pop_back();
    const auto shortcut = static_cast<StackShortcut>(data["shortcut"].toInt());
    const auto activation = static_cast<Activation>(data["activation"].toInt());
    const StackParameters p = Present::parameters(saved, positions, layers);
    std::vector<int64_t> needed;
    std::vector<size_t> places;
    for (size_t i = 0; i < positions.size(); ++i)
      if (ctx->needs_input_grad(i)) needed.push_back(positions[i]), places.push_back(i);

    // torch's older vmap, behind is_grads_batched, has no fallback for operators that return a list.
    const bool batched = grads[0].key_set().has(c10::DispatchKey::Batched);
    const variable_list gradients = at::GradMode::is_enabled() || batched
                                        ? composed_backward(grads[0], saved, places, p, shortcut, activation)
                                        : fused_backward(grads[0], saved[0], p, z, shortcut, activation, needed);
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = gradients[i];
    return result;
  }

 private:
  static constexpr size_t kOtherArguments = 5;

  static variable_list fused_backward(const Tensor& grad, const Tensor& x, const StackParameters& p, const Tensor& z,
                                      StackShortcut shortcut, Activation activation, at::IntArrayRef needed) {
    const OptionalTensors biases = optional_list(p.biases), projections = optional_list(p.projections),
                          projection_biases = optional_list(p.projection_biases);
    return call_residual_stack_backward(grad, x, p.weights, biases, projections, projection_biases, optional(z),
                                        name_of(shortcut), fastlane::name_of(activation), needed);
  }

  // Differentiable: the network again in ATen operators, on the saved tensors with their history.
  static variable_list composed_backward(const Tensor& grad, const variable_list& tensors,
                                         const std::vector<size_t>& places, const StackParameters& p,
                                         StackShortcut shortcut, Activation activation) {
    const bool create_graph = at::GradMode::is_enabled();
    policy::leave_fused_path(create_graph ? "backward with create_graph=True" : "a batch of gradients");
    const at::AutoGradMode with_history(true);
    const Tensor y = composition::residual_stack(tensors[0], p, shortcut, activation);
    variable_list inputs;
    for (size_t i : places) inputs.push_back(tensors[i]);
    return torch::autograd::grad({y}, inputs, {grad}, /*retain_graph=*/true, create_graph,
                                 /*allow_unused=*/true);
  }
};

Tensor residual_stack(const Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                      const OptionalTensors& projections, const OptionalTensors& projection_biases,
                      std::string_view shortcut_name, std::string_view activation_name, bool recompute) {
  const Activation activation = parse_activation(activation_name);
  const StackShortcut shortcut = parse_shortcut(shortcut_name);
  const StackParameters p = stack_parameters(weights, biases, projections, projection_biases);
  Present present(x, p);
  if (const char* reason = reason_to_compose(present.tensors)) {
    check_stack(x, p, shortcut);
    policy::leave_fused_path(reason);
    return composition::residual_stack(x, p, shortcut, activation);
  }
  for (size_t i = 0; i < present.tensors.size(); ++i)
    check_dense(kOp, stack_item(present.positions[i], p.layers()), present.tensors[i]);
  check_device(kOp, x);
  bool needs_grad = false;
  for (const Tensor& t : present.tensors) needs_grad = needs_grad || t.requires_grad();
  if (!needs_grad || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_residual_stack(x, weights, biases, projections, projection_biases, shortcut_name, activation_name,
                               recompute);
  }
  check_stack(x, p, shortcut);
  return ResidualStack::apply(at::TensorList(present.tensors), present.positions, static_cast<int64_t>(p.layers()),
                              shortcut, activation, recompute);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, Autograd, m) {
  m.impl("residual_stack", residual_stack);
  m.impl("residual_stack_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("residual_stack_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastlane
