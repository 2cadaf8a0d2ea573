// The blocked GEMM:
//
//   columns in blocks, k in slabs          packed B: bounded scratch
//     rows × columns cut into tasks
//       k in blocks                        one operand stays in the core's L2, the other passes by panel by panel
//         tiles, in groups that are finished together
//
// If A is read where it lies, a block of packed B stays in L2; each thread has its own block if there are enough.
// Otherwise a task's A is packed once and stays in L2, and all threads share a wide packed B.
//
// A panel is read where it lies if its layout suits the tile; otherwise it is packed. If that saves packing, the
// transposed product Bᵀ Aᵀ is computed, and finishing a group transposes its sums back.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/generic/activation-inl.h"
#include "kernels/cpu/generic/axpy-inl.h"
#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/generic/dot-inl.h"
#include "kernels/cpu/generic/epilogue-inl.h"
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

struct Blocking {
  static constexpr int64_t max_rows = 240;
  static constexpr int64_t min_cols = 256, max_cols = 1024;
  static constexpr int64_t packed_b_bytes = int64_t{16} << 20;
};

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

template <class T, class Act, class P>
class Gemm {
  using C = typename P::C;
  using Unit = typename P::Unit;
  using S = TileShape<C>;

 public:
  Gemm(const GemmProblem& problem, const Parallel& parallel) : p_(problem), parallel_(parallel) {
    const auto* a = static_cast<const T*>(p_.a.data);
    const auto* b = static_cast<const T*>(p_.b.data);
    a_ = {a, p_.m, p_.a.row_stride, p_.a.col_stride, p_.a_activation};
    b_ = {b, p_.n, p_.b.col_stride, p_.b.row_stride, p_.b_activation};
    transposed_ = values_to_pack(b_, a_) + values_to_finish_transposed() < values_to_pack(a_, b_);
    if (transposed_) std::swap(a_, b_);
    a_in_place_ = a_reads_storage(a_) && !rows_share_a_set(a_);
    b_in_place_ = reads_dense_rows<P>(b_);
    const ConstRowMajor& read_by_finish = p_.addend.data ? p_.addend : p_.preactivation;
    prefetches_finish_ =
        read_by_finish.data && std::abs(read_by_finish.row_stride) * static_cast<int64_t>(sizeof(T)) > kDenseRowBytes;

    k_blocks_ = std::max<int64_t>(1, ceil_div(p_.k, kBlock));
    const int64_t packed_values = Blocking::packed_b_bytes / static_cast<int64_t>(sizeof(Unit));
    const int64_t fitting_cols = packed_values / std::max<int64_t>(1, steps_of<P>(p_.k)) / S::cols * S::cols;
    block_cols_ = std::min(b_.count, std::min(Blocking::max_cols, std::max(Blocking::min_cols, fitting_cols)));
    col_blocks_ = ceil_div(b_.count, block_cols_);
    const int64_t l2_strips = parallel_.caches.l2 / 2 / static_cast<int64_t>(sizeof(Unit)) /
                              std::max<int64_t>(1, std::min(steps_of<P>(p_.k), kBlockSteps<P>));
    task_row_panels_ = std::max(kMaxGroup, std::min(Blocking::max_rows, l2_strips) / S::rows);
    const double block_multiply_adds =
        static_cast<double>(a_.count) * static_cast<double>(block_cols_) * static_cast<double>(p_.k);
    if (block_multiply_adds < kSerialMultiplyAdds) parallel_.threads = 1;
    if (a_in_place_ && !b_in_place_) keep_b_in_l2(std::max<int64_t>(1, l2_strips / S::cols));
    const int64_t concurrent_blocks = own_blocks_ ? parallel_.threads : 1;
    slab_blocks_ = std::max<int64_t>(1, std::min(k_blocks_, packed_values / concurrent_blocks / kBlockSteps<P> /
                                                                (ceil_div(block_cols_, S::cols) * S::cols)));
  }

  // False if the product lost a value: the result is then worthless.
  bool run() {
    const int64_t runs = p_.column_sums ? ceil_div(p_.m, rows_of_run()) : 0;
    const Scratch run_sums(ScratchSlot::column_sums, bytes_of<C>(runs * p_.n));
    run_sums_ = run_sums.as<C>();
    run_product();
    if (p_.column_sums) store_run_sums(run_sums_, runs, p_.n, static_cast<T*>(p_.column_sums), parallel_);
    return !lost_.load();
  }

