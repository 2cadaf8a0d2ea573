// A stack's operators. A narrow stack is one kernel; a wide stack runs layer by layer.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <optional>

#include "ops/checks/stack.h"
#include "ops/composition.h"
#include "ops/dense/keeps_z.h"
#include "ops/dense/layer_calls.h"
#include "ops/dense/stack_gradients.h"
#include "ops/policy.h"
#include "ops/register.h"
#include "ops/torch_path.h"

namespace fastlane {
namespace {

// The sizes of a stack decide how it runs. `rows` is a tensor with x's leading sizes, dtype and device. `features`
// are x's features, then each layer's output features.
struct StackSizes {
  std::vector<StackLayer> layers;
  StackProblem problem;
  const Backend& backend;

  StackSizes(const at::Tensor& rows, at::IntArrayRef features, StackShortcut shortcut)
      : layers(features.size() - 1), backend(backend_of(rows)) {
    problem.rows = 1;
    for (int64_t i = 0; i + 1 < rows.dim(); ++i) problem.rows *= rows.size(i);
    problem.dtype = dtype_of(rows), problem.concat = shortcut == StackShortcut::concat;
    int64_t width = features[0];
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i].in_features = width, layers[i].out_features = features[i + 1];
      width = problem.concat ? width + layers[i].out_features : layers[i].out_features;
    }
    problem.layers = layers.data(), problem.count = static_cast<int64_t>(layers.size());
  }
  StackSizes(const StackSizes&) = delete;
  StackSizes& operator=(const StackSizes&) = delete;

  bool is_one_kernel() const { return backend.is_one_kernel(problem); }
};

std::vector<int64_t> features_of(const at::Tensor& x, const StackParameters& p) {
  std::vector<int64_t> features{x.size(-1)};
  for (const at::Tensor& weight : p.weights) features.push_back(weight.size(0));
  return features;
}

// A stack on 2-D tensors; it keeps its operands alive. Tensors that a backward does not read may be absent.
struct Stack : StackSizes {
  StackParameters parameters;
  Activation activation;
  at::Tensor x;  // unit column stride
  int64_t rows;
  at::TensorOptions options;

  // `may_be_frozen` as for flatten_operands.
  Stack(const at::Tensor& input, StackParameters p, StackShortcut shortcut, Activation stack_activation,
        bool may_be_frozen)
      : Stack(input, input, std::move(p), {}, shortcut, stack_activation, may_be_frozen) {}
  Stack(const at::Tensor& rows_like, const at::Tensor& input, StackParameters p, at::IntArrayRef features,
        StackShortcut shortcut, Activation stack_activation, bool may_be_frozen)
      : StackSizes(rows_like, features.empty() ? at::IntArrayRef(features_of(input, p)) : features, shortcut),
        parameters(std::move(p)),
        activation(stack_activation),
        x(input.defined() ? with_unit_column_stride(flatten_leading(input)) : input),
        rows(problem.rows),
        options(rows_like.options()) {
    for (size_t i = 0; i < layers.size(); ++i) {
      StackLayer& layer = layers[i];
      at::Tensor &weight = parameters.weights[i], &projection = parameters.projections[i];
      weight = readable(weight, may_be_frozen), projection = readable(projection, may_be_frozen);
      if (weight.defined()) layer.weight = weight_of(weight).matrix, layer.panels = panels_of(weight);
      layer.bias = contiguous_data(parameters.biases[i]);
      layer.adds_input = !projection.defined() && layer.in_features == layer.out_features &&
                         (shortcut == StackShortcut::identity || shortcut == StackShortcut::projection);
      if (projection.defined()) layer.projection_panels = panels_of(projection);
      if (projection.defined() && !is_packed(projection)) layer.projection = present_matrix(projection);
      layer.projection_bias = contiguous_data(parameters.projection_biases[i]);
    }
    problem.activation = activation;
    if (x.defined()) problem.x = row_major(x);
  }

  bool concat() const { return problem.concat; }
  int64_t out_features() const { return layers.back().out_features + (concat() ? layers.back().in_features : 0); }

  // z of layer i: a slice of `z`, which holds every layer's.
  at::Tensor z_of(const at::Tensor& z, size_t i) const {
    int64_t before = 0;
    for (size_t j = 0; j < i; ++j) before += layers[j].out_features;
    return z.narrow(0, rows * before, rows * layers[i].out_features).view({rows, layers[i].out_features});
  }
  void set_z(const at::Tensor& z) {
    // A kept z without elements has no memory, but the kernels take a null pointer for an absent z.
    static char nothing = 0;
    char* data = static_cast<char*>(const_cast<void*>(z.const_data_ptr()));
    if (!data) data = &nothing;
    for (StackLayer& layer : layers) {
      layer.z = {data, layer.out_features};
      data += rows * layer.out_features * z.element_size();
    }
  }

