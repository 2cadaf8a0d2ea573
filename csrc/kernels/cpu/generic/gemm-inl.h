// The blocked GEMM:
//
//   columns in blocks, k in slabs          packed B: bounded scratch
//     rows × columns cut into tasks
//       k in blocks, and these in passes   one operand stays in the core's L2, the other passes by panel by panel
//         tiles, in groups that are finished together
//
// If A is read where it lies, a block of packed B stays in L2; each thread has its own block if there are enough.
// Otherwise a task's A is packed once, and all threads share a wide packed B. A stays in L2, or, if the tile is
// small, some panels of B.
//
// A panel is read where it lies if its layout suits the tile; otherwise it is packed. If that saves packing, the
// transposed product Bᵀ Aᵀ is computed, and finishing a group transposes its sums back.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <utility>

#include "kernels/cpu/generic/axpy-inl.h"
#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/generic/dot-inl.h"
#include "kernels/cpu/generic/epilogue-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/panel_rows-inl.h"
#include "kernels/cpu/generic/panels-inl.h"
#include "kernels/cpu/generic/product-inl.h"
#include "kernels/cpu/generic/tile-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/gemm_plan.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

struct TaskGrid {
  int64_t row_tasks, col_tasks;
};

// Cuts rows into tasks of at most max_row_panels, as many as fill the threads evenly. A problem with few rows is cut
// by columns too.
inline TaskGrid task_grid(int64_t row_panels, int64_t col_panels, int64_t max_row_panels, int64_t threads) {
  TaskGrid grid;
  grid.row_tasks = ceil_div(row_panels, max_row_panels);
  if (row_panels >= threads) grid.row_tasks = std::min(row_panels, ceil_div(grid.row_tasks, threads) * threads);
  grid.col_tasks = grid.row_tasks >= threads ? 1 : std::min(col_panels, ceil_div(threads, grid.row_tasks));
  return grid;
}