 private:
  void run_product() {
    const int64_t panels = ceil_div(b_.count, S::cols);
    const auto run_block = [&](int64_t i, const Parallel& threads) {
      const int64_t col = even_cut(panels, col_blocks_, i) * S::cols;
      const int64_t end = even_cut(panels, col_blocks_, i + 1) * S::cols;
      run_columns(col, std::min(b_.count, end) - col, threads);
    };
    if (own_blocks_) {
      parallel_.for_each(col_blocks_, [&](int64_t i) { run_block(i, Parallel{}); });
    } else {
      for (int64_t i = 0; i < col_blocks_; ++i) run_block(i, parallel_);
    }
  }

  // The rows of one tile are no multiple of the vector's width, the rows of four tiles are. So a group of four tiles
  // is transposed together.
  static constexpr int64_t kMaxGroup = 4;
  static constexpr int64_t kBlock = kBlockSteps<P> * P::k_per_step;

  // Some k blocks, packed for some columns.
  struct PackedB {
    Unit* values;
    int64_t first_col;
    int64_t first_block, end_block;
    int64_t steps;  // of all these blocks

    Unit* panel(int64_t col_panel, int64_t k_block) const {
      return values + (col_panel * steps + (k_block - first_block) * kBlockSteps<P>)*S::cols;
    }
  };
  struct Task {
    int64_t row_panel, row_panels;
    int64_t col_panel, col_panels;
  };

  bool a_reads_storage(const Strips<T>& a) const {
    return (P::reads_storage && a.activation == Activation::none && a.k_stride == 1) || reads_dense_rows<P>(a);
  }
  // A tile reads its rows of A side by side. Rows that are whole pages apart all fall into one set of L1, and just
  // fit there until something else runs on the core. Few rows are not read often enough to pay for packing.
  static bool rows_share_a_set(const Strips<T>& a) {
    constexpr int64_t kPageBytes = 4096;
    return a.count > kMaxGroup * S::rows && a.k_stride == 1 &&
           a.strip_stride * static_cast<int64_t>(sizeof(T)) % kPageBytes == 0;
  }
  double values_to_pack(const Strips<T>& a, const Strips<T>& b) const {
    const double k = static_cast<double>(p_.k);
    return (a_reads_storage(a) ? 0 : k * static_cast<double>(a.count)) +
           (reads_dense_rows<P>(b) ? 0 : k * static_cast<double>(b.count));
  }
  double values_to_finish_transposed() const { return static_cast<double>(p_.m) * static_cast<double>(p_.n); }

  void keep_b_in_l2(int64_t max_panels) {
    const int64_t panels = ceil_div(b_.count, S::cols), threads = parallel_.threads;
    // A passes by once for each block, so A has to come from the last-level cache, not from memory.
    const double a_bytes = static_cast<double>(a_.count) * static_cast<double>(p_.k) * sizeof(T);
    own_blocks_ = panels >= max_panels * threads && (panels <= max_panels || a_bytes <= parallel_.caches.last);
    b_stays_ = own_blocks_ || panels <= max_panels;
    if (!own_blocks_) return;
    // As many blocks as fill the threads evenly.
    col_blocks_ = std::min(panels, ceil_div(ceil_div(panels, max_panels), threads) * threads);
    block_cols_ = std::min(b_.count, ceil_div(panels, col_blocks_) * S::cols);
  }

  int64_t k_begin(int64_t block) const { return block * kBlock; }
  int64_t k_end(int64_t block) const { return std::min(p_.k, (block + 1) * kBlock); }
  int64_t block_steps(int64_t block) const { return steps_of<P>(k_end(block) - k_begin(block)); }

