// Argument checks and their messages, shared by all dispatch keys. Sizes are symbolic, so that the meta kernels can
// make the same checks while a graph is traced.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <array>
#include <string_view>

#include "kernels/activation.h"
#include "kernels/problem.h"
#include "ops/packed_weight.h"
#include "ops/types.h"

namespace fastlane {

inline Activation parse_activation(std::string_view name) {
  for (size_t i = 0; i < kActivationNames.size(); ++i)
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  TORCH_CHECK_VALUE(false, "activation: got '", name, "', expected one of '", c10::Join("', '", kActivationNames),
                    "'; pass one of these");
}

inline bool has_kernel_dtype(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// `name` is text, or an object that prints as a name (StackItem).
template <class Name>
void check_dense(const char* op, const Name& name, const at::Tensor& t) {
  TORCH_CHECK(!t.is_quantized(), op, ": ", name, " is quantized, expected a floating-point tensor; convert it with ",
              name, ".dequantize()");
  TORCH_CHECK(!t.is_nested(), op, ": ", name,
              " is a nested tensor, expected a dense one; convert it with torch.nested.to_padded_tensor(", name,
              ", 0)");
  TORCH_CHECK(t.layout() == at::kStrided, op, ": ", name, " has layout ", t.layout(),
              ", expected a dense tensor; convert it with ", name, ".to_dense()");
}

// Whether the tensor only stands for another, as while a graph is traced, and has no memory of its own.
inline bool is_stand_in(const at::Tensor& t) {
  constexpr c10::DispatchKeySet stand_ins({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return t.key_set().has_any(stand_ins);
}

// Sharding and offloading may free or cut a storage while the tensor keeps its sizes. A kernel would read beyond the
// storage.
template <class Name>
void check_memory(const char* op, const Name& name, const at::Tensor& t) {
  if (t.is_meta() || !t.has_storage() || is_stand_in(t)) return;
  const size_t bytes =
      at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), static_cast<size_t>(t.storage_offset()));
  TORCH_CHECK(bytes <= t.storage().nbytes(), op, ": ", name, " has a storage of ", t.storage().nbytes(),
              " bytes, expected at least ", bytes, "; it was freed or resized, bring it back before the call");
}

template <class Name>
void check_like(const char* op, const Name& name, const at::Tensor& t, const char* like, const at::Tensor& x) {
  check_dense(op, name, t);
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " is on ", t.device(), ", expected ", x.device(), " like ",
              like, "; move one of them");
  const bool autocast_helps = t.scalar_type() != at::kDouble && x.scalar_type() != at::kDouble;
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " has dtype ", t.scalar_type(), ", expected ",
              x.scalar_type(), " like ", like, "; convert one of them",
              autocast_helps ? ", or run under torch.autocast" : "");
  check_memory(op, name, t);
}

// A column-major weight gets a column-major gradient.
inline bool is_column_major(const at::Tensor& weight) {
  const auto strides = weight.sym_strides(), sizes = weight.sym_sizes();
  return strides[0] == 1 && strides[1] == sizes[0] && sizes[0] != 1 && sizes[1] != 1;
}

// The leading sizes of x, then `features`.
inline c10::SymDimVector output_sizes(const at::Tensor& x, const c10::SymInt& features) {
  const auto sizes = x.sym_sizes();
  c10::SymDimVector result(sizes.begin(), sizes.end() - 1);
  result.push_back(features);
  return result;
}

inline void check_input(const char* op, const at::Tensor& x) {
  TORCH_CHECK(has_kernel_dtype(x), op, ": x has dtype ", x.scalar_type(),
              ", expected float32, float64, bfloat16 or float16; convert it with x.to(torch.float32)");
  check_dense(op, "x", x);
  TORCH_CHECK(x.dim() >= 1, op, ": x is 0-D, expected (..., in_features); add a dimension with x.reshape(1)");
  check_memory(op, "x", x);
}

