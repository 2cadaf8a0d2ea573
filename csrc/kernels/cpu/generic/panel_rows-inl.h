// A product with few rows whose B lies in panels (panels-inl.h). It gives the bits of the product that would read B
// itself: of inner products (dot-inl.h), or of tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/generic/axpy-inl.h"
#include "kernels/cpu/generic/dot-inl.h"
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

// With more rows the blocks of gemm-inl.h take over. Measured on Zen 5 at 768 to 4096 features, with AVX2 too.
template <class P>
constexpr int64_t kPanelMaxRows = P::V::width == 1 ? 0 : 16 * kTileRows;

// Whether B's own layout would make axpy-inl.h multiply single values, where the panels hold pairs.
template <class P>
bool multiplies_unpaired(const GemmProblem& p) {
  const bool runs_along_k = p.b_panels.ran_along_k && (p.a.col_stride == 1 || p.k <= 1);
  return P::k_per_step > 1 && p.m <= kAxpyMaxUnpairedRows && p.b_panels.ran_along_n && !runs_along_k;
}

template <class T, class P>
class PanelRows {
  using C = typename P::C;
  using V = typename P::V;
  using Unit = typename P::Unit;
  using S = TileShape<C>;
  static constexpr int W = V::width;

 public:
  PanelRows(const GemmProblem& problem, const Parallel& parallel)
      : p_(problem), parallel_(parallel), steps_(steps_of<P>(problem.k)) {
    parallel_.threads = few_rows_threads(p_, parallel);
  }

  static bool suits(const GemmProblem& p) {
    return multiplies_as_stored(p) && !p.ends_in_gradient && (sums_lanes(p) || p.m <= kPanelMaxRows<P>);
  }

  // False if the product dropped a value (product-inl.h).
  bool run() {
    if (p_.m == 0 || p_.n == 0) return true;
    const int64_t rows = tile_rows(p_.m);
    tiles_ = ceil_div(p_.m, rows);
    with_rows<1>(rows, [&](auto constant) { run_tiles<constant>(); });
    return !drops_any<P>(a_strips<T>(p_), 0, p_.m, 0, p_.k);
  }

 private:
  static constexpr int64_t kTasksOfThread = 4;
  static constexpr int kSums = kTileRows * kTileVecs;  // that stay in registers
  // Rounds of W steps whose part of a panel lies in L1 beside the sums that wait.
  static constexpr int64_t kPieceRounds =
      std::max<int64_t>(1, (16 << 10) / (W * S::cols * static_cast<int64_t>(sizeof(Unit))));

  // An inner product's vector takes W steps side by side, and its lanes are added at the end of a chain.
  static bool sums_lanes(const GemmProblem& p) {
    return p.m <= kDotMaxRows<P> && p.b_panels.ran_along_k && (p.a.col_stride == 1 || p.k <= 1);
  }

  // Tiles are compiled for 1, 2, 4, 6 and so on rows.
  static constexpr int next_rows(int rows) { return std::min(kTileRows, rows == 1 ? 2 : rows + 2); }

  // The rows of a tile, the last of which may be absent. A tile takes as long as its rows and one more.
  static int64_t tile_rows(int64_t m) {
    int best = kTileRows;
    for (int rows = 1; rows < kTileRows; rows = next_rows(rows))
      if (ceil_div(m, rows) * (rows + 1) < ceil_div(m, best) * (best + 1)) best = rows;
    return best;
  }

  // Calls f with `rows` as a constant.
  template <int kRows, class F>
  static void with_rows(int64_t rows, F f) {
    if constexpr (kRows < kTileRows)
      if (rows > kRows) return with_rows<next_rows(kRows)>(rows, f);
    f(std::integral_constant<int, kRows>{});
  }

  // Tiles of rows are as equal as can be.
  int64_t first_row(int64_t tile) const { return p_.m * tile / tiles_; }

