// Products of a block of rows that lies in cache: with an operand that all blocks share, or with another block of the
// same rows, summed over the blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/generic/epilogue-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/tile-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

// The panel of strips [strip, strip + R) over [0, k_count): where the strips lie, or in `packed`, which is filled now
// if `pack`.
template <int R, class P, class T>
Panel panel_of(const Strips<T>& s, int64_t strip, int64_t k_count, bool in_place, typename P::Unit* packed,
               bool pack) {
  if (in_place && is_whole_panel<R, P>(s, strip, k_count)) return panel_in_place<P>(s, strip, 0);
  if (pack) pack_panel<R, P>(s, strip, 0, k_count, packed);
  return packed_panel<R>(packed);
}

// The operand that all blocks share: packed once, or read where it lies.
template <class T, class P>
class SharedOperand {
  using Unit = typename P::Unit;
  using S = TileShape<typename P::C>;

 public:
  SharedOperand() = default;
  SharedOperand(const Strips<T>& strips, int64_t k)
      : strips_(strips), k_(k), in_place_(reads_dense_rows<P>(strips)) {}

  int64_t k() const { return k_; }
  int64_t columns() const { return strips_.count; }
  int64_t panels() const { return ceil_div(strips_.count, S::cols); }
  // The room that packing takes.
  int64_t units() const { return panels_ ? 0 : panels() * S::cols * steps_of<P>(k_); }
  // `packed` has room for units().
  void keep_in(Unit* packed) { packed_ = packed; }
  // Nothing is packed, since the panels are there.
  void lies_in(const Unit* panels) { panels_ = panels, in_place_ = false; }

  // True if the product drops one of the panel's values (product-inl.h).
  bool pack(int64_t panel) const {
    if (panels_) return false;
    if (!in_place_ || !is_whole_panel<S::cols, P>(strips_, panel * S::cols, k_))
      pack_panel<S::cols, P>(strips_, panel * S::cols, 0, k_, packed_panel_at(panel));
    return drops_any<P>(strips_, panel * S::cols, S::cols, 0, k_);
  }
  Panel panel(int64_t panel) const {
    if (panels_) return packed_panel<S::cols>(panels_ + panel * S::cols * steps_of<P>(k_));
    return panel_of<S::cols, P>(strips_, panel * S::cols, k_, in_place_, packed_panel_at(panel), /*pack=*/false);
  }

 private:
  Unit* packed_panel_at(int64_t panel) const { return packed_ + panel * S::cols * steps_of<P>(k_); }

  Strips<T> strips_;
  int64_t k_ = 0;
  bool in_place_ = false;
  Unit* packed_ = nullptr;
  const Unit* panels_ = nullptr;
};

// a b with the epilogue `e`, whose matrices have these rows from `row` on.
template <class P, class T>
void multiply_block(const Strips<T>& a, const SharedOperand<T, P>& b, const Epilogue& e, int64_t row) {
  using C = typename P::C;
  using S = TileShape<C>;
  const int64_t steps = steps_of<P>(b.k());
  Prefetcher<T> nothing_ahead;
  const Scratch packed_a(ScratchSlot::packed_a, bytes_of<typename P::Unit>(S::rows * steps + kPanelOverhang<P>));
  for (int64_t i = 0; i < a.count; i += S::rows) {
    const Panel a_panel = panel_of<S::rows, P>(a, i, b.k(), P::reads_storage && a.k_stride == 1,
                                               packed_a.as<typename P::Unit>(), /*pack=*/true);
    for (int64_t j = 0; j < b.panels(); ++j) {
      alignas(64) C tile[S::size];
      multiply_tile<P>(steps, a_panel, b.panel(j), tile, nothing_ahead);
      finish<T>(e,
                {row + i, j * S::cols, std::min<int64_t>(S::rows, a.count - i),
                 std::min<int64_t>(S::cols, b.columns() - j * S::cols)},
                tile, S::cols);
    }
  }
}

// dW = dzᵀ x, or its transpose, summed block by block in tiles.
template <class T, class P>
class WeightGrad {
  using C = typename P::C;
  using Unit = typename P::Unit;
  using S = TileShape<C>;

 public:
  WeightGrad() = default;
  // dW is out_features × in_features. `dweight` is dW, or its transpose if `transposed`.
  WeightGrad(int64_t out_features, int64_t in_features, const RowMajor& dweight, bool transposed)
      : dweight_(dweight),
        transposed_(transposed),
        rows_(transposed ? in_features : out_features),
        cols_(transposed ? out_features : in_features) {}

  bool needed() const { return dweight_.data != nullptr; }
  int64_t tiles() const { return needed() ? row_panels() * col_panels() : 0; }
  int64_t sums() const { return tiles() * S::size; }

