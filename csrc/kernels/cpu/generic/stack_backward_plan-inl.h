// The operands and buffers of a stack's backward, and where each layer's part of them lies.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/generic/block_product-inl.h"
#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/problem.h"
#include "kernels/stack_reads.h"

FASTLANE_BEGIN_TARGET

template <class T, class P>
class StackBackwardPlan {
  using Unit = typename P::Unit;
  using Shared = SharedOperand<T, P>;

 public:
  using Grad = WeightGrad<T, P>;

  // A layer's entry says where its part begins in each buffer: the packed operands, the sums of dW, the sums of db, a
  // row of h, a row of the layers' outputs, and the gradients that projections need again. The last entry is the end.
  struct Layout {
    int64_t operands, sums, columns, h, outputs, grads;
    StackLayerReads reads;
  };
  // The way back multiplies by W and P. The way forward multiplies by Wᵀ where z is computed again, and by Pᵀ where
  // the layer's output is computed again. Unused operands are empty.
  struct Operands {
    Shared weight, projection, weight_forward, projection_forward;
  };

  // `layout` has room for one entry more than there are layers.
  StackBackwardPlan(const StackProblem& problem, Layout* layout) : p_(problem), layout_(layout) { lay_out(); }

  const StackLayer& layer(int64_t i) const { return p_.layers[i]; }
  const Layout& at(int64_t i) const { return layout_[i]; }
  const Layout& total() const { return layout_[p_.count]; }
  int64_t widest() const { return widest_; }
  // The backward ends at the first layer from which anything is needed.
  int64_t first_needed() const { return first_needed_; }
  const StackLayerReads& reads(int64_t i) const { return layout_[i].reads; }

  Grad weight_grad(int64_t i) const {
    return {layer(i).out_features, layer(i).in_features, layer(i).dweight, layer(i).dweight_transposed};
  }
  Grad projection_grad(int64_t i) const {
    return {layer(i).out_features, layer(i).in_features, layer(i).dprojection, layer(i).dprojection_transposed};
  }

  // `packed` has room for total().operands.
  void keep_operands_in(Unit* packed) { packed_ = packed; }
  Operands operands(int64_t i) const {
    Operands o;
    Unit* packed = packed_ ? packed_ + layout_[i].operands : nullptr;
    const auto place = [&](const Shared& operand) {
      Shared placed = operand;
      placed.keep_in(packed);
      if (packed) packed += placed.units();
      return placed;
    };
    const StackLayer& l = layer(i);
    const StackLayerReads& r = reads(i);
    if (r.dh) o.weight = place(dgrad_operand(l.weight, i));
    if (r.forms_z) o.weight_forward = place(forward_operand(l.weight, i));
    if (!l.projection.data) return o;
    if (r.dh) o.projection = place(dgrad_operand(l.projection, i));
    if (r.output) o.projection_forward = place(forward_operand(l.projection, i));
    return o;
  }
  // True if a product drops a value of the layer's parameters (product-inl.h).
  bool pack(int64_t i) const {
    const Operands o = operands(i);
    bool dropped = false;
    for (const Shared* operand : {&o.weight, &o.projection, &o.weight_forward, &o.projection_forward})
      for (int64_t panel = 0; panel < operand->panels(); ++panel) dropped = operand->pack(panel) || dropped;
    return dropped;
  }

 private:
  Shared dgrad_operand(const ConstMatrix& weight, int64_t i) const {
    return {{static_cast<const T*>(weight.data), layer(i).in_features, weight.col_stride, weight.row_stride},
            layer(i).out_features};
  }
  Shared forward_operand(const ConstMatrix& weight, int64_t i) const {
    return {{static_cast<const T*>(weight.data), layer(i).out_features, weight.row_stride, weight.col_stride},
            layer(i).in_features};
  }

  void lay_out() {
    const auto use_of = [&](int64_t i) {
      const StackLayer& l = layer(i);
      return StackLayerUse{
          l.adds_input,    l.projection.data != nullptr,  l.z.data != nullptr,          l.dweight.data != nullptr,
          l.db != nullptr, l.dprojection.data != nullptr, l.dprojection_bias != nullptr};
    };
    first_needed_ = stack_reads(p_.count, p_.dx.data != nullptr, p_.activation != Activation::none, p_.concat, use_of,
                                [&](int64_t i, const StackLayerReads& reads) { layout_[i].reads = reads; });
    // A concatenating stack keeps x at the beginning of h.
    Layout at{0, 0, 0, p_.concat ? p_.layers[0].in_features : 0, 0, 0, {}};
    for (int64_t i = 0; i < p_.count; ++i) {
      at.reads = reads(i);
      layout_[i] = at;
      const StackLayer& l = layer(i);
      const Operands o = operands(i);
      widest_ = std::max({widest_, l.in_features, l.out_features});
      at.operands +=
          o.weight.units() + o.projection.units() + o.weight_forward.units() + o.projection_forward.units();
      at.sums += weight_grad(i).sums() + projection_grad(i).sums();
      at.columns += ((l.db ? 1 : 0) + (l.dprojection_bias ? 1 : 0)) * column_sums_size(l.out_features);
      at.h += l.out_features;
      at.outputs += l.out_features;
      at.grads += i + 1 < p_.count && l.dprojection.data ? l.out_features : 0;
    }
    layout_[p_.count] = at;
  }

  const StackProblem& p_;
  Layout* layout_;
  Unit* packed_ = nullptr;
  int64_t widest_ = 0, first_needed_ = 0;
};

FASTLANE_END_TARGET