  template <int kRows>
  void run_tiles() const {
    const Scratch packed_a(ScratchSlot::packed_a, bytes_of<Unit>(tiles_ * kRows * steps_));
    for (int64_t tile = 0; tile < tiles_; ++tile)
      pack_a<kRows>(first_row(tile), first_row(tile + 1), packed_a.as<Unit>() + tile * kRows * steps_);
    const int64_t panels = ceil_div(p_.n, S::cols);
    const int64_t tasks = std::min(panels, kTasksOfThread * parallel_.threads);
    parallel_.for_each(tasks, [&](int64_t task) {
      for (int64_t panel = panels * task / tasks; panel < panels * (task + 1) / tasks; ++panel)
        for (int64_t tile = 0; tile < tiles_; ++tile)
          run_tile<kRows>(tile, panel, packed_a.as<Unit>() + tile * kRows * steps_);
    });
  }

  // Packs rows step by step, with the rows side by side.
  template <int kRows>
  void pack_a(int64_t first, int64_t end, Unit* tile) const {
    const Strips<T> a = a_strips<T>(p_);
    for (int64_t row = 0; row < kRows; ++row) {
      int64_t k = 0, step = 0;
      if (first + row >= end) {
        for (; step < steps_; ++step) tile[step * kRows + row] = Unit{};
        continue;
      }
      if (a.k_stride == 1)
        for (; k + W * P::k_per_step <= p_.k; k += W * P::k_per_step, step += W) {
          Unit units[W];
          P::store_units(units, P::units_along_k(a.at(first + row, k)));
          for (int i = 0; i < W; ++i) tile[(step + i) * kRows + row] = units[i];
        }
      for (; k < p_.k; k += P::k_per_step, ++step)
        tile[step * kRows + row] = P::unit(a.at(first + row, k), a.k_stride, p_.k - k);
    }
  }

  template <int kRows>
  void run_tile(int64_t tile, int64_t panel, const Unit* a) const {
    const Unit* const b = static_cast<const Unit*>(p_.b_panels.data) + panel * S::cols * steps_;
    alignas(64) C sums[kRows * S::cols];
    sums_lanes(p_) ? inner_products<kRows>(a, b, sums) : chains<kRows>(a, b, sums);
    const int64_t row = first_row(tile), col = panel * S::cols;
    finish<T>(p_.epilogue, {row, col, first_row(tile + 1) - row, std::min<int64_t>(S::cols, p_.n - col)}, sums,
              S::cols);
  }

