// Panels that outlive a call: the whole of a product's B, packed once for many products.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/product-inl.h"
#include "kernels/cpu/generic/tile-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

template <class T>
int64_t run_panel_bytes(const PanelsProblem& p, const Parallel&) {
  using P = product_t<T>;
  constexpr int64_t cols = TileShape<typename P::C>::cols;
  return ceil_div(p.n, cols) * cols * steps_of<P>(p.k) * static_cast<int64_t>(sizeof(typename P::Unit));
}

template <class T>
bool run_pack(const PanelsProblem& p, const Parallel& parallel) {
  using P = product_t<T>;
  constexpr int cols = TileShape<typename P::C>::cols;
  const Strips<T> b{static_cast<const T*>(p.b.data), p.n, p.b.col_stride, p.b.row_stride};
  auto* const panels = static_cast<typename P::Unit*>(p.panels);
  const int64_t count = ceil_div(p.n, cols), size = cols * steps_of<P>(p.k), together = kPanelsTogether<cols, T>;
  std::atomic<bool> dropped{false};
  parallel.for_each(ceil_div(count, together), [&](int64_t i) {
    const int64_t first = i * together, some = std::min(together, count - first);
    if (drops_any<P>(b, first * cols, some * cols, 0, p.k)) dropped = true;
    pack_panels<cols, P>(b, first * cols, 0, p.k, {panels + first * size, some, size});
  });
  return !dropped.load();
}

template <class T>
void run_unpack(const UnpackProblem& p, const Parallel& parallel) {
  using P = product_t<T>;
  using V = typename P::V;
  using Unit = typename P::Unit;
  constexpr int cols = TileShape<typename P::C>::cols;
  const int64_t steps = steps_of<P>(p.k);
  parallel.for_each(ceil_div(p.n, cols), [&](int64_t panel) {
    const Unit* units = static_cast<const Unit*>(p.panels) + panel * cols * steps;
    const int64_t present = std::min<int64_t>(cols, p.n - panel * cols);
    for (int64_t k = 0; k < p.k; k += P::k_per_step, units += cols) {
      T values[P::k_per_step][cols];
      for (int64_t i = 0; i < cols; i += P::kUnitsOfTwo) {
        V v[2];
        P::load_values(units + i, std::min<int64_t>(P::kUnitsOfTwo, cols - i), v);
        // Two neighbours along k, or two vectors side by side.
        store(&values[0][i], v[0]);
        if (P::k_per_step == 2) {
          store(&values[P::k_per_step - 1][i], v[1]);
        } else if (i + V::width < cols) {
          store(&values[0][i + V::width], v[1]);
        }
      }
      for (int64_t step = 0; step < std::min<int64_t>(P::k_per_step, p.k - k); ++step)
        for (int64_t i = 0; i < present; ++i)
          static_cast<T*>(p.b)[(panel * cols + i) * p.n_stride + (k + step) * p.k_stride] = values[step][i];
    }
  });
}

FASTLANE_END_TARGET
