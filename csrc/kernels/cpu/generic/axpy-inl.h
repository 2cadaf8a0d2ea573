// A product with few rows whose B runs along n in memory. Rows of B, each times an element of A, are added up. An
// element meets its multiply-adds in the order of gemm-inl.h's tiles, so that the bits are the same.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/generic/epilogue-inl.h"
#include "kernels/cpu/generic/few_rows-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/tile-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

// With more rows packing B pays, earlier with fewer registers and where B is not stored as it is multiplied. Measured
// at 768 to 3072 features, with one and two threads.
template <class T, class P>
constexpr int64_t kAxpyMaxRows = P::V::width == 1                      ? 0
                                 : kTileRows * kTileVecs < 24          ? 48
                                 : std::is_same_v<T, typename P::Unit> ? 128
                                                                       : 96;
// Up to this many rows, pairing two rows of B costs more than it saves.
constexpr int64_t kAxpyMaxUnpairedRows = 2;

// The sums of some columns, before the finish.
template <class T, class P>
class AxpyColumns {
  using C = typename P::C;
  using V = typename P::V;
  using Unit = typename P::Unit;
  static constexpr int W = V::width;
  // The size of a tile, which has as many sums as gemm-inl.h's tiles.
  static constexpr int kMaxRows = 6, kVecs = kTileRows * kTileVecs / kMaxRows;

 public:
  // For `cols` columns from `col` on. Rows of sums lie `stride` ≥ cols apart, a multiple of W.
  AxpyColumns(const GemmProblem& problem, int64_t col, int64_t cols, int64_t stride)
      : p_(problem),
        a_{static_cast<const T*>(p_.a.data), p_.m, p_.a.row_stride, p_.a.col_stride},
        b_{static_cast<const T*>(p_.b.data) + col, cols, 1, p_.b.row_stride},
        stride_(stride),
        looks_at_a_(col == 0),
        packed_a_(ScratchSlot::packed_a, bytes_of<Unit>(kChain * p_.m)) {}

  static constexpr int64_t kPanel = kVecs * W;
  static constexpr int64_t kBlock = kBlockSteps<P> * P::k_per_step;

  // sums = A B over the block of k that begins at `begin`. False if the product dropped a value (product-inl.h).
  bool run_block(int64_t begin, C* sums) const {
    const int64_t end = std::min(p_.k, begin + kBlock);
    bool dropped = false;
    for (int64_t k = begin; k == begin || k < end; k += kChainK) {
      const Chain chain{k, std::min(end, k + kChainK), k == begin, sums};
      dropped |= looks_at_a_ && drops_any<P>(a_, 0, p_.m, k, chain.end);
      pack_a(chain);
      dropped |= run_chain(chain);
    }
    return !dropped;
  }

 private:
  static constexpr int64_t kHalfPanel = kVecs / 2 * W;
  // With fewer registers a panel is at most a line wide. Where rows of B lie a power of two apart, these lines share
  // a few sets of L1, so each tile would read them from L2. Wider panels were not measured.
  static constexpr bool kMayPack = kTileRows * kTileVecs < 24 && W > 1;
  static constexpr int64_t kMinPackedTiles = 2;
  // One or two rows take two panels at a time, to have more independent sums.
  static constexpr int kWideRows = 2;
  static constexpr int64_t kChainK = kChain * P::k_per_step;

  struct Chain {
    int64_t k, end;
    bool is_first;
    C* sums;
  };
  // A tile prefetches B for later tiles: `bytes` of each row, `offset` bytes from where the tile itself reads.
  struct Ahead {
    int64_t offset = 0, bytes = 0;
  };

  // Packs A step by step, with the rows side by side.
  void pack_a(const Chain& chain) const {
    Unit* const packed = packed_a_.as<Unit>();
    for (int64_t row = 0; row < p_.m; ++row) {
      Unit units[kChain];
      int64_t k = chain.k, steps = 0;
      if (a_.k_stride == 1)
        for (; k < chain.end; k += W * P::k_per_step, steps += W)
          P::store_units(units + steps, P::units_along_k(a_.at(row, k), chain.end - k));
      for (; k < chain.end; k += P::k_per_step) units[steps++] = P::unit(a_.at(row, k), a_.k_stride, chain.end - k);
      for (int64_t step = 0; step < steps_of<P>(chain.end - chain.k); ++step) packed[step * p_.m + row] = units[step];
    }
  }

  // Goes panel by panel, so that a chain's rows of B stay in L1 and their pages in the TLB.
  bool run_chain(const Chain& chain) const {
    const int64_t panel = (p_.m <= kWideRows ? 2 : 1) * kPanel;
    bool dropped = false;
    for (int64_t col = 0; col < b_.count;) {
      const int64_t left = b_.count - col;
      const int64_t width = left >= panel ? panel : left >= kHalfPanel ? kHalfPanel : std::min<int64_t>(W, left);
      dropped |= drops_any<P>(b_, col, width, chain.k, chain.end);
      run_panel(chain, col, width, ahead_of(chain, col, width, panel));
      col += width;
    }
    return dropped;
  }