// The names of a linear layer's parameters in messages.
struct LinearNames {
  const char *weight = "weight", *bias = "bias";
};

// A packed weight has no gradient. The check stands where a node of the graph would begin.
template <class Name>
void check_not_packed(const char* op, const Name& name, const at::Tensor& weight) {
  TORCH_CHECK(!is_packed(weight), op, ": ", name, " is packed, expected a plain weight where a tensor requires a ",
              "gradient; pass the weight itself, or call under torch.no_grad()");
}

// Checks a packed weight as the weight that it stands for. A traced one has no memory to look into.
template <class Name>
void check_packed(const char* op, const Name& name, const at::Tensor& packed, const at::Tensor& x,
                  const c10::SymInt& in_features) {
  TORCH_CHECK(packed.dim() == 2, op, ": ", name, " has dtype Byte and shape ", packed.sym_sizes(),
              ", expected dtype ", x.scalar_type(),
              " like x, or a packed weight; convert it, or pass fastlane_ext.pack_weight(weight)");
  TORCH_CHECK(x.device().is_cpu() || x.is_meta(), op, ": ", name, " is packed for the CPU and x is on ", x.device(),
              ", expected both on cpu; pass the weight itself");
  if (lacks_values(packed)) return;
  PackedWeight weight;
  const std::string fault = read_packed(packed, weight);
  TORCH_CHECK(fault.empty(), op, ": ", name, fault);
  TORCH_CHECK(weight.dtype == x.scalar_type(), op, ": ", name, " was packed from dtype ", weight.dtype, ", expected ",
              x.scalar_type(), " like x; convert x, or pack the converted weight");
  TORCH_SYM_CHECK(in_features.sym_eq(weight.in_features), op, ": ", name, " was packed from shape [",
                  weight.out_features, ", ", weight.in_features, "], expected (out_features, ", in_features,
                  ") to fit its input; pass the layer's own weight");
}

// Checks the parameters of a layer with `in_features` inputs. `source` has that size: x, or the weight of the layer
// before.
inline void check_parameters(const char* op, const LinearNames& names, const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias, const c10::SymInt& in_features, const char* source_name,
                             const at::Tensor& source) {
  if (is_packed(weight)) {
    check_packed(op, names.weight, weight, x, in_features);
  } else {
    check_like(op, names.weight, weight, "x", x);
    TORCH_CHECK(weight.dim() == 2, op, ": ", names.weight, " has shape ", weight.sym_sizes(),
                ", expected (out_features, in_features) like nn.Linear's");
    TORCH_SYM_CHECK(weight.sym_size(1).sym_eq(in_features), op, ": ", names.weight, " has shape ", weight.sym_sizes(),
                    ", expected (out_features, ", in_features, ") to fit ", source_name, " of shape ",
                    source.sym_sizes(), "; pass it as nn.Linear stores it");
  }
  if (bias) {
    check_like(op, names.bias, *bias, "x", x);
    TORCH_CHECK(bias->dim() == 1, op, ": ", names.bias, " has shape ", bias->sym_sizes(), ", expected (",
                weight.sym_size(0), ",), one element for each row of ", names.weight);
    TORCH_SYM_CHECK(bias->sym_size(0).sym_eq(weight.sym_size(0)), op, ": ", names.bias, " has shape ",
                    bias->sym_sizes(), ", expected (", weight.sym_size(0), ",), one element for each row of ",
                    names.weight);
  }
}

inline void check_linear(const char* op, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  check_input(op, x);
  check_parameters(op, {}, x, weight, bias, x.sym_size(-1), "x", x);
}