 private:
  // If the product of bf16 pairs meets a denormal, the narrow stack's kernel runs again from values.
  at::Tensor readable(const at::Tensor& weight, bool may_be_frozen) const {
    const bool takes_panels = problem.dtype != DType::bf16 || !is_one_kernel();
    if (!takes_panels) return plain_weight(weight);
    return operand_weight(weight, may_be_frozen ? std::optional(problem.rows) : std::nullopt);
  }
  // A projection without input features has no memory, but is not absent: its bias counts.
  static ConstMatrix present_matrix(const at::Tensor& t) {
    static constexpr char nothing = 0;
    ConstMatrix m = matrix(t);
    if (!m.data) m.data = &nothing;
    return m;
  }
  const void* contiguous_data(at::Tensor& bias) {
    if (!bias.defined()) return nullptr;
    bias = bias.contiguous();
    return bias.const_data_ptr();
  }
};

// Operands of layer i's linear map, or of its projection.
Operands operands_of(const Stack& s, size_t i, const at::Tensor& h, bool projection) {
  Operands o;
  o.x = h;
  o.weight = projection ? s.parameters.projections[i] : s.parameters.weights[i];
  o.bias = projection ? s.parameters.projection_biases[i] : s.parameters.biases[i];
  o.shape = {s.rows, h.size(1), o.weight.size(0), s.problem.dtype};
  return o;
}

at::Tensor projected(const Stack& s, size_t i, const at::Tensor& h, CommonPath& path) {
  const Operands o = operands_of(s, i, h, /*projection=*/true);
  at::Tensor result = at::empty({s.rows, o.shape.out_features}, s.options);
  path.add(layer_forward(o, Activation::none, {}, result));
  return result;
}

// The shortcut that layer i adds to its activation; undefined if the layer adds none.
at::Tensor shortcut_of(const Stack& s, size_t i, const at::Tensor& h, CommonPath& path) {
  if (s.parameters.projections[i].defined()) return projected(s, i, h, path);
  return s.layers[i].adds_input ? h : at::Tensor();
}

// y is 2-D. `z` holds every layer's z, or is undefined.
Path forward_by_layer(const Stack& s, const at::Tensor& y, const at::Tensor& z) {
  CommonPath path;
  at::Tensor h = s.x;
  if (s.concat()) {
    const OwnCalls own_calls;
    y.narrow(1, 0, h.size(1)).copy_(h);
    h = y.narrow(1, 0, h.size(1));
  }
  for (size_t i = 0; i < s.layers.size(); ++i) {
    const StackLayer& l = s.layers[i];
    Operands o = operands_of(s, i, h, /*projection=*/false);
    o.residual = shortcut_of(s, i, h, path);
    const bool last = i + 1 == s.layers.size();
    const at::Tensor out = s.concat() ? y.narrow(1, l.in_features, l.out_features)
                           : last     ? y
                                      : at::empty({s.rows, l.out_features}, y.options());
    path.add(layer_forward(o, s.activation, z.defined() ? s.z_of(z, i) : at::Tensor(), out));
    h = s.concat() ? y.narrow(1, 0, l.in_features + l.out_features) : out;
  }
  return path.path();
}

at::Tensor empty_z(const Stack& s) {
  int64_t features = 0;
  for (const StackLayer& layer : s.layers) features += layer.out_features;
  return at::empty({s.rows * features}, s.options);
}

at::Tensor forward_rows(Stack& s, const at::Tensor& x, const at::Tensor& z) {
  at::Tensor y = empty_output(x, s.out_features());
  const at::Tensor rows = y.view({s.rows, s.out_features()});
  if (!s.is_one_kernel()) {
    policy::count_forward(s.backend.counted(forward_by_layer(s, rows, z)));
    return y;
  }
  policy::count_forward(Path::fused);
  if (z.defined()) s.set_z(z);
  s.problem.y = mutable_row_major(rows);
  s.backend.stack_forward(s.problem);
  return y;
}