  // The next panel, or the first panel of the next chain. Their rows may lie a page apart, which the hardware does
  // not foresee.
  Ahead ahead_of(const Chain& chain, int64_t col, int64_t width, int64_t panel) const {
    constexpr auto size = static_cast<int64_t>(sizeof(T));
    if (b_.count - col - width >= panel) return {width * size, panel * size};
    if (chain.k + 2 * kChainK > p_.k) return {};
    return {(kChainK * b_.k_stride - col) * size, std::min(panel, b_.count) * size};
  }

  void run_panel(const Chain& chain, int64_t col, int64_t width, Ahead ahead) const {
    const int64_t tiles = ceil_div(p_.m, kMaxRows);
    if constexpr (kMayPack)
      if (width == kPanel && tiles >= kMinPackedTiles) return run_packed_panel(chain, col, tiles, ahead);
    // Two tiles ask for what lies ahead, since requests get lost where memory is busy.
    for_each_tile(tiles, [&](int64_t i, int64_t row, auto rows) {
      run_tile<rows>(chain, row, col, width, i < 2 ? ahead : Ahead{});
    });
  }

  void run_packed_panel(const Chain& chain, int64_t col, int64_t tiles, Ahead ahead) const {
    alignas(64) Unit packed[kChain * kPanel];
    pack_b(chain, col, ahead, packed);
    for_each_tile(tiles, [&](int64_t, int64_t row, auto rows) { multiply_packed<rows>(chain, row, col, packed); });
  }

  // Calls f with each tile's number, first row, and number of rows as a constant.
  template <class F>
  void for_each_tile(int64_t tiles, F f) const {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = p_.m * i / tiles;
      with_rows<1>(p_.m * (i + 1) / tiles - row, [&](auto rows) { f(i, row, rows); });
    }
  }

  // Calls f with `rows` as a constant.
  template <int kRows, class F>
  static void with_rows(int64_t rows, F f) {
    if constexpr (kRows < kMaxRows)
      if (rows > kRows) return with_rows<kRows + 1>(rows, f);
    f(std::integral_constant<int, kRows>{});
  }

  // Packs a panel's steps side by side.
  void pack_b(const Chain& chain, int64_t col, Ahead ahead, Unit* packed) const {
    const T* b = b_.at(col, chain.k);
    for (int64_t k = chain.k; k < chain.end; k += P::k_per_step, b += P::k_per_step * b_.k_stride, packed += kPanel) {
      const int64_t rows = std::min<int64_t>(P::k_per_step, chain.end - k);
      fetch(b, rows, ahead);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        P::store_units(packed + v * W, rows == P::k_per_step ? P::units_along_strip(b + v * W, b_.k_stride)
                                                             : P::units_along_strip(b + v * W, b_.k_stride, rows, W));
    }
  }

  FASTLANE_INLINE void fetch(const T* b, int64_t rows, Ahead ahead) const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t byte = 0; byte < ahead.bytes; byte += kLineBytes)
        __builtin_prefetch(reinterpret_cast<const char*>(b + row * b_.k_stride) + ahead.offset + byte, 0, 2);
  }

  template <int kRows>
  void run_tile(const Chain& chain, int64_t row, int64_t col, int64_t width, Ahead ahead) const {
    if constexpr (kRows <= kWideRows)
      if (width == 2 * kPanel) return multiply<kRows, 2 * kVecs>(chain, row, col, W, ahead);
    if (width == kPanel) return multiply<kRows, kVecs>(chain, row, col, W, ahead);
    if (width == kHalfPanel) return multiply<kRows, kVecs / 2>(chain, row, col, W, ahead);
    multiply<kRows, 1>(chain, row, col, width, ahead);
  }

  // Adds a chain to kRows rows × kColVecs vectors of columns; the last vector holds `last_count` columns.
  template <int kRows, int kColVecs>
  __attribute__((noinline)) void multiply(const Chain& chain, int64_t row, int64_t col, int64_t last_count,
                                          Ahead ahead) const {
    const T* b = b_.at(col, chain.k);
    const auto count = [&](int v) { return v + 1 < kColVecs ? W : last_count; };
    add_steps<kRows, kColVecs>(chain, row, col, [&](auto take_step) {
      for (int64_t step = (chain.end - chain.k) / P::k_per_step; step > 0; --step) {
        fetch(b, P::k_per_step, ahead);
        take_step([&](int v) {
          const T* const from = b + v * W;
          return count(v) == W ? P::units_along_strip(from, b_.k_stride)
                               : P::units_along_strip(from, b_.k_stride, P::k_per_step, count(v));
        });
        b += P::k_per_step * b_.k_stride;
      }
      if ((chain.end - chain.k) % P::k_per_step != 0)
        take_step([&](int v) { return P::units_along_strip(b + v * W, b_.k_stride, 1, count(v)); });
    });
  }

  // The same with a panel that pack_b packed.
  template <int kRows>
  __attribute__((noinline)) void multiply_packed(const Chain& chain, int64_t row, int64_t col, const Unit* b) const {
    add_steps<kRows, kVecs>(chain, row, col, [&](auto take_step) {
      for (int64_t step = steps_of<P>(chain.end - chain.k); step > 0; --step, b += kPanel)
        take_step([&](int v) { return P::lanes(b + v * W); });
    });
  }

  // Adds to kRows rows × kColVecs vectors of sums. `for_each_step` calls its argument for each step with a function
  // that gives vector v of B's columns.
  template <int kRows, int kColVecs, class Steps>
  FASTLANE_INLINE void add_steps(const Chain& chain, int64_t row, int64_t col, Steps for_each_step) const {
    const Unit* a = packed_a_.as<Unit>() + row;
    V acc[kRows][kColVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kColVecs; ++v) acc[i][v] = V::set(0);
    for_each_step([&](auto lanes_at) {
      V lanes[kColVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kColVecs; ++v) lanes[v] = lanes_at(v);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto ai = P::broadcast(a + i);
#pragma GCC unroll 8
        for (int v = 0; v < kColVecs; ++v) acc[i][v] = P::multiply_add(ai, lanes[v], acc[i][v]);
      }
      a += p_.m;
    });
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kColVecs; ++v) {
        C* const sum = chain.sums + (row + i) * stride_ + col + v * W;
        store(sum, chain.is_first ? acc[i][v] : load(sum) + acc[i][v]);
      }
  }

  const GemmProblem& p_;
  Strips<T> a_, b_;
  int64_t stride_;
  bool looks_at_a_;
  Scratch packed_a_;
};

