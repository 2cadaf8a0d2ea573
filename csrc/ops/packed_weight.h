// A packed weight: a uint8 tensor that an operator takes in place of a weight where nothing needs a gradient. The
// tensor has the shape (out_features, bytes of a row), so that a traced graph knows the output's sizes. A header
// comes first in memory, then the weight's panels (kernels/matrix.h), or its values if no kernel would read panels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/matrix.h"

namespace fastlane {

// Weights have floating-point dtypes, so uint8 means a packed weight.
inline bool is_packed(const at::Tensor& weight) { return weight.defined() && weight.scalar_type() == at::kByte; }

// Whether a packed weight only stands for one, as while a graph is traced, and has no values to unpack. The graph
// then keeps the fused operator, which runs on any path.
inline bool lacks_values(const at::Tensor& weight) {
  constexpr c10::DispatchKeySet stand_ins({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return is_packed(weight) && (weight.is_meta() || weight.key_set().has_any(stand_ins));
}

struct PackedWeight {
  int64_t out_features = 0, in_features = 0;
  at::ScalarType dtype = at::kFloat;
  std::string kernels;  // the set that wrote the panels; empty if there are none
  Panels panels;
};

// Packs for the kernel set of this process. Raises if the weight is no 2-D CPU tensor of a kernel's dtype.
at::Tensor pack_weight(const at::Tensor& weight);

// Reads the header into `weight`. Returns the end of a message if the tensor holds no whole packed weight, or panels
// of another kernel set than this process runs; otherwise nothing.
std::string read_packed(const at::Tensor& packed, PackedWeight& weight);

// A weight with these values: a view of values that are no panels, otherwise a copy.
at::Tensor unpacked_weight(const at::Tensor& packed);

// What ATen's operators read.
inline at::Tensor plain_weight(const at::Tensor& weight) {
  return is_packed(weight) ? unpacked_weight(weight) : weight;
}
// What a forward's problem reads: a packed weight with panels, or a plain weight. FASTLANE_PATH=library takes plain
// ones alone. In a call without gradients, of `frozen_rows` rows, a frozen weight (frozen.h) may give its packed
// copy.
at::Tensor operand_weight(const at::Tensor& weight, std::optional<int64_t> frozen_rows);

// No panels for a weight that is not packed.
Panels panels_of(const at::Tensor& operand);

}  // namespace fastlane