  // A strip of dz and x is a feature; k runs over the rows. The first block of a chunk sets `sums`, later blocks add.
  void add(const Strips<T>& dz, const Strips<T>& x, int64_t rows, bool first, C* sums) const {
    for_each_tile(dz, x, rows, [&](int64_t steps, const Panel& a, const Panel& b, int64_t tile_index) {
      Prefetcher<T> nothing_ahead;
      C* const sum = sums + tile_index * S::size;
      alignas(64) C tile[S::size];
      multiply_tile<P>(steps, a, b, first ? sum : tile, nothing_ahead);
      if (!first) add_tile(sum, tile);
    });
  }
  void clear(C* sums) const { std::fill_n(sums, this->sums(), C(0)); }

  // Stores dW at once, where `rows` are all the rows there are.
  void store_product(const Strips<T>& dz, const Strips<T>& x, int64_t rows) const {
    for_each_tile(dz, x, rows, [&](int64_t steps, const Panel& a, const Panel& b, int64_t tile_index) {
      Prefetcher<T> nothing_ahead;
      alignas(64) C tile[S::size];
      multiply_tile<P>(steps, a, b, tile, nothing_ahead);
      store_tile(tile, tile_index);
    });
  }

  // Stores one tile of dW from the sums of all chunks, which lie `chunk_stride` apart and are added in their order.
  void store(C* sums, int64_t chunks, int64_t chunk_stride, int64_t tile_index) const {
    C* const total = sums + tile_index * S::size;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) add_tile(total, total + chunk * chunk_stride);
    store_tile(total, tile_index);
  }

 private:
  int64_t row_panels() const { return ceil_div(rows_, S::rows); }
  int64_t col_panels() const { return ceil_div(cols_, S::cols); }

  void store_tile(const C* tile, int64_t tile_index) const {
    Epilogue store;
    store.out = dweight_;
    const int64_t row = tile_index % row_panels() * S::rows, col = tile_index / row_panels() * S::cols;
    finish<T>(store, {row, col, std::min<int64_t>(S::rows, rows_ - row), std::min<int64_t>(S::cols, cols_ - col)},
              tile, S::cols);
  }

  // Calls f with the operands of every tile and the tile's number.
  template <class F>
  void for_each_tile(const Strips<T>& dz, const Strips<T>& x, int64_t rows, F f) const {
    const Strips<T>&a = transposed_ ? x : dz, &b = transposed_ ? dz : x;
    const bool a_in_place = reads_dense_rows<P>(a), b_in_place = reads_dense_rows<P>(b);
    const int64_t steps = steps_of<P>(rows);
    const Scratch packed_a(ScratchSlot::packed_a, bytes_of<Unit>(row_panels() * S::rows * steps + kPanelOverhang<P>));
    const Scratch packed_b(ScratchSlot::packed_b_panel, bytes_of<Unit>(S::cols * steps));
    for (int64_t j = 0; j < col_panels(); ++j) {
      const Panel b_panel =
          panel_of<S::cols, P>(b, j * S::cols, rows, b_in_place, packed_b.as<Unit>(), /*pack=*/true);
      for (int64_t i = 0; i < row_panels(); ++i) {
        const Panel a_panel = panel_of<S::rows, P>(a, i * S::rows, rows, a_in_place,
                                                   packed_a.as<Unit>() + i * S::rows * steps, /*pack=*/j == 0);
        f(steps, a_panel, b_panel, j * row_panels() + i);
      }
    }
  }

  RowMajor dweight_;
  bool transposed_ = false;
  int64_t rows_ = 0, cols_ = 0;
};

// How a reduction over rows is cut: by the number of rows alone, so that bits do not depend on the number of threads.
// Chunks are nearly equal, and their number is near a power of two: most numbers of threads share them evenly.
struct RowChunks {
  static constexpr int64_t kMinRows = 256, kMaxChunks = 64, kChainRows = 64;
  int64_t rows, chunk_rows, count;

  explicit RowChunks(int64_t total_rows, int64_t max_chunks = kMaxChunks) : rows(total_rows) {
    int64_t wanted = 1;
    while (2 * wanted <= max_chunks && 2 * wanted * kMinRows <= rows) wanted *= 2;
    chunk_rows = std::max<int64_t>(1, ceil_div(ceil_div(rows, wanted), kChainRows)) * kChainRows;
    count = std::max<int64_t>(1, ceil_div(rows, chunk_rows));
  }
  int64_t begin(int64_t chunk) const { return chunk * chunk_rows; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * chunk_rows); }
};

FASTLANE_END_TARGET