template <class T, class P>
class AxpyGemm {
  using C = typename P::C;
  using V = typename P::V;

 public:
  AxpyGemm(const GemmProblem& problem, const Parallel& parallel) : p_(problem), parallel_(parallel) {}

  static bool suits(const GemmProblem& p, int64_t threads) {
    return p.m <= max_rows(p, threads) && multiplies_as_stored(p) && (p.b.col_stride == 1 || p.n <= 1);
  }

  // False if the product dropped a value (product-inl.h).
  bool run() {
    if (p_.m == 0 || p_.n == 0) return true;
    const int64_t runs = p_.ends_in_gradient ? ceil_div(p_.m, kRunRows) : 0;
    const Scratch run_sums(ScratchSlot::run_sums, bytes_of<C>(runs * p_.n));
    const int64_t panel = AxpyColumns<T, P>::kPanel;
    for_columns(p_, p_.n >= panel * parallel_.threads ? panel : V::width, kTaskCols, parallel_,
                [&](int64_t col, int64_t cols) { run_columns(col, cols, run_sums.as<C>()); });
    if (p_.ends_in_gradient)
      store_run_sums(run_sums.as<C>(), runs, p_.n, static_cast<T*>(p_.gradient.column_sums), parallel_);
    return !dropped_.load();
  }

 private:
  static constexpr int64_t kTaskCols = 1024;
  static constexpr int64_t kRunRows = TileShape<C>::rows;  // how many rows one call of finish sums

  // Every task packs A, which with many rows pays only if the task has several panels. gemm-inl.h sums columns over
  // other runs of rows. So where there are column sums the limit must not depend on the threads, or their bits would.
  static int64_t max_rows(const GemmProblem& p, int64_t threads) {
    const bool many_panels = p.n >= 4 * AxpyColumns<T, P>::kPanel * threads;
    return many_panels && !p.ends_in_gradient ? kAxpyMaxRows<T, P> : std::min(kAxpyMaxRows<T, P>, 2 * kRunRows);
  }

  void run_columns(int64_t col, int64_t cols, C* run_sums) {
    const int64_t stride = ceil_div(cols, V::width) * V::width, size = p_.m * stride;
    const AxpyColumns<T, P> columns(p_, col, cols, stride);
    constexpr int64_t kBlock = AxpyColumns<T, P>::kBlock;
    const Scratch scratch(ScratchSlot::task_sums, bytes_of<C>(p_.k > kBlock ? 2 * size : size));
    C *const total = scratch.as<C>(), *const block = total + size;
    if (!columns.run_block(0, total)) dropped_ = true;
    for (int64_t k = kBlock; k < p_.k; k += kBlock) {
      if (!columns.run_block(k, block)) dropped_ = true;
      for (int64_t i = 0; i < size; i += V::width) store(total + i, load(total + i) + load(block + i));
    }
    for (int64_t row = 0; row < p_.m; row += kRunRows) {
      const Region region{row, col, std::min(kRunRows, p_.m - row), cols};
      const C* const sums = total + row * stride;
      if (p_.ends_in_gradient) {
        finish_gradient<T>(p_.gradient, region, sums, stride, run_sums + row / kRunRows * p_.n);
      } else {
        finish<T>(p_.epilogue, region, sums, stride);
      }
    }
  }

  const GemmProblem& p_;
  Parallel parallel_;
  std::atomic<bool> dropped_{false};
};

FASTLANE_END_TARGET
