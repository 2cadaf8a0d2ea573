// The arguments of a stack's operators, and their checks. Sizes are symbolic, as in checks.h.
#pragma once

#include <string>
#include <vector>

#include "kernels/stack_reads.h"
#include "ops/checks/checks.h"

namespace fastlane {

enum class StackShortcut : int64_t { identity, projection, concat, none };

inline StackShortcut parse_shortcut(std::string_view name) {
  if (name == "identity") return StackShortcut::identity;
  if (name == "projection") return StackShortcut::projection;
  if (name == "concat") return StackShortcut::concat;
  if (name == "none") return StackShortcut::none;
  TORCH_CHECK_VALUE(false, "shortcut: got '", name, "', expected 'identity', 'projection', 'concat' or 'none'");
}

// Each list has one entry for each layer; an entry is undefined if the layer has no such parameter.
struct StackParameters {
  std::vector<at::Tensor> weights, biases, projections, projection_biases;

  size_t layers() const { return weights.size(); }
};

// The name of x, or of a tensor in a list.
struct StackItem {
  const char* name;
  std::optional<size_t> layer;

  friend std::ostream& operator<<(std::ostream& out, const StackItem& item) {
    return item.layer ? out << item.name << "[" << *item.layer << "]" : out << item.name;
  }
};

// An empty list means that no layer has such a tensor.
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

// The same with the values of packed weights, for ATen's operators.
inline StackParameters plain_parameters(StackParameters p) {
  for (auto* weights : {&p.weights, &p.projections})
    for (at::Tensor& weight : *weights) weight = plain_weight(weight);
  return p;
}

// A backward's parameters. Tensors that it does not read may be absent.
inline StackParameters saved_stack_parameters(const OptionalTensors& weights, const OptionalTensors& biases,
                                              const OptionalTensors& projections,
                                              const OptionalTensors& projection_biases) {
  const size_t layers = weights.size();
  return {stack_list("weights", weights, layers), stack_list("biases", biases, layers),
          stack_list("projections", projections, layers), stack_list("projection_biases", projection_biases, layers)};
}

inline void check_stack_matrix(const StackItem& name, const at::Tensor& t, const at::Tensor& x,
                               const c10::SymInt& features) {
  constexpr char op[] = "residual_stack";
  if (is_packed(t)) return check_packed(op, name, t, x, features);
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

// Whether layer i adds its input without a projection.
inline bool adds_input(const StackParameters& p, size_t i, const c10::SymInt& in_features, StackShortcut shortcut) {
  if (shortcut != StackShortcut::identity && shortcut != StackShortcut::projection) return false;
  return !p.projections[i].defined() && p.weights[i].sym_size(0) == in_features;
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
      TORCH_CHECK_VALUE(adds_input(p, i, features, shortcut), "projections[", i,
                        "]: got None, expected a weight of shape ", weight.sym_sizes(),
                        "; pass one wherever in and out differ");
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

// Runs the layers one after the other. For each it calls `concat(h, weight, bias)`, or `layer(h, weight, bias,
// residual, is_projection)`.
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
    } else if (adds_input(p, i, h.sym_size(-1), shortcut)) {
      residual = h;
    }
    h = layer(h, p.weights[i], bias, residual, /*is_projection=*/false);
  }
  return h;
}

// The number of elements of all zs.
inline c10::SymInt stack_z_size(const at::Tensor& x, const StackParameters& p) {
  c10::SymInt rows = 1, features = 0;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  for (const at::Tensor& weight : p.weights) features = features + weight.sym_size(0);
  return rows * features;
}

// Positions number x and the parameters: 0 is x, then come weights, biases, projections, projection biases.
inline StackItem stack_item(int64_t position, size_t layers) {
  constexpr const char* lists[] = {"weights", "biases", "projections", "projection_biases"};
  if (position == 0) return {"x", std::nullopt};
  const auto index = static_cast<size_t>(position - 1);
  return {lists[index / layers], index % layers};
}

// x's features, then each layer's output features. Backward cannot ask tensors for them that were not saved.
inline std::vector<c10::SymInt> stack_features(const at::Tensor& x, const StackParameters& p) {
  std::vector<c10::SymInt> features{x.sym_size(-1)};
  for (const at::Tensor& weight : p.weights) features.push_back(weight.sym_size(0));
  return features;
}

// The features of each layer's input, then the features of the output.
inline std::vector<c10::SymInt> stack_inputs(c10::SymIntArrayRef features, StackShortcut shortcut) {
  std::vector<c10::SymInt> inputs(features.begin(), features.end());
  if (shortcut == StackShortcut::concat)
    for (size_t i = 1; i < inputs.size(); ++i) inputs[i] = inputs[i] + inputs[i - 1];
  return inputs;
}

// A flag for each position.
inline std::vector<bool> stack_flags(at::IntArrayRef positions, size_t layers) {
  std::vector<bool> flags(1 + 4 * layers);
  for (const int64_t position : positions) flags[static_cast<size_t>(position)] = true;
  return flags;
}

// The lists of parameters, in the order of the positions.
enum StackList : size_t { kWeights, kBiases, kProjections, kProjectionBiases };

// A stack's backward forms and reads these, layer by layer. Parameters that it does not read may be absent.
struct StackReads {
  std::vector<StackLayerUse> uses;
  std::vector<StackLayerReads> reads;
  size_t first = 0;  // the layer at which the backward ends