at::Tensor residual_stack(const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases,
                          const OptionalTensors& projections, const OptionalTensors& projection_biases,
                          std::string_view shortcut_name, std::string_view activation_name, bool) {
  const Activation activation = parse_activation(activation_name);
  const StackShortcut shortcut = parse_shortcut(shortcut_name);
  StackParameters p = stack_parameters(weights, biases, projections, projection_biases);
  check_stack(x, p, shortcut);
  const c10::OptionalDeviceGuard guard(x.device());
  // Inference tensors skip the Autograd key, which asks this for all other tensors.
  if (const char* reason = policy::why_disabled()) {
    policy::leave_fused_path(reason);
    return composition::residual_stack(x, plain_parameters(p), shortcut, activation);
  }
  if (policy::runs_torch(x)) return torch_path::residual_stack(x, plain_parameters(p), shortcut, activation);
  Stack s(x, std::move(p), shortcut, activation, /*may_be_frozen=*/true);
  return forward_rows(s, x, {});
}

std::tuple<at::Tensor, at::Tensor> residual_stack_forward(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, const OptionalTensors& projections,
    const OptionalTensors& projection_biases, std::string_view shortcut_name, std::string_view activation_name) {
  StackParameters p = stack_parameters(weights, biases, projections, projection_biases);
  const StackShortcut shortcut = parse_shortcut(shortcut_name);
  check_stack(x, p, shortcut);
  const c10::OptionalDeviceGuard guard(x.device());
  Stack s(x, std::move(p), shortcut, parse_activation(activation_name), /*may_be_frozen=*/false);
  at::Tensor z = empty_z(s);
  at::Tensor y = forward_rows(s, x, z);
  return {std::move(y), std::move(z)};
}

void backward_as_one(Stack& s, const at::Tensor& grad, const OptionalTensor& z, StackGradients& g) {
  if (z) s.set_z(*z);
  for (size_t i = 0; i < s.layers.size(); ++i) {
    StackLayer& l = s.layers[i];
    g.allocate(i);
    l.dweight = mutable_row_major(g.weights[i].storage), l.dprojection = mutable_row_major(g.projections[i].storage);
    l.dweight_transposed = g.weights[i].transposed, l.dprojection_transposed = g.projections[i].transposed;
    l.db = mutable_data_of(g.biases[i]), l.dprojection_bias = mutable_data_of(g.projection_biases[i]);
  }
  s.problem.dy = row_major(grad);
  s.problem.dx = mutable_row_major(g.x);
  s.backend.stack_backward(s.problem);
}

// Restores from the zs the layers' inputs that backward reads. Computes the zs that were not kept, into `z`.
std::vector<at::Tensor> restored_inputs(const Stack& s, const StackReads& plan, const at::Tensor& z,
                                        CommonPath& path) {
  std::vector<at::Tensor> inputs(s.layers.size());
  inputs[0] = s.x;
  at::Tensor all;
  if (s.concat() && plan.reads_x()) {
    const OwnCalls own_calls;
    // As wide as the output: with forward's strides the library's products have forward's bits.
    all = at::empty({s.rows, s.out_features()}, s.options);
    all.narrow(1, 0, s.x.size(1)).copy_(s.x);
  }
  for (size_t i = 0; i < s.layers.size(); ++i) {
    const StackLayer& l = s.layers[i];
    const StackLayerReads& reads = plan.reads[i];
    const at::Tensor& h = inputs[i];
    at::Tensor addend, out;
    if (reads.output) {
      addend = shortcut_of(s, i, h, path);
      out = s.concat() && all.defined() ? all.narrow(1, l.in_features, l.out_features)
                                        : at::empty({s.rows, l.out_features}, s.options);
      inputs[i + 1] = s.concat() && all.defined() ? all.narrow(1, 0, l.in_features + l.out_features) : out;
    }
    if (reads.forms_z) {
      Operands o = operands_of(s, i, h, /*projection=*/false);
      o.residual = addend;
      const at::Tensor own_z = s.z_of(z, i);
      path.add(out.defined() ? layer_forward(o, s.activation, own_z, out)
                             : layer_forward(o, Activation::none, {}, own_z));
    } else if (reads.output) {
      EpilogueProblem p;
      p.m = s.rows, p.n = l.out_features, p.dtype = s.problem.dtype, p.product = row_major(s.z_of(z, i));
      p.epilogue.activation = s.activation, p.epilogue.out = mutable_row_major(out);
      p.epilogue.addend = row_major(addend);
      s.backend.epilogue(p);
    }
  }
  return inputs;
}

Path backward_by_layer(const Stack& s, const StackReads& plan, at::Tensor grad, const at::Tensor& z,
                       StackGradients& g) {
  CommonPath path;
  std::vector<at::Tensor> inputs = restored_inputs(s, plan, z, path);
  const auto empty_dx = [&](size_t i) { return at::empty({s.rows, s.layers[i].in_features}, grad.options()); };
  const auto network_layer = [&](size_t i) {
    const bool needs_dh = plan.uses[i].projects || (s.layers[i].adds_input && plan.reads[i].dh);
    return NetworkLayer{s.activation, plan.reads[i].slope ? s.z_of(z, i) : at::Tensor(), g.biases[i], needs_dh};
  };
  NetworkLayer layer = network_layer(s.layers.size() - 1);
  for (size_t i = s.layers.size(); i-- > plan.first;) {
    const StackLayer& l = s.layers[i];
    g.allocate(i);
    const at::Tensor dx = i > plan.first ? empty_dx(i) : i == 0 ? g.x : at::Tensor();
    BackwardTensors t;
    if (plan.uses[i].projects) {
      t.dy = grad, t.x = inputs[i], t.weight = s.parameters.projections[i];
      if (dx.defined()) t.dx = empty_dx(i);
      t.dweight = g.projections[i].storage, t.dweight_transposed = g.projections[i].transposed;
      t.db = g.projection_biases[i];
      path.add(layer_backward(t, Activation::none));
      const at::Tensor through_projection = t.dx;
      t = {};
      t.grad_shortcut = through_projection;
    } else if (l.adds_input) {
      t.grad_shortcut = grad;
    } else if (s.concat()) {
      t.grad_shortcut = grad.narrow(1, 0, l.in_features);
    }
    t.x = inputs[i], t.weight = s.parameters.weights[i];
    t.dx = dx, t.dweight = g.weights[i].storage, t.dweight_transposed = g.weights[i].transposed;
    const at::Tensor dh = s.concat() ? grad.narrow(1, l.in_features, l.out_features) : grad;
    // In a concatenation dx holds more than the dh of the layer before.
    const bool goes_on = i > plan.first && !s.concat();
    NetworkLayer before = i > plan.first ? network_layer(i - 1) : NetworkLayer{};
    path.add(layer_backward(std::move(t), layer, dh, goes_on ? &before : nullptr));
    layer = std::move(before);
    grad = dx;
    inputs.pop_back();
  }
  return path.path();
}

std::vector<at::Tensor> residual_stack_backward(const at::Tensor& grad, const OptionalTensor& x,
                                                const OptionalTensors& weights, const OptionalTensors& biases,
                                                const OptionalTensors& projections,
                                                const OptionalTensors& projection_biases, const OptionalTensor& z,
                                                at::IntArrayRef features, std::string_view shortcut_name,
                                                std::string_view activation_name, at::IntArrayRef needed,
                                                at::IntArrayRef column_major) {
  const StackShortcut shortcut = parse_shortcut(shortcut_name);
  const Activation activation = parse_activation(activation_name);
  StackParameters p = saved_stack_parameters(weights, biases, projections, projection_biases);
  const std::vector<c10::SymInt> symbolic(features.begin(), features.end());
  const StackReads plan = check_stack_backward(grad, x, p, z, symbolic, shortcut, activation, needed);
  const c10::OptionalDeviceGuard guard(grad.device());
  Stack s(grad, x.value_or(at::Tensor()), std::move(p), features, shortcut, activation, /*may_be_frozen=*/false);
  StackGradients gradients(grad, s.layers, s.rows, needed, column_major);
  const at::Tensor rows = with_unit_column_stride(flatten_leading(grad));
  if (s.is_one_kernel()) {
    backward_as_one(s, rows, z, gradients);
    policy::count_backward(Path::fused);
  } else {
    const at::Tensor all_z = z ? *z : plan.reads_z() ? empty_z(s) : at::Tensor();
    policy::count_backward(s.backend.counted(backward_by_layer(s, plan, rows, all_z, gradients)));
  }
  return gradients.in_order();
}

}  // namespace

bool keeps_z(const at::Tensor& x, const StackParameters& p, StackShortcut shortcut) {
  const c10::SymInt elements = stack_z_size(x, p);
  if (!x.device().is_cpu() || elements.is_symbolic()) return true;
  // Up to this size glibc's malloc may reuse memory that it has; a larger block is fresh pages (its largest
  // M_MMAP_THRESHOLD).
  constexpr int64_t kReusedBytes = int64_t{32} << 20;
  if (elements.expect_int() * static_cast<int64_t>(x.element_size()) <= kReusedBytes) return true;
  return !StackSizes(x, features_of(x, p), shortcut).is_one_kernel();
}

void register_stack_operators(torch::Library& m) {
  m.impl("residual_stack", residual_stack);
  m.impl("residual_stack_forward", residual_stack_forward);
  m.impl("residual_stack_backward", residual_stack_backward);
}

}  // namespace fastlane
