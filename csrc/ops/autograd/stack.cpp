// Differentiation of a whole stack as one node. It saves the tensors among x and the parameters that its backward
// reads and, if that pays, one tensor with every layer's z.
#include <ATen/ops/matmul.h>
#include <ATen/ops/split_with_sizes.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "ops/autograd/edges.h"
#include "ops/checks/stack.h"
#include "ops/composition.h"
#include "ops/dense/keeps_z.h"
#include "ops/differentiation.h"
#include "ops/operators.h"
#include "ops/torch_path.h"

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

// x and the parameters that are present, with their positions (ops/checks/stack.h).
struct Present {
  std::vector<Tensor> tensors;
  std::vector<int64_t> positions;

  Present(const Tensor& x, const StackParameters& p) {
    int64_t position = 0;
    const size_t most = 1 + 4 * p.layers();
    tensors.reserve(most), positions.reserve(most);
    tensors.push_back(x), positions.push_back(position++);
    for (const auto* list : {&p.weights, &p.biases, &p.projections, &p.projection_biases})
      for (const Tensor& t : *list) {
        if (t.defined()) tensors.push_back(t), positions.push_back(position);
        ++position;
      }
  }

  // Orders the tensors as edges of the node: they get gradients in the order in which eager's layers reach them.
  void order_edges(int64_t layers) {
    c10::SmallVector<int64_t, 64> places;
    places.resize(static_cast<size_t>(1 + 4 * layers), -1);
    c10::SmallVector<size_t, 32> as_in_eager;
    for (size_t i = 0; i < positions.size(); ++i) places[positions[i]] = static_cast<int64_t>(i);
    const auto add = [&](int64_t position) {
      if (places[position] >= 0) as_in_eager.push_back(static_cast<size_t>(places[position]));
    };
    for (int64_t i = layers - 1; i >= 0; --i) {
      const auto add_linear = [&](int64_t weights, int64_t biases, bool last) {
        const int64_t weight = 1 + weights * layers + i, bias = 1 + biases * layers + i;
        const bool adds_x = last && i == 0, x_first = reaches_x_before_weight(tensors[0], places[bias] >= 0);
        add(bias);
        if (adds_x && x_first) add(0);
        add(weight);
        if (adds_x && !x_first) add(0);
      };
      // Eager's networks project after the layer in forward, and so before it in backward.
      add_linear(kProjections, kProjectionBiases, /*last=*/false);
      add_linear(kWeights, kBiases, /*last=*/true);
    }
    const auto order =
        edge_order(as_in_eager.size(), [&](size_t i) -> const Tensor& { return tensors[as_in_eager[i]]; });
    variable_list ordered;
    std::vector<int64_t> ordered_positions;
    ordered.reserve(order.size()), ordered_positions.reserve(order.size());
    for (const size_t index : order) {
      ordered.push_back(std::move(tensors[as_in_eager[index]]));
      ordered_positions.push_back(positions[as_in_eager[index]]);
    }
    tensors = std::move(ordered), positions = std::move(ordered_positions);
  }

  // Puts each tensor in its place; returns x.
  static Tensor unpack(at::TensorList tensors, const std::vector<int64_t>& positions, int64_t layers,
                       StackParameters& p) {
    std::vector<Tensor>* const lists[] = {&p.weights, &p.biases, &p.projections, &p.projection_biases};
    for (auto* list : lists) list->resize(layers);
    Tensor x;
    for (size_t i = 0; i < positions.size(); ++i)
      (positions[i] == 0 ? x : (*lists[(positions[i] - 1) / layers])[(positions[i] - 1) % layers]) = tensors[i];
    return x;
  }
};

// A stack's backward reads this struct beside the saved tensors.
struct StackNode {
  std::vector<c10::SymInt> features;
  StackShortcut shortcut;
  Activation activation;
  std::vector<bool> needed;
};