// Where part i of `total`, cut evenly, begins.
inline int64_t even_cut(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

template <class T, class P>
class Gemm {
  using C = typename P::C;
  using Unit = typename P::Unit;
  using S = TileShape<C>;

 public:
  Gemm(const GemmProblem& problem, const GemmPlan& plan, const Parallel& parallel)
      : p_(problem), plan_(plan), parallel_(parallel), finish_matrices_(problem) {
    parallel_.threads = plan.threads;
    a_ = a_strips<T>(p_), b_ = b_strips<T>(p_);
    if (plan.transposed) std::swap(a_, b_);
  }

  // False if the product dropped a value (product-inl.h).
  bool run() {
    const int64_t runs = p_.ends_in_gradient ? ceil_div(p_.m, rows_of_run()) : 0;
    const Scratch run_sums(ScratchSlot::run_sums, bytes_of<C>(runs * p_.n));
    run_sums_ = run_sums.as<C>();
    run_product();
    if (p_.ends_in_gradient)
      store_run_sums(run_sums_, runs, p_.n, static_cast<T*>(p_.gradient.column_sums), parallel_);
    return !dropped_.load();
  }

 private:
  void run_product() {
    const int64_t panels = ceil_div(b_.count, S::cols);
    const auto run_block = [&](int64_t i, const Parallel& threads) {
      const int64_t col = even_cut(panels, plan_.col_blocks, i) * S::cols;
      const int64_t end = even_cut(panels, plan_.col_blocks, i + 1) * S::cols;
      run_columns(col, std::min(b_.count, end) - col, threads);
    };
    if (plan_.own_blocks) {
      parallel_.for_each(plan_.col_blocks, [&](int64_t i) { run_block(i, Parallel{}); });
    } else {
      for (int64_t i = 0; i < plan_.col_blocks; ++i) run_block(i, parallel_);
    }
  }

  static constexpr int64_t kBlock = kBlockSteps<P> * P::k_per_step;

  // Some k blocks, packed for some columns.
  struct PackedB {
    const Unit* values;
    int64_t first_col;
    int64_t first_block, end_block;
    int64_t steps;  // of all these blocks

    int64_t offset(int64_t col_panel, int64_t k_block) const {
      return (col_panel * steps + (k_block - first_block) * kBlockSteps<P>)*S::cols;
    }
  };
  struct Task {
    int64_t row_panel, row_panels;
    int64_t col_panel, col_panels;
  };

  // The part of a k block that tiles meet before the next part.
  struct Pass {
    int64_t k_block, first_step, steps;
    bool first, last;  // of the block
  };

  int64_t k_begin(int64_t block) const { return block * kBlock; }
  int64_t k_end(int64_t block) const { return std::min(p_.k, (block + 1) * kBlock); }
  int64_t block_steps(int64_t block) const { return steps_of<P>(k_end(block) - k_begin(block)); }

  Pass pass(int64_t k_block, int64_t first_step) const {
    const int64_t steps = std::min(plan_.pass_steps, block_steps(k_block) - first_step);
    return {k_block, first_step, steps, first_step == 0, first_step + steps == block_steps(k_block)};
  }
  int64_t k_begin(const Pass& pass) const { return k_begin(pass.k_block) + pass.first_step * P::k_per_step; }
  int64_t k_end(const Pass& pass) const { return std::min(p_.k, k_begin(pass) + pass.steps * P::k_per_step); }

  void run_columns(int64_t first_col, int64_t cols, const Parallel& parallel) {
    const int64_t row_panels = ceil_div(a_.count, S::rows), col_panels = ceil_div(cols, S::cols);
    const TaskGrid grid = task_grid(row_panels, col_panels, plan_.task_row_panels, parallel.threads);
    const bool one_slab = plan_.slab_blocks >= plan_.k_blocks;
    const int64_t slab_steps = std::min(plan_.slab_blocks * kBlockSteps<P>, steps_of<P>(p_.k));
    const auto* const panels = static_cast<const Unit*>(p_.b_panels.data);
    const Scratch packed_b(ScratchSlot::packed_b, bytes_of<Unit>(panels ? 0 : col_panels * S::cols * slab_steps));
    // The sums of the whole column block wait here from one slab to the next.
    const Scratch waiting(ScratchSlot::slab_sums, bytes_of<C>(one_slab ? 0 : row_panels * col_panels * S::size));
    for (int64_t block = 0; block < plan_.k_blocks; block += plan_.slab_blocks) {
      const int64_t end_block = std::min(plan_.k_blocks, block + plan_.slab_blocks), blocks = end_block - block;
      const PackedB b{panels ? panels + first_col * steps_of<P>(p_.k) : packed_b.as<Unit>(), first_col, block,
                      end_block, steps_of<P>(k_end(end_block - 1) - k_begin(block))};
      // Two pieces for each thread, if there are so many panels.
      const int64_t together =
          std::clamp<int64_t>(col_panels * blocks / (2 * parallel.threads), 1, kPanelsTogether<S::cols, T>);
      parallel.for_each(panels ? 0 : ceil_div(col_panels, together) * blocks, [&](int64_t i) {
        const int64_t first = i / blocks * together;
        pack_b_panels(b, packed_b.as<Unit>(), first, std::min(together, col_panels - first), block + i % blocks);
      });
      parallel.for_each(grid.row_tasks * grid.col_tasks, [&](int64_t i) {
        Task task;
        const int64_t row = i / grid.col_tasks, col = i % grid.col_tasks;
        task.row_panel = even_cut(row_panels, grid.row_tasks, row);
        task.row_panels = even_cut(row_panels, grid.row_tasks, row + 1) - task.row_panel;
        task.col_panel = even_cut(col_panels, grid.col_tasks, col);
        task.col_panels = even_cut(col_panels, grid.col_tasks, col + 1) - task.col_panel;
        C* const sums = waiting.as<C>() + (one_slab ? 0 : task_offset(task, col_panels));
        run_task(b, task, one_slab ? nullptr : sums);
      });
    }
  }

  // A task's tiles lie one after the other; tasks lie in the order of the grid's rows.
  static int64_t task_offset(const Task& task, int64_t col_panels) {
    return (task.row_panel * col_panels + task.col_panel * task.row_panels) * S::size;
  }

  bool b_panel_in_place(int64_t col, int64_t k_block) const {
    return plan_.b_in_place && is_whole_panel<S::cols, P>(b_, col, k_end(k_block) - k_begin(k_block));
  }
  void pack_b_panels(const PackedB& b, Unit* values, int64_t first, int64_t panels, int64_t k_block) {
    const int64_t col = b.first_col + first * S::cols;
    if (drops_any<P>(b_, col, panels * S::cols, k_begin(k_block), k_end(k_block))) dropped_ = true;
    pack_unless_in_place<S::cols, P>(b_, col, k_begin(k_block), k_end(k_block),
                                     {values + b.offset(first, k_block), panels, b.steps * S::cols},
                                     [&](int64_t strip) { return b_panel_in_place(strip, k_block); });
  }
  Panel b_panel(const PackedB& b, int64_t col_panel, const Pass& pass) const {
    const int64_t col = b.first_col + col_panel * S::cols;
    Panel panel = b_panel_in_place(col, pass.k_block)
                      ? panel_in_place<P>(b_, col, k_begin(pass.k_block))
                      : packed_panel<S::cols>(b.values + b.offset(col_panel, pass.k_block));
    panel.data += pass.first_step * panel.step_stride;
    return panel;
  }

  bool a_panel_in_place(int64_t row, int64_t k_block) const {
    return plan_.a_in_place && is_whole_panel<S::rows, P>(a_, row, k_end(k_block) - k_begin(k_block));
  }
  void pack_a_block(const Task& task, const Pass& pass, bool first_use, Unit* block) {
    const int64_t size = S::rows * pass.steps;
    for (int64_t i = 0; i < task.row_panels; i += kPanelsTogether<S::rows, T>) {
      const int64_t row = (task.row_panel + i) * S::rows;
      const int64_t panels = std::min(kPanelsTogether<S::rows, T>, task.row_panels - i);
      if (first_use && drops_any<P>(a_, row, panels * S::rows, k_begin(pass), k_end(pass))) dropped_ = true;
      pack_unless_in_place<S::rows, P>(a_, row, k_begin(pass), k_end(pass), {block + i * size, panels, size},
                                       [&](int64_t strip) { return a_panel_in_place(strip, pass.k_block); });
    }
  }
  Panel a_panel(const Task& task, int64_t i, const Pass& pass, const Unit* block) const {
    const int64_t row = (task.row_panel + i) * S::rows;
    return a_panel_in_place(row, pass.k_block) ? panel_in_place<P>(a_, row, k_begin(pass))
                                               : packed_panel<S::rows>(block + i * S::rows * pass.steps);
  }

  void run_task(const PackedB& b, const Task& task, C* slab_sums) {
    const int64_t most_steps = std::min(plan_.pass_steps, steps_of<P>(p_.k));
    const Scratch packed_a(ScratchSlot::packed_a,
                           bytes_of<Unit>(task.row_panels * S::rows * most_steps + kPanelOverhang<P>));
    // After each pass but the last, the sums of all tiles wait in `waiting` or slab_sums. A later k block that has
    // several passes gathers its own sums in `of_block` first.
    const bool one_block = plan_.k_blocks == 1, one_pass = plan_.pass_steps >= block_steps(0);
    const bool waits = !one_block || !one_pass, gathers = !one_block && !one_pass;
    const int64_t all_sums = task.row_panels * task.col_panels * S::size;
    const Scratch waiting(ScratchSlot::task_sums, bytes_of<C>(waits && !slab_sums ? all_sums : 0));
    const Scratch of_block(ScratchSlot::block_sums, bytes_of<C>(gathers ? all_sums : 0));
    const TaskSums sums{waits ? (slab_sums ? slab_sums : waiting.as<C>()) : nullptr,
                        gathers ? of_block.as<C>() : nullptr};
    for (int64_t k_block = b.first_block; k_block < b.end_block; ++k_block)
      for (int64_t step = 0; step == 0 || step < block_steps(k_block); step += plan_.pass_steps) {
        const Pass part = pass(k_block, step);
        pack_a_block(task, part, /*first_use=*/b.first_col + task.col_panel == 0, packed_a.as<Unit>());
        run_pass(b, task, part, packed_a.as<Unit>(), sums);
      }
  }

  // The sums of a task's tiles, and those of its present k block; null where no sums wait.
  struct TaskSums {
    C *total, *block;
  };

  void run_pass(const PackedB& b, const Task& task, const Pass& pass, const Unit* a, const TaskSums& sums) {
    const int64_t group_panels = plan_.transposed ? kMaxGroup : 1, staying = plan_.b_panels_in_l2;
    for (int64_t from = 0; from < task.col_panels; from += staying) {
      const int64_t to = std::min(task.col_panels, from + staying);
      for (int64_t first = 0; first < task.row_panels; first += group_panels) {
        const int64_t panels = std::min(group_panels, task.row_panels - first);
        for (int64_t j = from; j < to; ++j) run_group(b, task, pass, a, sums, first, panels, j);
      }
    }
  }

  // The tiles of `panels` row panels from `first` on, and of column panel j.
  void run_group(const PackedB& b, const Task& task, const Pass& pass, const Unit* a, const TaskSums& sums,
                 int64_t first, int64_t panels, int64_t j) {
    const int64_t chains = std::max<int64_t>(1, ceil_div(pass.steps, kChain));
    const bool ends_block = pass.k_block > 0 && pass.last, ends = pass.k_block == plan_.k_blocks - 1 && pass.last;
    const int64_t row = (task.row_panel + first) * S::rows, col = b.first_col + (task.col_panel + j) * S::cols;
    const Region region = finish_region(row, panels * S::rows, col);
    Prefetcher<T> prefetcher(finish_matrices_, ends && plan_.prefetches_finish ? region : Region{},
                             next_panel(task, first, panels, j, pass, a), panels * chains);
    alignas(64) C group[kMaxGroup * S::size];
    const int64_t offset = (j * task.row_panels + first) * S::size;
    C* const total = sums.total ? sums.total + offset : group;
    C* const own = pass.k_block == 0 ? total : sums.block ? sums.block + offset : group;
    const Panel b_tiles = b_panel(b, task.col_panel + j, pass);
    for (int64_t p = 0; p < panels; ++p) {
      C* const tile = own + p * S::size;
      multiply_tile<P>(pass.steps, a_panel(task, first + p, pass, a), b_tiles, tile, prefetcher,
                       /*adds=*/!pass.first);
      if (ends_block) add_tile(total + p * S::size, tile);
    }
    if (ends) finish_group(total, region);
  }

  // If A passes by where it lies: the part of A's next panel that these tiles fetch ahead. Packed panels are one run
  // of memory, which the hardware prefetchers follow by themselves.
  Stream next_panel(const Task& task, int64_t first, int64_t panels, int64_t j, const Pass& pass,
                    const Unit* packed_a) const {
    if (!plan_.a_in_place || plan_.b_panels_in_l2 == 1 || first + panels >= task.row_panels || a_.k_stride != 1)
      return {};
    const Panel panel = a_panel(task, first + panels, pass, packed_a);
    const auto row_bytes = pass.steps * static_cast<int64_t>(sizeof(Unit));
    return Stream{panel.data, S::rows, panel.strip_stride, row_bytes}.part(j, j + 1, task.col_panels);
  }

  // The block of the problem's result; a transposed product computes this block's transpose.
  Region finish_region(int64_t row, int64_t rows, int64_t col) const {
    const Region region{row, col, std::min(rows, a_.count - row), std::min<int64_t>(S::cols, b_.count - col)};
    return plan_.transposed ? Region{region.col, region.row, region.cols, region.rows} : region;
  }
  // How many of the problem's rows one call of finish sums.
  int64_t rows_of_run() const { return plan_.transposed ? S::V::width : S::rows; }
  void finish_group(const C* sums, const Region& region) const {
    const auto finish_rows = [&](const Region& part, const C* part_sums, int64_t stride) {
      if (p_.ends_in_gradient) {
        finish_gradient<T>(p_.gradient, part, part_sums, stride, run_sums_ + part.row / rows_of_run() * p_.n);
      } else {
        finish<T>(p_.epilogue, part, part_sums, stride);
      }
    };
    plan_.transposed ? finish_transposed(region, sums, S::cols, finish_rows) : finish_rows(region, sums, S::cols);
  }

  const GemmProblem& p_;
  const GemmPlan& plan_;
  Parallel parallel_;
  FinishMatrices finish_matrices_;
  Strips<T> a_, b_;
  C* run_sums_ = nullptr;
  std::atomic<bool> dropped_{false};
};

template <class T, class P>
OperandFacts facts_of(const Strips<T>& s) {
  constexpr int64_t kPageBytes = 4096;
  OperandFacts facts;
  facts.count = s.count;
  facts.reads_along_k = P::reads_storage && s.activation == Activation::none && s.k_stride == 1;
  facts.reads_across = reads_dense_rows<P>(s);
  facts.shares_a_set = s.k_stride == 1 && s.strip_stride * static_cast<int64_t>(sizeof(T)) % kPageBytes == 0;
  return facts;
}

template <class T, class P>
GemmFacts facts_of(const GemmProblem& p) {
  using S = TileShape<typename P::C>;
  GemmFacts facts;
  facts.m = p.m, facts.n = p.n, facts.k = p.k, facts.dtype = p.dtype;
  facts.a = facts_of<T, P>(a_strips<T>(p)), facts.b = facts_of<T, P>(b_strips<T>(p));
  facts.b_is_packed = p.b_panels.data != nullptr;
  const ConstRowMajor read = FinishMatrices(p).read;
  if (read.data) facts.finish_row_bytes = std::abs(read.row_stride) * static_cast<int64_t>(sizeof(T));
  facts.tile_rows = S::rows, facts.tile_cols = S::cols;
  facts.unit_bytes = sizeof(typename P::Unit), facts.k_per_step = P::k_per_step;
  facts.chain_steps = kChain, facts.block_steps = kBlockSteps<P>;
  return facts;
}

template <class T, class P>
GemmPlan plan_product(const GemmProblem& p, const Parallel& parallel) {
  GemmPlan plan;
  plan.facts = facts_of<T, P>(p);
  if (p.b_panels.data && PanelRows<T, P>::suits(p)) {
    plan.method = GemmMethod::panel_rows, plan.threads = few_rows_threads(p, parallel);
  } else if (p.b_panels.data) {
    plan = plan_tiles(plan.facts, parallel.caches, parallel.threads);
  } else if (DotGemm<T, P>::suits(p)) {
    plan.method = GemmMethod::inner_products, plan.threads = few_rows_threads(p, parallel);
  } else if (AxpyGemm<T, P>::suits(p, parallel.threads)) {
    plan.method = GemmMethod::axpy, plan.threads = few_rows_threads(p, parallel);
  } else {
    plan = plan_tiles(plan.facts, parallel.caches, parallel.threads);
  }
  trace(plan);
  return plan;
}

template <class T, class P>
bool run_product(const GemmProblem& p, const Parallel& parallel) {
  const GemmPlan plan = plan_product<T, P>(p, parallel);
  switch (plan.method) {
    case GemmMethod::inner_products: return DotGemm<T, P>(p, parallel).run();
    case GemmMethod::axpy:
      if (p.m <= kAxpyMaxUnpairedRows) return AxpyGemm<T, WideningProduct<T>>(p, parallel).run();
      return AxpyGemm<T, P>(p, parallel).run();
    case GemmMethod::panel_rows:
      if constexpr (P::V::width > 1) return PanelRows<T, P>(p, parallel).run();
      break;
    case GemmMethod::tiles: break;
  }
  return Gemm<T, P>(p, plan, parallel).run();
}

// The panels are those of the fastest product. For the product that drops nothing, B is written back as it lay.
template <class T>
void run_gemm_with_panels(const GemmProblem& p, const Parallel& parallel) {
  using P = product_t<T>;
  if (!multiplies_unpaired<P>(p) && run_product<T, P>(p, parallel)) return;
  if constexpr (P::drops_denormals) {
    const Scratch values(ScratchSlot::unpacked_b, bytes_of<T>(p.n * p.k));
    const int64_t n_stride = p.b_panels.ran_along_k ? p.k : 1, k_stride = p.b_panels.ran_along_k ? 1 : p.n;
    run_unpack<T>({p.n, p.k, p.dtype, p.b_panels.data, values.as<T>(), n_stride, k_stride}, parallel);
    GemmProblem plain = p;
    plain.b = {values.as<T>(), k_stride, n_stride}, plain.b_panels = {};
    run_product<T, WideningProduct<T>>(plain, parallel);
  }
}

template <class T>
void run_gemm(const GemmProblem& p, const Parallel& parallel) {
  if (p.m == 0 || p.n == 0) {
    if (p.ends_in_gradient) std::fill_n(static_cast<T*>(p.gradient.column_sums), p.n, T{});
    return;
  }
  if (p.b_panels.data) return run_gemm_with_panels<T>(p, parallel);
  exact_product<T>([&](auto product) { return run_product<T, decltype(product)>(p, parallel); });
}

template <class T>
GemmPlan run_plan(const GemmProblem& p, const Parallel& parallel) {
  return plan_product<T, product_t<T>>(p, parallel);
}

FASTLANE_END_TARGET