  // `projects` flags the layers whose projection is given. A layer has one too if its projection's gradient is
  // needed.
  StackReads(const std::vector<bool>& projects, c10::SymIntArrayRef features, StackShortcut shortcut,
             Activation activation, bool keeps_z, const std::vector<bool>& needed)
      : uses(projects.size()), reads(projects.size()) {
    const size_t layers = projects.size();
    const auto inputs = stack_inputs(features, shortcut);
    const bool concat = shortcut == StackShortcut::concat, adds = !concat && shortcut != StackShortcut::none;
    for (size_t i = 0; i < layers; ++i) {
      const auto is_needed = [&](StackList list) { return needed[1 + list * layers + i]; };
      StackLayerUse& use = uses[i];
      use.keeps_z = keeps_z;
      use.dweight = is_needed(kWeights), use.db = is_needed(kBiases);
      use.dprojection = is_needed(kProjections), use.dprojection_bias = is_needed(kProjectionBiases);
      use.projects = projects[i] || use.dprojection || use.dprojection_bias;
      use.adds_input = adds && !use.projects && inputs[i] == features[i + 1];
    }
    first = static_cast<size_t>(stack_reads(
        static_cast<int64_t>(layers), needed[0], activation != Activation::none, concat,
        [&](int64_t i) { return uses[static_cast<size_t>(i)]; },
        [&](int64_t i, const StackLayerReads& r) { reads[static_cast<size_t>(i)] = r; }));
  }

  StackReads(const StackParameters& p, c10::SymIntArrayRef features, StackShortcut shortcut, Activation activation,
             bool keeps_z, const std::vector<bool>& needed)
      : StackReads(layers_with_projections(p), features, shortcut, activation, keeps_z, needed) {}

  bool reads_z() const {
    return std::any_of(reads.begin(), reads.end(), [](const StackLayerReads& r) { return r.z(); });
  }
  bool reads_x() const { return reads.front().input; }

 private:
  static std::vector<bool> layers_with_projections(const StackParameters& p) {
    std::vector<bool> projects;
    for (const at::Tensor& t : p.projections) projects.push_back(t.defined());
    return projects;
  }
};

// A narrow stack on CUDA stores its layers' outputs in z's place. Backward computes every z again, so
// it reads x and all parameters (kernels/cuda/narrow/stack.h).
inline bool reads_everything_again(const at::Tensor& t) { return t.is_cuda(); }

// Hooks on saved tensors may have replaced them, so backward checks them as forward does. Returns the tensors that
// backward reads.
inline StackReads check_stack_backward(const at::Tensor& grad, const OptionalTensor& x, const StackParameters& p,
                                       const OptionalTensor& z, c10::SymIntArrayRef features, StackShortcut shortcut,
                                       Activation activation, at::IntArrayRef needed) {
  constexpr char op[] = "residual_stack_backward";
  const size_t layers = p.layers();
  TORCH_CHECK(features.size() == layers + 1, op, ": features has ", features.size(), " entries, expected ",
              layers + 1, ": x's, then one for each layer");
  TORCH_CHECK(has_kernel_dtype(grad) && grad.dim() >= 1, op, ": grad has dtype ", grad.scalar_type(), " and shape ",
              grad.sym_sizes(), ", expected a floating-point tensor (..., out_features)");
  check_dense(op, "grad", grad);
  check_memory(op, "grad", grad);
  int64_t before = -1;
  for (const int64_t position : needed) {
    TORCH_CHECK(before < position && position < static_cast<int64_t>(1 + 4 * layers), op, ": needed has ", position,
                ", expected rising positions: 0 for x, then weights, biases, projections and projection biases");
    before = position;
  }
  const auto inputs = stack_inputs(features, shortcut);
  check_rows(op, "grad", grad, grad, inputs.back());
  StackReads plan(p, features, shortcut, activation, z.has_value(), stack_flags(needed, layers));
  const auto check = [&](const StackItem& name, const at::Tensor& t, bool is_read, c10::SymIntArrayRef sizes) {
    TORCH_CHECK(t.defined() || !is_read, op, ": ", name, " is missing, expected the forward's");
    if (!t.defined()) return;
    check_like(op, name, t, "grad", grad);
    bool fits = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = TORCH_GUARD_OR_TRUE(t.sym_sizes()[i].sym_eq(sizes[i]));
    TORCH_CHECK(fits, op, ": ", name, " has shape ", t.sym_sizes(), ", expected ", sizes,
                "; pass what the forward was called with");
  };
  const bool all = reads_everything_again(grad);
  check({"x", std::nullopt}, x.value_or(at::Tensor()), all || plan.reads_x(), output_sizes(grad, features[0]));
  for (size_t i = 0; i < layers; ++i) {
    const StackLayerReads& r = plan.reads[i];
    const c10::SymInt matrix[] = {features[i + 1], inputs[i]}, vector[] = {features[i + 1]};
    check({"weights", i}, p.weights[i], all || r.weight(), matrix);
    check({"biases", i}, p.biases[i], false, vector);
    check({"projections", i}, p.projections[i], plan.uses[i].projects && (all || r.projection()), matrix);
    check({"projection_biases", i}, p.projection_biases[i], false, vector);
  }
  if (!z) return plan;
  check_like(op, "z", *z, "grad", grad);
  c10::SymInt size = 0;
  for (size_t i = 1; i < features.size(); ++i) size = size + features[i];
  for (int64_t i = 0; i + 1 < grad.dim(); ++i) size = size * grad.sym_size(i);
  TORCH_CHECK(z->dim() == 1 && z->is_contiguous(), op, ": z has shape ", z->sym_sizes(),
              ", expected what the forward returned");
  TORCH_SYM_CHECK(z->sym_size(0).sym_eq(size), op, ": z has shape ", z->sym_sizes(),
                  ", expected what the forward returned");
  return plan;
}

}  // namespace fastlane