// The differentiable formula, for double backward. `grad_z` is the gradient of the output z: a first backward used z.
// The gradients have the tensors' positions.
variable_list composed_backward(const Tensor& dy, const Tensor& grad_z, const Tensor& x, const StackParameters& p,
                                const Tensor& z, const StackNode& node) {
  using differentiation::flatten_leading;
  const size_t layers = p.layers();
  const StackReads plan(p, node.features, node.shortcut, node.activation, z.defined(), node.needed);
  const auto inputs = stack_inputs(node.features, node.shortcut);
  const bool concat = node.shortcut == StackShortcut::concat;
  const auto by_layer = [&](const Tensor& all) {
    std::vector<Tensor> parts(layers);
    if (!all.defined()) return parts;
    c10::SymInt rows = 1;
    for (int64_t i = 0; i + 1 < dy.dim(); ++i) rows = rows * dy.sym_size(i);
    std::vector<c10::SymInt> sizes;
    for (size_t i = 1; i < node.features.size(); ++i) sizes.push_back(rows * node.features[i]);
    parts = at::split_with_sizes_symint(all, sizes);
    for (size_t i = 0; i < layers; ++i) parts[i] = parts[i].reshape_symint(output_sizes(dy, node.features[i + 1]));
    return parts;
  };
  std::vector<Tensor> zs = by_layer(z), h(layers);
  const std::vector<Tensor> grad_zs = by_layer(grad_z);
  h[0] = x;
  for (size_t i = 0; i < layers; ++i) {
    const StackLayerReads& reads = plan.reads[i];
    if (reads.forms_z) zs[i] = at::linear(h[i], p.weights[i], optional(p.biases[i]));
    if (!reads.output) continue;
    h[i + 1] = composition::activated(zs[i], node.activation);
    if (concat) {
      h[i + 1] = at::cat({h[i], h[i + 1]}, -1);
    } else if (plan.uses[i].projects) {
      h[i + 1] = h[i + 1] + at::linear(h[i], p.projections[i], optional(p.projection_biases[i]));
    } else if (plan.uses[i].adds_input) {
      h[i + 1] = h[i + 1] + h[i];
    }
  }
  variable_list gradients(1 + 4 * layers);
  const auto gradient = [&](StackList list, size_t i) -> Tensor& { return gradients[1 + list * layers + i]; };
  Tensor grad = dy;
  for (size_t i = layers; i-- > plan.first;) {
    const StackLayerUse& use = plan.uses[i];
    const Tensor activated = concat ? grad.narrow_symint(-1, inputs[i], node.features[i + 1]) : grad;
    Tensor dz = composition::preactivation_grad(activated, zs[i], node.activation);
    if (grad_zs[i].defined()) dz = dz + grad_zs[i];
    if (use.dweight) gradient(kWeights, i) = at::matmul(flatten_leading(dz).t(), flatten_leading(h[i]));
    if (use.db) gradient(kBiases, i) = flatten_leading(dz).sum(0);
    if (use.dprojection) gradient(kProjections, i) = at::matmul(flatten_leading(grad).t(), flatten_leading(h[i]));
    if (use.dprojection_bias) gradient(kProjectionBiases, i) = flatten_leading(grad).sum(0);
    if (!plan.reads[i].dh) break;
    Tensor dh = at::matmul(dz, p.weights[i]);
    if (concat) {
      dh = dh + grad.narrow_symint(-1, 0, inputs[i]);
    } else if (use.projects) {
      dh = dh + at::matmul(grad, p.projections[i]);
    } else if (use.adds_input) {
      dh = dh + grad;
    }
    grad = dh;
  }
  if (node.needed[0]) gradients[0] = grad;
  return gradients;
}

class ResidualStack : public torch::autograd::Function<ResidualStack> {
 public:
  // Compiled autograd may trace backward, which reads nothing but ctx.
  static constexpr bool is_traceable = true;

