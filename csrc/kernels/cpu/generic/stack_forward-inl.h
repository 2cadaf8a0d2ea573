// A stack's forward: a block of rows goes through all layers while it lies in cache, so that x is read once, and y
// and each z are written once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cpu/generic/block_product-inl.h"
#include "kernels/cpu/generic/dot-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/panel_rows-inl.h"
#include "kernels/cpu/generic/product-inl.h"
#include "kernels/cpu/generic/tile-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

// The width of the widest layer's output.
inline int64_t widest_output(const StackProblem& p) {
  int64_t widest = 0;
  for (int64_t i = 0; i < p.count; ++i) widest = std::max(widest, p.layers[i].out_features);
  return widest;
}

inline double stack_multiply_adds(const StackProblem& p) {
  double sum = 0;
  for (int64_t i = 0; i < p.count; ++i)
    sum += static_cast<double>(p.layers[i].in_features) * static_cast<double>(p.layers[i].out_features);
  return sum * static_cast<double>(p.rows);
}

template <class T>
void copy_rows(const ConstRowMajor& from, const RowMajor& to, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(element<const T>(from, i, 0), cols, element<T>(to, i, 0));
}

// Takes rows [row, row + rows) through all layers. `multiply(problem, layer, is_projection)` computes one product
// with its epilogue. `work` holds three blocks of rows of the widest output: h, the next h, and a projected h.
template <class T, class Multiply>
void walk_forward(const StackProblem& p, int64_t row, int64_t rows, T* work, Multiply multiply) {
  const int64_t block = rows * widest_output(p);
  ConstRowMajor h{element<const T>(p.x, row, 0), p.x.row_stride};
  if (p.concat) {
    const RowMajor y{element<T>(p.y, row, 0), p.y.row_stride};
    copy_rows<T>(h, y, rows, p.layers[0].in_features);
    h = {y.data, y.row_stride};
  }
  for (int64_t i = 0; i < p.count; ++i) {
    const StackLayer& layer = p.layers[i];
    GemmProblem g;
    g.m = rows, g.n = layer.out_features, g.k = layer.in_features, g.dtype = p.dtype;
    g.a = {h.data, h.row_stride, 1};
    Epilogue& e = g.epilogue;
    ConstRowMajor shortcut;
    if (layer.projects()) {
      g.b = layer.projection.transposed(), g.b_panels = layer.projection_panels, e.bias = layer.projection_bias;
      e.out = {work + 2 * block, g.n};
      multiply(g, i, /*is_projection=*/true);
      shortcut = {e.out.data, e.out.row_stride};
    } else if (layer.adds_input) {
      shortcut = h;
    }
    g.b = layer.weight.transposed(), g.b_panels = layer.panels, e.bias = layer.bias, e.activation = p.activation;
    e.addend = shortcut;
    e.z = {element<T>(layer.z, row, 0), layer.z.row_stride};
    if (p.concat) {
      e.out = {element<T>(p.y, row, layer.in_features), p.y.row_stride};
    } else if (i + 1 == p.count) {
      e.out = {element<T>(p.y, row, 0), p.y.row_stride};
    } else {
      e.out = {work + i % 2 * block, g.n};
    }
    multiply(g, i, /*is_projection=*/false);
    if (!p.concat) h = {e.out.data, e.out.row_stride};
  }
}

template <class T, class P>
class StackForward {
  using Unit = typename P::Unit;
  using S = TileShape<typename P::C>;

 public:
  StackForward(const StackProblem& problem, const Parallel& parallel) : p_(problem), parallel_(parallel) {
    if (stack_multiply_adds(p_) < kSerialMultiplyAdds) parallel_.threads = 1;
  }