  void run_columns(int64_t first_col, int64_t cols, const Parallel& parallel) {
    const int64_t row_panels = ceil_div(a_.count, S::rows), col_panels = ceil_div(cols, S::cols);
    const TaskGrid grid = task_grid(row_panels, col_panels, task_row_panels_, parallel.threads);
    const bool one_slab = slab_blocks_ >= k_blocks_;
    const int64_t slab_steps = std::min(slab_blocks_ * kBlockSteps<P>, steps_of<P>(p_.k));
    const Scratch packed_b(ScratchSlot::packed_b, bytes_of<Unit>(col_panels * S::cols * slab_steps));
    // The sums of the whole column block wait here from one slab to the next.
    const Scratch waiting(ScratchSlot::slab_sums, bytes_of<C>(one_slab ? 0 : row_panels * col_panels * S::size));
    for (int64_t block = 0; block < k_blocks_; block += slab_blocks_) {
      const int64_t end_block = std::min(k_blocks_, block + slab_blocks_), blocks = end_block - block;
      const PackedB b{packed_b.as<Unit>(), first_col, block, end_block,
                      steps_of<P>(k_end(end_block - 1) - k_begin(block))};
      parallel.for_each(col_panels * blocks, [&](int64_t i) { pack_b_panel(b, i / blocks, block + i % blocks); });
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
    return b_in_place_ && is_whole_panel<S::cols, P>(b_, col, k_end(k_block) - k_begin(k_block));
  }
  void pack_b_panel(const PackedB& b, int64_t col_panel, int64_t k_block) {
    const int64_t col = b.first_col + col_panel * S::cols;
    if (loses_any<P>(b_, col, S::cols, k_begin(k_block), k_end(k_block))) lost_ = true;
    if (!b_panel_in_place(col, k_block))
      pack_panel<S::cols, P>(b_, col, k_begin(k_block), k_end(k_block), b.panel(col_panel, k_block));
  }
  Panel b_panel(const PackedB& b, int64_t col_panel, int64_t k_block) const {
    const int64_t col = b.first_col + col_panel * S::cols;
    return b_panel_in_place(col, k_block) ? panel_in_place<P>(b_, col, k_begin(k_block))
                                          : packed_panel<S::cols>(b.panel(col_panel, k_block));
  }

  bool a_panel_in_place(int64_t row, int64_t k_block) const {
    return a_in_place_ && is_whole_panel<S::rows, P>(a_, row, k_end(k_block) - k_begin(k_block));
  }
  void pack_a_block(const Task& task, int64_t k_block, bool first_use, Unit* block) {
    const int64_t size = S::rows * block_steps(k_block);
    for (int64_t i = 0; i < task.row_panels; ++i) {
      const int64_t row = (task.row_panel + i) * S::rows;
      if (first_use && loses_any<P>(a_, row, S::rows, k_begin(k_block), k_end(k_block))) lost_ = true;
      if (!a_panel_in_place(row, k_block))
        pack_panel<S::rows, P>(a_, row, k_begin(k_block), k_end(k_block), block + i * size);
    }
  }
  Panel a_panel(const Task& task, int64_t i, int64_t k_block, const Unit* block) const {
    const int64_t row = (task.row_panel + i) * S::rows;
    return a_panel_in_place(row, k_block) ? panel_in_place<P>(a_, row, k_begin(k_block))
                                          : packed_panel<S::rows>(block + i * S::rows * block_steps(k_block));
  }

  void run_task(const PackedB& b, const Task& task, C* slab_sums) {
    const int64_t a_units =
        task.row_panels * S::rows * std::min(kBlockSteps<P>, steps_of<P>(p_.k)) + kPanelOverhang<P>;
    const Scratch packed_a(ScratchSlot::packed_a, bytes_of<Unit>(a_units));
    Unit* const a = packed_a.as<Unit>();
    // With several k blocks the sums of all tiles wait here from one block to the next.
    const bool one_block = k_blocks_ == 1;
    const int64_t own_sums = one_block || slab_sums ? 0 : task.row_panels * task.col_panels * S::size;
    const Scratch waiting(ScratchSlot::task_sums, bytes_of<C>(own_sums));
    C* const sums = slab_sums ? slab_sums : waiting.as<C>();
    const int64_t group_panels = transposed_ ? kMaxGroup : 1, groups = ceil_div(task.row_panels, group_panels);
    for (int64_t k_block = b.first_block; k_block < b.end_block; ++k_block) {
      pack_a_block(task, k_block, /*first_use=*/b.first_col + task.col_panel == 0, a);
      const int64_t count = block_steps(k_block), chains = std::max<int64_t>(1, ceil_div(count, kChain));
      const bool last = k_block == k_blocks_ - 1;
      for (int64_t i = 0; i < groups * task.col_panels; ++i) {
        const int64_t j = b_stays_ ? i % task.col_panels : i / groups;
        const int64_t first = (b_stays_ ? i / task.col_panels : i % groups) * group_panels;
        const int64_t panels = std::min(group_panels, task.row_panels - first);
        const int64_t row = (task.row_panel + first) * S::rows, col = b.first_col + (task.col_panel + j) * S::cols;
        const FinishRegion<T> region = finish_region(row, panels * S::rows, col);
        Prefetcher<T> prefetcher(last && prefetches_finish_ ? region : FinishRegion<T>{},
                                 next_panel(task, first, panels, j, k_block, a), panels * chains);
        alignas(64) C group[kMaxGroup * S::size];
        C* const total = one_block ? group : sums + (j * task.row_panels + first) * S::size;
        const Panel b_tiles = b_panel(b, task.col_panel + j, k_block);
        for (int64_t p = 0; p < panels; ++p) {
          C* const tile = (k_block == 0 ? total : group) + p * S::size;
          multiply_tile<P>(count, a_panel(task, first + p, k_block, a), b_tiles, tile, prefetcher);
          if (k_block > 0) add_tile(total + p * S::size, tile);
        }
        if (last) finish_group(total, region);
      }
    }
  }

  // If A passes by: the part of A's next panel that these tiles fetch ahead. A packed B is one run of memory, which
  // the hardware prefetchers follow by themselves.
  Stream next_panel(const Task& task, int64_t first, int64_t panels, int64_t j, int64_t k_block,
                    const Unit* packed_a) const {
    if (!b_stays_ || first + panels >= task.row_panels || a_.k_stride != 1) return {};
    const Panel panel = a_panel(task, first + panels, k_block, packed_a);
    const auto row_bytes = block_steps(k_block) * static_cast<int64_t>(sizeof(Unit));
    return Stream{panel.data, S::rows, panel.strip_stride, row_bytes}.part(j, j + 1, task.col_panels);
  }

  FinishRegion<T> finish_region(int64_t row, int64_t rows, int64_t col) const {
    rows = std::min(rows, a_.count - row);
    const int64_t cols = std::min<int64_t>(S::cols, b_.count - col);
    FinishRegion<T> region{&p_, row, col, rows, cols};
    if (transposed_) std::swap(region.row, region.col), std::swap(region.rows, region.cols);
    if (p_.column_sums) region.row_sums = run_sums_ + region.row / rows_of_run() * p_.n;
    return region;
  }
  // How many of the problem's rows one call of finish sums.
  int64_t rows_of_run() const { return transposed_ ? S::V::width : S::rows; }
  void finish_group(const C* sums, const FinishRegion<T>& region) const {
    if (transposed_) {
      finish_transposed<T, Act>(region, sums, S::cols);
    } else {
      finish<T, Act>(region, sums, S::cols);
    }
  }

  const GemmProblem& p_;
  Parallel parallel_;
  Strips<T> a_, b_;
  bool transposed_, a_in_place_, b_in_place_, prefetches_finish_;
  bool b_stays_ = false;  // B stays in L2 and A passes by; otherwise the other way round
  bool own_blocks_ = false;  // a thread takes whole column blocks; otherwise threads share each block
  int64_t k_blocks_;
  int64_t col_blocks_, block_cols_;  // how many, and the columns of the largest
  int64_t slab_blocks_;
  int64_t task_row_panels_;
  C* run_sums_ = nullptr;
  std::atomic<bool> lost_{false};
};

template <class T, class Act, class P>
bool run_product(const GemmProblem& p, const Parallel& parallel) {
  if (DotGemm<T, Act, P>::suits(p)) return DotGemm<T, Act, P>(p, parallel).run();
  if (AxpyGemm<T, Act, P>::suits(p, parallel.threads)) {
    if (p.m <= kAxpyMaxUnpairedRows) return AxpyGemm<T, Act, WideningProduct<T>>(p, parallel).run();
    return AxpyGemm<T, Act, P>(p, parallel).run();
  }
  return Gemm<T, Act, P>(p, parallel).run();
}

template <class T>
void run_gemm(const GemmProblem& p, const Parallel& parallel) {
  if (p.m == 0 || p.n == 0) {
    if (p.column_sums) std::fill_n(static_cast<T*>(p.column_sums), p.n, T{});
    return;
  }
  with_activation<T>(p.activation, [&](auto act) {
    using Act = decltype(act);
    if (!run_product<T, Act, product_t<T>>(p, parallel)) run_product<T, Act, WideningProduct<T>>(p, parallel);
  });
}

FASTLANE_END_TARGET