  // z is an output of the node for the sake of second derivatives, as in autograd/layer.cpp.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& positions,
                               int64_t layers, StackShortcut shortcut, Activation activation, bool recompute) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    StackParameters p;
    const Tensor x = Present::unpack(tensors, positions, layers, p);
    const OptionalTensors biases = optional_list(p.biases), projections = optional_list(p.projections),
                          projection_biases = optional_list(p.projection_biases);
    std::vector<int64_t> needed, column_major;
    for (size_t i = 0; i < positions.size(); ++i) {
      if (!tensors[i].requires_grad()) continue;
      needed.push_back(positions[i]);
      if (positions[i] > 0 && tensors[i].dim() == 2 && is_column_major(tensors[i]))
        column_major.push_back(positions[i]);
    }
    std::sort(needed.begin(), needed.end());
    const auto features = stack_features(x, p);
    const bool keep_z = !recompute && keeps_z(x, p, shortcut);
    const StackReads reads(p, features, shortcut, activation, keep_z, stack_flags(needed, p.layers()));
    Tensor y, z;
    if (keep_z && reads.reads_z()) {
      std::tie(y, z) = call_residual_stack_forward(x, p.weights, biases, projections, projection_biases,
                                                   name_of(shortcut), fastlane::name_of(activation));
    } else {
      y = call_residual_stack(x, p.weights, biases, projections, projection_biases, name_of(shortcut),
                              fastlane::name_of(activation), recompute);
    }
    ctx->set_materialize_grads(false);
    variable_list saved = tensors.vec();
    if (!reads_everything_again(x)) {
      for (size_t i = 0; i < saved.size(); ++i)
        if (!is_read(reads, positions[i], p.layers())) saved[i] = Tensor();
    }
    saved.push_back(z);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["positions"] = positions;
    ctx->saved_data["column_major"] = column_major;
    ctx->saved_data["features"] = c10::SymIntArrayRef(features);
    // Compiled autograd makes a graph for each value of sizes, so they are kept only if nothing else tells them.
    if (z.defined() && !reads.reads_x() && (x.dim() != 2 || c10::SymInt(z.sym_size(0)) == 0))
      ctx->saved_data["sizes"] = y.sym_sizes();
    ctx->saved_data["shortcut"] = static_cast<int64_t>(shortcut);
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    return z.defined() ? variable_list{y, z} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& data = ctx->saved_data;
    const std::vector<int64_t> positions = data["positions"].toIntVector();
    variable_list result(positions.size() + kOtherArguments);
    const Tensor grad_z = grads.size() > 1 ? grads[1] : Tensor();
    if (!grads[0].defined() && !grad_z.defined()) return result;

    StackNode node;
    node.features = data["features"].toSymIntVector();
    node.shortcut = static_cast<StackShortcut>(data["shortcut"].toInt());
    node.activation = static_cast<Activation>(data["activation"].toInt());
    const size_t layers = node.features.size() - 1;
    variable_list saved = ctx->get_saved_variables();
    const Tensor z = saved.back();
    saved.pop_back();
    StackParameters p;
    const Tensor x = Present::unpack(saved, positions, static_cast<int64_t>(layers), p);
    std::vector<std::pair<int64_t, size_t>> needed_places;
    for (size_t i = 0; i < positions.size(); ++i)
      if (ctx->needs_input_grad(i)) needed_places.emplace_back(positions[i], i);
    std::sort(needed_places.begin(), needed_places.end());
    std::vector<int64_t> needed;
    for (const auto& [position, place] : needed_places) needed.push_back(position);

    // torch's older vmap, behind is_grads_batched, has no fallback for operators that return a list.
    const bool batched = std::any_of(grads.begin(), grads.end(), [](const Tensor& grad) {
      return grad.defined() && grad.key_set().has(c10::DispatchKey::Batched);
    });
    const bool with_history = at::GradMode::is_enabled() || grad_z.defined();
    if (!with_history && !batched) {
      // Backward is not differentiated here, and the Autograd key would box every list.
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const std::vector<int64_t> column_major = data["column_major"].toIntVector();
      const variable_list gradients = call_residual_stack_backward(
          grads[0], optional(x), optional_list(p.weights), optional_list(p.biases), optional_list(p.projections),
          optional_list(p.projection_biases), optional(z), node.features, name_of(node.shortcut),
          fastlane::name_of(node.activation), needed, column_major);
      for (size_t i = 0; i < needed.size(); ++i) result[needed_places[i].second] = gradients[i];
      return result;
    }
    policy::leave_fused_path(batched && !at::GradMode::is_enabled() ? "a batch of gradients"
                                                                    : "backward with create_graph=True");
    node.needed = stack_flags(needed, layers);
    const Tensor dy =
        grads[0].defined() ? grads[0] : at::zeros_symint(output_sizes_of(data, x, z, node), grad_z.options());
    const variable_list gradients =
        composed_backward(dy, grad_z, x, p, reads_everything_again(dy) ? Tensor() : z, node);
    for (const auto& [position, place] : needed_places) result[place] = gradients[static_cast<size_t>(position)];
    return result;
  }

 private:
  static constexpr size_t kOtherArguments = 5;

  // If backward gets the zs' gradients alone, dy is missing and cannot tell the output's sizes.
  template <class Data>
  static std::vector<c10::SymInt> output_sizes_of(Data& data, const Tensor& x, const Tensor& z,
                                                  const StackNode& node) {
    const auto kept = data.find("sizes");
    if (kept != data.end()) return kept->second.toSymIntVector();
    const c10::SymInt out_features = stack_inputs(node.features, node.shortcut).back();
    if (x.defined()) {
      const auto sizes = output_sizes(x, out_features);
      return {sizes.begin(), sizes.end()};
    }
    c10::SymInt features = 0;
    for (size_t i = 1; i < node.features.size(); ++i) features = features + node.features[i];
    return {z.sym_size(0) / features, out_features};
  }

  static bool is_read(const StackReads& reads, int64_t position, size_t layers) {
    if (position == 0) return reads.reads_x();
    const auto index = static_cast<size_t>(position - 1);
    const StackLayerReads& r = reads.reads[index % layers];
    switch (index / layers) {
      case kWeights: return r.weight();
      case kBiases: return r.forms_z;
      case kProjections: return r.projection();
      default: return r.output;
    }
  }
};