  // False if a product dropped a value (product-inl.h).
  bool run() {
    const Scratch offsets(ScratchSlot::stack_layout, bytes_of<int64_t>(p_.count));
    offsets_ = offsets.as<int64_t>();
    int64_t units = 0;
    for (int64_t i = 0; i < p_.count; ++i) {
      offsets_[i] = units;
      units += weight(i).units() + projection(i).units();
    }
    const Scratch packed(ScratchSlot::packed_b, bytes_of<Unit>(units));
    packed_ = packed.as<Unit>();
    parallel_.for_each(p_.count, [&](int64_t i) { pack_layer(i); });

    const int64_t each = ceil_div(ceil_div(p_.rows, parallel_.threads), S::rows) * S::rows;
    const int64_t block_rows = std::max<int64_t>(S::rows, std::min(kBlockRows, each)), widest = widest_output(p_);
    parallel_.for_each(ceil_div(p_.rows, block_rows), [&](int64_t block) {
      const Scratch work(ScratchSlot::stack_rows, bytes_of<T>(3 * block_rows * widest));
      const int64_t row = block * block_rows;
      walk_forward(p_, row, std::min(block_rows, p_.rows - row), work.as<T>(),
                   [&](const GemmProblem& g, int64_t i, bool is_projection) { multiply(g, i, is_projection); });
    });
    return !dropped_.load();
  }

 private:
  // Whole tiles of every instruction set; three blocks of 128 columns stay in L2 beside the weights.
  static constexpr int64_t kBlockRows = 48;

  SharedOperand<T, P> operand(const ConstMatrix& weight, const Panels& panels, const StackLayer& layer,
                              Unit* packed) const {
    SharedOperand<T, P> operand(
        {static_cast<const T*>(weight.data), layer.out_features, weight.row_stride, weight.col_stride},
        layer.in_features);
    panels.data ? operand.lies_in(static_cast<const Unit*>(panels.data)) : operand.keep_in(packed);
    return operand;
  }
  SharedOperand<T, P> weight(int64_t i) const {
    const StackLayer& layer = p_.layers[i];
    return operand(layer.weight, layer.panels, layer, packed_ + offsets_[i]);
  }
  SharedOperand<T, P> projection(int64_t i) const {
    const StackLayer& layer = p_.layers[i];
    if (!layer.projects()) return {};
    return operand(layer.projection, layer.projection_panels, layer, packed_ + offsets_[i] + weight(i).units());
  }

  void pack_layer(int64_t i) {
    for (const SharedOperand<T, P>& operand : {weight(i), projection(i)})
      for (int64_t panel = 0; panel < operand.panels(); ++panel)
        if (operand.pack(panel)) dropped_ = true;
  }

  void multiply(const GemmProblem& g, int64_t i, bool is_projection) {
    const Strips<T> a{static_cast<const T*>(g.a.data), g.m, g.a.row_stride, 1};
    if (drops_any<P>(a, 0, g.m, 0, g.k)) dropped_ = true;
    multiply_block(a, is_projection ? projection(i) : weight(i), g.epilogue, 0);
  }

  const StackProblem& p_;
  Parallel parallel_;
  int64_t* offsets_ = nullptr;
  Unit* packed_ = nullptr;
  std::atomic<bool> dropped_{false};
};

template <class P>
bool suits_inner_products(const StackProblem& p) {
  const auto runs_along_k = [](const ConstMatrix& w, const Panels& panels) {
    return panels.data ? panels.ran_along_k : !w.data || w.col_stride == 1;
  };
  if (p.rows > kDotMaxRows<P>) return false;
  for (int64_t i = 0; i < p.count; ++i)
    if (const StackLayer& l = p.layers[i];
        !runs_along_k(l.weight, l.panels) || !runs_along_k(l.projection, l.projection_panels))
      return false;
  return true;
}

// For few rows: inner products of rows of h with rows of W, where they lie or in the caller's panels.
template <class T, class P>
bool run_few_rows(const StackProblem& p, const Parallel& parallel) {
  const Scratch work(ScratchSlot::stack_rows, bytes_of<T>(3 * p.rows * widest_output(p)));
  bool dropped = false;
  walk_forward(p, 0, p.rows, work.as<T>(), [&](const GemmProblem& g, int64_t, bool /*is_projection*/) {
    if constexpr (P::V::width > 1)
      if (g.b_panels.data) return void(dropped |= !PanelRows<T, P>(g, parallel).run());
    dropped |= !DotGemm<T, P>(g, parallel).run();
  });
  return !dropped;
}

template <class T, class P>
bool run_stack_rows(const StackProblem& p, const Parallel& parallel) {
  return suits_inner_products<P>(p) ? run_few_rows<T, P>(p, parallel) : StackForward<T, P>(p, parallel).run();
}

template <class T>
void run_stack_forward(const StackProblem& p, const Parallel& parallel) {
  exact_product<T>([&](auto product) { return run_stack_rows<T, decltype(product)>(p, parallel); });
}

FASTLANE_END_TARGET