  // acc[c] gets the products of the steps c, c + stride, c + 2 stride, … of a tile's rows. For each of these steps,
  // one step's lines at `ahead` are fetched into L2; returns where the next begin.
  template <int kRows, int kLanes>
  static FASTLANE_INLINE const Unit* accumulate(V (&acc)[kLanes][kRows][S::vecs], const Unit* a, const Unit* b,
                                                int64_t rounds, int64_t stride, const Unit* ahead = nullptr) {
    constexpr auto bytes = static_cast<int64_t>(S::cols * sizeof(Unit));
    for (; rounds > 0; --rounds, a += stride * kRows, b += stride * S::cols) {
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        V lanes[S::vecs];
#pragma GCC unroll 4
        for (int j = 0; j < S::vecs; ++j) lanes[j] = P::lanes(b + c * S::cols + j * W);
        if (ahead) {
#pragma GCC unroll 4
          for (int64_t byte = 0; byte < bytes; byte += kLineBytes)
            __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte, 0, 2);
          ahead += S::cols;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const auto ai = P::broadcast(a + c * kRows + i);
#pragma GCC unroll 4
          for (int j = 0; j < S::vecs; ++j) acc[c][i][j] = P::multiply_add(ai, lanes[j], acc[c][i][j]);
        }
      }
    }
    return ahead;
  }
  template <int kLanes, int kRows>
  static FASTLANE_INLINE void clear(V (&acc)[kLanes][kRows][S::vecs]) {
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c)
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < S::vecs; ++j) acc[c][i][j] = V::set(0);
  }

  // As a tile sums: in chains, and these in k blocks.
  template <int kRows>
  __attribute__((noinline)) void chains(const Unit* a, const Unit* b, C* sums) const {
    alignas(64) C block[kRows * S::cols];
    for (int64_t first = 0; first == 0 || first < steps_; first += kBlockSteps<P>) {
      C* const to = first == 0 ? sums : block;
      const int64_t end = std::min(steps_, first + kBlockSteps<P>);
      for (int64_t step = first; step == first || step < end; step += kChain) {
        V acc[1][kRows][S::vecs];
        clear(acc);
        accumulate<kRows, 1>(acc, a + step * kRows, b + step * S::cols, std::min(kChain, end - step), 1);
        add(acc[0], to, /*adds=*/step > first);
      }
      if (first == 0) continue;
      for (int i = 0; i < kRows * S::cols; i += W) store(sums + i, load(sums + i) + load(block + i));
    }
  }

  template <int kRows>
  static FASTLANE_INLINE void add(const V (&acc)[kRows][S::vecs], C* sums, bool adds) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < S::vecs; ++j) {
        C* const sum = sums + i * S::cols + j * W;
        store(sum, adds ? load(sum) + acc[i][j] : acc[i][j]);
      }
  }

  // As an inner product sums: step s belongs to lane s mod W. A lane is summed over a chain, then the lanes are added
  // in their order. So many lanes at a time as registers hold pass over a piece of the panel while it lies in L1; in
  // between their sums wait.
  template <int kRows>
  __attribute__((noinline)) void inner_products(const Unit* a, const Unit* b, C* sums) const {
    constexpr int kLanes = lanes_at_a_time(kRows), size = kRows * S::cols;
    alignas(64) C waiting[W * size], chain[size];
    std::fill_n(sums, size, C(0));
    for (int64_t begin = 0; begin < steps_; begin += kChain * W) {
      const int64_t end = std::min(steps_, begin + kChain * W);
      for (int64_t from = begin; from < end; from += kPieceRounds * W) {
        const int64_t to = std::min(end, from + kPieceRounds * W), rounds = (to - from) / W;
        const Unit* ahead = b + to * S::cols;
        for (int lane = 0; lane < W; lane += kLanes) {
          V acc[kLanes][kRows][S::vecs];
          C* const own = waiting + lane * size;
          from == begin ? clear(acc) : load_sums(acc, own);
          ahead = accumulate<kRows, kLanes>(acc, a + (from + lane) * kRows, b + (from + lane) * S::cols, rounds, W,
                                            ahead);
          store_sums(acc, own);
        }
        // The last round may lack lanes.
        for (int64_t step = from + rounds * W; step < to; ++step) {
          V acc[1][kRows][S::vecs];
          C* const own = waiting + (step - from - rounds * W) * size;
          load_sums(acc, own);
          accumulate<kRows, 1>(acc, a + step * kRows, b + step * S::cols, 1, W);
          store_sums(acc, own);
        }
      }
      std::copy_n(waiting, size, chain);
      for (int lane = 1; lane < W; ++lane)
        for (int i = 0; i < size; i += W) store(chain + i, load(chain + i) + load(waiting + lane * size + i));
      for (int i = 0; i < size; i += W) store(sums + i, load(sums + i) + load(chain + i));
    }
  }

  template <int kLanes, int kRows>
  static FASTLANE_INLINE void load_sums(V (&acc)[kLanes][kRows][S::vecs], const C* sums) {
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c)
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < S::vecs; ++j) acc[c][i][j] = load(sums + (c * kRows + i) * S::cols + j * W);
  }
  template <int kLanes, int kRows>
  static FASTLANE_INLINE void store_sums(const V (&acc)[kLanes][kRows][S::vecs], C* sums) {
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c)
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < S::vecs; ++j) store(sums + (c * kRows + i) * S::cols + j * W, acc[c][i][j]);
  }

  static constexpr int lanes_at_a_time(int rows) {
    int lanes = 1;
    while (2 * lanes <= W && 2 * lanes * rows * S::vecs <= kSums) lanes *= 2;
    return lanes;
  }

  const GemmProblem& p_;
  Parallel parallel_;
  int64_t steps_, tiles_ = 1;
};

FASTLANE_END_TARGET
