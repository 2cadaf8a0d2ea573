// The order in which a node hands gradients on. Hooks on parameters and inputs see this order.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <utility>

namespace fastlane {

// torch's engine first runs the nodes that add to a leaf's .grad, and then the node that was made last. Its heap
// turns the order of our edges into the order of the leaves. The tensors come in the order in which eager's nodes
// reach them. The result lists their indices so that the heap gives the edges out in eager's order. The order is
// exact if no other node is ready and each leaf comes once.
template <class TensorAt>
c10::SmallVector<size_t, 32> edge_order(size_t count, const TensorAt& tensor_at) {
  c10::SmallVector<size_t, 32> order, others;
  size_t inner = 0;
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& t = tensor_at(i);
    const bool has_edge = t.requires_grad(), is_leaf = has_edge && t.is_leaf();
    (is_leaf ? order : others).push_back(i);
    inner += has_edge && !is_leaf;
  }
  const size_t leaves = order.size();
  if (leaves > 2) {
    using Entry = std::pair<bool, size_t>;  // whether the edge leads to a leaf, and its place among the edges
    const auto runs_later = [](const Entry& a, const Entry& b) { return a.first < b.first; };
    c10::SmallVector<Entry, 32> heap;  // as std::priority_queue keeps it
    for (size_t place = 0; place < leaves + inner; ++place) {
      heap.emplace_back(place < leaves, place);
      std::push_heap(heap.begin(), heap.end(), runs_later);
    }
    c10::SmallVector<size_t, 32> placed(leaves);
    for (size_t i = 0; i < leaves; ++i) {
      placed[heap.front().second] = order[i];
      std::pop_heap(heap.begin(), heap.end(), runs_later);
      heap.pop_back();
    }
    order = std::move(placed);
  }
  order.append(others.begin(), others.end());
  return order;
}

// Eager's linear layer reaches its bias first. If x is a matrix or there is no bias, eager multiplies x after it
// transposes the weight, and so backward reaches x before the weight. Otherwise backward reaches the weight first.
inline bool reaches_x_before_weight(const at::Tensor& x, bool has_bias) { return x.dim() == 2 || !has_bias; }

// The tensor arguments of a node with few arguments, each with its role, in the order of the node's edges.
class Edges {
 public:
  static constexpr size_t kMaxRoles = 8;

  // Leaves out undefined tensors.
  explicit Edges(std::initializer_list<std::pair<size_t, const at::Tensor&>> as_in_eager) {
    c10::SmallVector<at::Tensor, kMaxRoles> present;
    std::array<size_t, kMaxRoles> present_roles{};
    for (const auto& [role, t] : as_in_eager)
      if (t.defined()) present_roles[present.size()] = role, present.push_back(t);
    const auto order = edge_order(present.size(), [&](size_t i) -> const at::Tensor& { return present[i]; });
    for (size_t place = 0; place < order.size(); ++place) {
      tensors.push_back(std::move(present[order[place]]));
      roles |= static_cast<int64_t>(present_roles[order[place]] + 1) << (kRoleBits * place);
    }
  }

  c10::SmallVector<at::Tensor, kMaxRoles> tensors;
  int64_t roles = 0;  // packed, so that a node can keep them as one number

  // Calls f(place, role) for each edge.
  template <class F>
  static void for_each(int64_t roles, F f) {
    for (size_t place = 0; roles != 0; ++place, roles >>= kRoleBits)
      f(place, static_cast<size_t>(roles & ((1 << kRoleBits) - 1)) - 1);
  }
  static std::array<at::Tensor, kMaxRoles> by_role(at::TensorList tensors, int64_t roles) {
    std::array<at::Tensor, kMaxRoles> result;
    for_each(roles, [&](size_t place, size_t role) { result[role] = tensors[place]; });
    return result;
  }

 private:
  static constexpr int kRoleBits = 4;
};

}  // namespace fastlane