inline void check_residual(const char* op, const at::Tensor& x, const at::Tensor& weight,
                           const at::Tensor& residual) {
  check_like(op, "residual", residual, "x", x);
  const auto sizes = output_sizes(x, weight.sym_size(0));
  bool fits = residual.dim() <= x.dim();
  for (int64_t i = 1; fits && i <= residual.dim(); ++i) {
    const auto& size = residual.sym_sizes()[residual.dim() - i];
    fits = TORCH_GUARD_OR_FALSE(size.sym_eq(1)) || size == sizes[sizes.size() - i];
  }
  TORCH_CHECK(fits, op, ": residual has shape ", residual.sym_sizes(),
              ", expected one that broadcasts to the output's shape ", c10::SymIntArrayRef(sizes),
              "; project or expand it first");
}

inline void check_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual) {
  constexpr char op[] = "linear_gelu_residual";
  check_linear(op, x, weight, bias);
  if (residual) check_residual(op, x, weight, *residual);
}

inline void check_no_residual_with_concat(bool concat, const OptionalTensor& residual) {
  TORCH_CHECK(!(concat && residual), "linear_gelu_forward: residual is given, expected none with concat=True");
}

// Checks that `t` has the sizes (leading sizes of `like`..., features).
inline void check_rows(const char* op, const char* name, const at::Tensor& t, const at::Tensor& like,
                       const c10::SymInt& features) {
  const auto expected = output_sizes(like, features);
  TORCH_CHECK(t.dim() == like.dim(), op, ": ", name, " has shape ", t.sym_sizes(), ", expected ",
              c10::SymIntArrayRef(expected), "; pass what the forward was called with");
  for (int64_t i = 0; i < t.dim(); ++i)
    TORCH_SYM_CHECK(t.sym_size(i).sym_eq(expected[i]), op, ": ", name, " has shape ", t.sym_sizes(), ", expected ",
                    c10::SymIntArrayRef(expected), "; pass what the forward was called with");
}

// Hooks on saved tensors may have replaced them, so backward checks them as forward does.
inline void check_backward(const at::Tensor& grad, const OptionalTensor& z, const OptionalTensor& x,
                           const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& grad_shortcut, Activation activation,
                           std::array<bool, 3> output_mask) {
  constexpr char op[] = "linear_gelu_backward";
  TORCH_CHECK(has_kernel_dtype(grad) && grad.dim() >= 1, op, ": grad_activated has dtype ", grad.scalar_type(),
              " and shape ", grad.sym_sizes(), ", expected a floating-point tensor (..., out_features)");
  check_dense(op, "grad_activated", grad);
  check_memory(op, "grad_activated", grad);
  const bool recompute = activation != Activation::none && !z;
  TORCH_CHECK(x || !(output_mask[1] || recompute), op, ": x is missing, expected the forward's input");
  TORCH_CHECK(weight || !(output_mask[0] || recompute), op, ": weight is missing, expected the forward's weight");
  const auto check = [&](const char* name, const at::Tensor& t) { check_like(op, name, t, "grad_activated", grad); };
  if (z) {
    check("z", *z);
    check_rows(op, "z", *z, grad, grad.sym_size(-1));
  }
  if (x) {
    check("x", *x);
    check_rows(op, "x", *x, grad, x->sym_size(-1));
  }
  if (weight) {
    check("weight", *weight);
    const bool fits = weight->dim() == 2 && weight->sym_size(0) == grad.sym_size(-1) &&
                      (!x || weight->sym_size(1) == x->sym_size(-1));
    TORCH_CHECK(fits, op, ": weight has shape ", weight->sym_sizes(), ", expected (", grad.sym_size(-1),
                ", in_features); pass what the forward was called with");
  }
  if (bias) {
    check("bias", *bias);
    TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == grad.sym_size(-1), op, ": bias has shape ",
                bias->sym_sizes(), ", expected (", grad.sym_size(-1), ",); pass what the forward was called with");
  }
  if (grad_shortcut && output_mask[0]) {
    check("grad_shortcut", *grad_shortcut);
    check_rows(op, "grad_shortcut", *grad_shortcut, grad, weight->sym_size(1));
  }
}

}  // namespace fastlane
