// A stack of layers as its operators take it, with its checks. Sizes are symbolic, as in checks.h.
#pragma once

#include <string>
#include <vector>

#include "checks.h"

namespace fastlane {

enum class StackShortcut : int64_t { identity, projection, concat, none };

inline StackShortcut parse_shortcut(std::string_view name) {
  if (name == "identity") return StackShortcut::identity;
  if (name == "projection") return StackShortcut::projection;
  if (name == "concat") return StackShortcut::concat;
  if (name == "none") return StackShortcut::none;
  TORCH_CHECK_VALUE(false, "shortcut: got '", name, "', expected 'identity', 'projection', 'concat' or 'none'");
}

// The parameters, one a layer in each list; undefined where a layer has none.
struct StackParameters {
  std::vector<at::Tensor> weights, biases, projections, projection_biases;

  size_t layers() const { return weights.size(); }
};

// x, or a tensor of a list.
struct StackItem {
  const char* name;
  std::optional<size_t> layer;

  friend std::ostream& operator<<(std::ostream& out, const StackItem& item) {
    return item.layer ? out << item.name << "[" << *item.layer << "]" : out << item.name;
  }
};

// An empty list stands for one without tensors.
inline std::vector<at::Tensor> stack_list(const char* name, const OptionalTensors& list, size_t layers) {
  const size_t count = list.size();
  TORCH_CHECK_VALUE(count == 0 || count == layers, name, ": got ", count, " entries, expected ", layers,
                    ", one a layer; use None for a layer that has none");
  std::vector<at::Tensor> tensors(layers);
  for (size_t i = 0; i < count; ++i) {
    const std::optional<at::Tensor> t = list.get(i);
    if (t) tensors[i] = *t;
  }
  return tensors;
}

inline StackParameters stack_parameters(at::TensorList weights, const OptionalTensors& biases,
                                        const OptionalTensors& projections,
                                        const OptionalTensors& projection_biases) {
  TORCH_CHECK_VALUE(!weights.empty(),
                    "weights: got an empty list, expected at least one (out, in) tensor, one a layer");
  return {weights.vec(), stack_list("biases", biases, weights.size()),
          stack_list("projections", projections, weights.size()),
          stack_list("projection_biases", projection_biases, weights.size())};
}

inline void check_stack_matrix(const StackItem& name, const at::Tensor& t, const at::Tensor& x,
                               const c10::SymInt& features) {
  constexpr char op[] = "residual_stack";
  check_like(op, name, t, "x", x);
  TORCH_CHECK(t.dim() == 2, op, ": ", name, " has shape ", t.sym_sizes(),
              ", expected (out_features, in_features) like nn.Linear's");
  TORCH_SYM_CHECK(t.sym_size(1).sym_eq(features), op, ": ", name, " has shape ", t.sym_sizes(),
                  ", expected (out_features, ", features, ") to fit ",
                  name.layer == size_t{0} ? "x, whose last size that is" : "the layer before it");
}

inline void check_stack_bias(const StackItem& name, const at::Tensor& t, const at::Tensor& x,
                             const c10::SymInt& features) {
  constexpr char op[] = "residual_stack";
  check_like(op, name, t, "x", x);
  TORCH_CHECK(t.dim() == 1, op, ": ", name, " has shape ", t.sym_sizes(), ", expected (", features, ",)");
  TORCH_SYM_CHECK(t.sym_size(0).sym_eq(features), op, ": ", name, " has shape ", t.sym_sizes(), ", expected (",
                  features, ",), one element for each row of the weight");
}

// Whether layer i adds its input as it is.
inline bool adds_input(const StackParameters& p, size_t i, StackShortcut shortcut) {
  if (shortcut != StackShortcut::identity && shortcut != StackShortcut::projection) return false;
  return !p.projections[i].defined() && p.weights[i].sym_size(0) == p.weights[i].sym_size(1);
}

// Returns the size of the output's last dimension.
inline c10::SymInt check_stack(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut) {
  constexpr char op[] = "residual_stack";
  check_input(op, x);
  c10::SymInt features = x.sym_size(-1);
  for (size_t i = 0; i < p.layers(); ++i) {
    const at::Tensor &weight = p.weights[i], &projection = p.projections[i];
    check_stack_matrix({"weights", i}, weight, x, features);
    const c10::SymInt out_features = weight.sym_size(0);
    if (p.biases[i].defined()) check_stack_bias({"biases", i}, p.biases[i], x, out_features);
    if (projection.defined()) {
      const StackItem name{"projections", i};
      TORCH_CHECK_VALUE(shortcut == StackShortcut::projection, name,
                        ": got a tensor, expected None; use shortcut='projection'");
      check_stack_matrix(name, projection, x, features);
      TORCH_SYM_CHECK(projection.sym_size(0).sym_eq(out_features), op, ": ", name, " has shape ",
                      projection.sym_sizes(), ", expected ", weight.sym_sizes(), " like weights[", i, "]");
    } else if (shortcut == StackShortcut::projection) {
      TORCH_CHECK_VALUE(adds_input(p, i, shortcut), "projections[", i, "]: got None, expected a weight of shape ",
                        weight.sym_sizes(), "; pass one wherever in and out differ");
    }
    if (p.projection_biases[i].defined()) {
      const StackItem name{"projection_biases", i};
      TORCH_CHECK_VALUE(projection.defined(), name, ": got a tensor, expected None where there is no projection");
      check_stack_bias(name, p.projection_biases[i], x, out_features);
    }
    features = shortcut == StackShortcut::concat ? features + out_features : out_features;
  }
  return features;
}

// The stack as its layers, one after the other: `concat(h, weight, bias)`, or `layer(h, weight, bias, residual,
// is_projection)`.
template <class Layer, class Concat>
at::Tensor stack_by_layer(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut, Layer layer,
                          Concat concat) {
  at::Tensor h = x;
  for (size_t i = 0; i < p.layers(); ++i) {
    const OptionalTensor bias = optional(p.biases[i]);
    if (shortcut == StackShortcut::concat) {
      h = concat(h, p.weights[i], bias);
      continue;
    }
    OptionalTensor residual;
    if (p.projections[i].defined()) {
      residual = layer(h, p.projections[i], optional(p.projection_biases[i]), {}, /*is_projection=*/true);
    } else if (adds_input(p, i, shortcut)) {
      residual = h;
    }
    h = layer(h, p.weights[i], bias, residual, /*is_projection=*/false);
  }
  return h;
}

// The elements of all zs, one layer after the other.
inline c10::SymInt stack_z_size(const at::Tensor& x, const StackParameters& p) {
  c10::SymInt rows = 1, features = 0;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  for (const at::Tensor& weight : p.weights) features = features + weight.sym_size(0);
  return rows * features;
}

// x and the parameters in one row: position 0 is x, then come the weights, biases, projections, projection biases.
inline const at::Tensor& stack_tensor(const at::Tensor& x, const StackParameters& p, int64_t position) {
  const std::vector<at::Tensor>* const lists[] = {&p.weights, &p.biases, &p.projections, &p.projection_biases};
  if (position == 0) return x;
  const auto layers = static_cast<int64_t>(p.layers());
  return (*lists[(position - 1) / layers])[(position - 1) % layers];
}

inline StackItem stack_item(int64_t position, size_t layers) {
  constexpr const char* lists[] = {"weights", "biases", "projections", "projection_biases"};
  if (position == 0) return {"x", std::nullopt};
  const auto index = static_cast<size_t>(position - 1);
  return {lists[index / layers], index % layers};
}

// Saved tensors may have passed through somebody's hooks, so a backward trusts them no more than a forward does.
inline void check_stack_backward(const at::Tensor& grad, const at::Tensor& x, const StackParameters& p,
                                 const OptionalTensor& z, StackShortcut shortcut, at::IntArrayRef needed) {
  constexpr char op[] = "residual_stack_backward";
  const c10::SymInt features = check_stack(x, p, shortcut);
  check_like(op, "grad", grad, "x", x);
  check_rows(op, "grad", grad, x, features);
  if (z) {
    check_like(op, "z", *z, "x", x);
    TORCH_CHECK(z->dim() == 1 && z->is_contiguous(), op, ": z has shape ", z->sym_sizes(),
                ", expected what the forward returned");
    TORCH_SYM_CHECK(z->sym_size(0).sym_eq(stack_z_size(x, p)), op, ": z has shape ", z->sym_sizes(),
                    ", expected what the forward returned");
  }
  const auto positions = static_cast<int64_t>(1 + 4 * p.layers());
  int64_t before = -1;
  for (const int64_t position : needed) {
    TORCH_CHECK(
        before < position && position < positions && stack_tensor(x, p, position).defined(), op, ": needed has ",
        position,
        ", expected rising positions of tensors that are there: 0 for x, then weights, biases, projections and "
        "projection biases");
    before = position;
  }
}

}  // namespace fastlane