Tensor residual_stack(const Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                      const OptionalTensors& projections, const OptionalTensors& projection_biases,
                      std::string_view shortcut_name, std::string_view activation_name, bool recompute) {
  const Activation activation = parse_activation(activation_name);
  const StackShortcut shortcut = parse_shortcut(shortcut_name);
  const StackParameters p = stack_parameters(weights, biases, projections, projection_biases);
  Present present(x, p);
  const bool has_values = std::none_of(present.tensors.begin(), present.tensors.end(), lacks_values);
  if (const char* reason = has_values ? reason_to_compose(present.tensors) : nullptr) {
    check_stack(x, p, shortcut);
    policy::leave_fused_path(reason);
    return composition::residual_stack(x, plain_parameters(p), shortcut, activation);
  }
  for (size_t i = 0; i < present.tensors.size(); ++i)
    check_dense(kOp, stack_item(present.positions[i], p.layers()), present.tensors[i]);
  check_device(kOp, x);
  if (has_values && !recompute && policy::runs_torch(x))
    return torch_path::residual_stack(x, plain_parameters(p), shortcut, activation);
  bool needs_grad = false;
  for (const Tensor& t : present.tensors) needs_grad = needs_grad || t.requires_grad();
  if (!needs_grad || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_residual_stack(x, weights, biases, projections, projection_biases, shortcut_name, activation_name,
                               recompute);
  }
  check_stack(x, p, shortcut);
  for (size_t i = 0; i < p.layers(); ++i) {
    check_not_packed(kOp, StackItem{"weights", i}, p.weights[i]);
    check_not_packed(kOp, StackItem{"projections", i}, p.projections[i]);
  }
  present.order_edges(static_cast<int64_t>(p.layers()));
  return ResidualStack::apply(at::TensorList(present.tensors), present.positions, static_cast<int64_t>(p.layers()),
                              shortcut, activation, recompute)[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlane, Autograd, m) {
  m.impl("residual_stack", residual_stack);
  m.impl("residual_stack_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("residual_stack_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastlane
