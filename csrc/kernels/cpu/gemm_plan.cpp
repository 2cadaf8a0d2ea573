#include "kernels/cpu/gemm_plan.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "kernels/cpu/arithmetic.h"

namespace fastlane {
namespace {

constexpr int64_t kMaxTaskRows = 240;
constexpr int64_t kMinBlockCols = 256, kMaxBlockCols = 1024;
constexpr int64_t kPackedBBytes = int64_t{16} << 20;

bool reads_in_place(const OperandFacts& left) { return left.reads_along_k || left.reads_across; }

// L1 is taken to have eight ways. A tile of at most six rows leaves two of them to B and to the sums. Few tiles are
// not read often enough to pay for packing.
bool packs_because_of_sets(const OperandFacts& left, const GemmFacts& f) {
  constexpr int64_t kL1Ways = 8;
  return left.shares_a_set && f.tile_rows > kL1Ways - 2 && left.count > kMaxGroup * f.tile_rows;
}

double values_to_pack(const OperandFacts& left, const OperandFacts& right, int64_t k) {
  return static_cast<double>(k) * (static_cast<double>(reads_in_place(left) ? 0 : left.count) +
                                   static_cast<double>(right.reads_across ? 0 : right.count));
}

// To finish a transposed product moves every result once more.
bool is_cheaper_transposed(const GemmFacts& f) {
  if (f.b_is_packed) return false;
  const double results = static_cast<double>(f.m) * static_cast<double>(f.n);
  return values_to_pack(f.b, f.a, f.k) + results < values_to_pack(f.a, f.b, f.k);
}

class Planner {
 public:
  Planner(const GemmFacts& facts, const Caches& caches, int64_t threads) : f_(facts), caches_(caches) {
    plan_.facts = facts, plan_.threads = threads;
    plan_.transposed = is_cheaper_transposed(f_);
    left_ = plan_.transposed ? f_.b : f_.a, right_ = plan_.transposed ? f_.a : f_.b;
  }

  GemmPlan plan() {
    plan_.a_in_place = reads_in_place(left_) && !packs_because_of_sets(left_, f_);
    const bool may_keep_b = plan_.a_in_place && !right_.reads_across;
    plan_.pass_steps = pass_steps(may_keep_b ? f_.tile_rows : f_.tile_cols);
    plan_.b_in_place = right_.reads_across;
    plan_.prefetches_finish = f_.finish_row_bytes > kDenseRowBytes;
    plan_.k_blocks = std::max<int64_t>(1, ceil_div(f_.k, f_.block_steps * f_.k_per_step));
    plan_.block_cols = std::min(right_.count, std::clamp(packed_units() / steps() / f_.tile_cols * f_.tile_cols,
                                                         kMinBlockCols, kMaxBlockCols));
    plan_.col_blocks = ceil_div(right_.count, plan_.block_cols);
    plan_.task_row_panels = task_row_panels();
    if (block_multiply_adds() < kSerialMultiplyAdds) plan_.threads = 1;
    if (may_keep_b) keep_b_in_l2();
    if (may_keep_b && !b_stays()) keep_a_in_l2();
    if (!may_keep_b && !plan_.a_in_place && !right_.reads_across) pass_packed_a_by();
    plan_.slab_blocks = f_.b_is_packed ? plan_.k_blocks : slab_blocks();
    return plan_;
  }

 private:
  int64_t slab_blocks() const {
    const int64_t units_of_block_step = ceil_div(plan_.block_cols, f_.tile_cols) * f_.tile_cols;
    return std::max<int64_t>(1, std::min(plan_.k_blocks, packed_units() / (plan_.own_blocks ? plan_.threads : 1) /
                                                             f_.block_steps / units_of_block_step));
  }
  int64_t steps() const { return std::max<int64_t>(1, ceil_div(f_.k, f_.k_per_step)); }
  int64_t packed_units() const { return kPackedBBytes / f_.unit_bytes; }
  int64_t most_steps() const { return std::min(steps(), f_.block_steps); }  // of a k block
  // The strips of a pass that half of L2 holds.
  int64_t l2_strips() const { return caches_.l2 / 2 / f_.unit_bytes / std::min(steps(), plan_.pass_steps); }

  bool has_passes() const { return plan_.pass_steps < most_steps(); }
  int64_t task_row_panels() const { return std::max(kMaxGroup, std::min(kMaxTaskRows, l2_strips()) / f_.tile_rows); }

  // In each pass the passing panel, of so many strips, takes half of L1. A tile that multiplies each value it reads
  // by many others does not wait for L2, so its passes take whole k blocks.
  int64_t pass_steps(int64_t strips) const {
    constexpr int64_t kEnoughMultiplyAdds = 6;
    if (f_.tile_rows * f_.tile_cols >= kEnoughMultiplyAdds * (f_.tile_rows + f_.tile_cols)) return f_.block_steps;
    const int64_t chains = caches_.l1 / 2 / f_.unit_bytes / strips / f_.chain_steps;
    return std::clamp(chains * f_.chain_steps, f_.chain_steps, f_.block_steps);
  }

  void keep_a_in_l2() {
    plan_.pass_steps = pass_steps(f_.tile_cols);
    // With several passes a task's rows are read again and again.
    if (has_passes()) plan_.a_in_place = left_.reads_across;
    plan_.task_row_panels = task_row_panels();
  }

  // The narrower panels of A allow longer passes than B's, and sums wait less often. A task packs its A once; the
  // packed panels come from the last level, once for each group of B's panels. Tiles then follow each other along
  // rows of the result: down a column, where each line of a store lies in another page, dW of few rows waits for
  // them.
  void pass_packed_a_by() {
    const int64_t longest = pass_steps(f_.tile_rows);
    const int64_t panels = caches_.l2 / 2 / f_.unit_bytes / std::min(steps(), longest) / f_.tile_cols;
    if (longest <= plan_.pass_steps || panels < 2) return;
    plan_.pass_steps = longest;
    plan_.b_panels_in_l2 = panels;
    plan_.task_row_panels = kMaxTaskRows / f_.tile_rows;
  }

  bool b_stays() const { return plan_.b_panels_in_l2 > 1; }

  double block_multiply_adds() const {
    return static_cast<double>(left_.count) * static_cast<double>(plan_.block_cols) * static_cast<double>(f_.k);
  }

  void keep_b_in_l2() {
    const int64_t max_panels = std::max<int64_t>(1, l2_strips() / f_.tile_cols);
    const int64_t panels = ceil_div(right_.count, f_.tile_cols), threads = plan_.threads;
    // A passes by once for each block, so A has to come from the last-level cache, not from memory.
    const double a_bytes =
        static_cast<double>(left_.count) * static_cast<double>(f_.k) * static_cast<double>(element_size(f_.dtype));
    plan_.own_blocks =
        panels >= max_panels * threads && (panels <= max_panels || a_bytes <= static_cast<double>(caches_.last));
    if (plan_.own_blocks || panels <= max_panels) plan_.b_panels_in_l2 = std::max<int64_t>(2, max_panels);
    // Every task of several passes reads its block of B from the last level again.
    if (b_stays() && has_passes()) plan_.task_row_panels = kMaxTaskRows / f_.tile_rows;
    if (!plan_.own_blocks) return;
    // As many blocks as fill the threads evenly.
    plan_.col_blocks = std::min(panels, ceil_div(ceil_div(panels, max_panels), threads) * threads);
    plan_.block_cols = std::min(right_.count, ceil_div(panels, plan_.col_blocks) * f_.tile_cols);
  }

  const GemmFacts& f_;
  const Caches& caches_;
  OperandFacts left_, right_;
  GemmPlan plan_;
};

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::f32: break;
  }
  return "float32";
}

bool is_traced() {
  static const bool traced = [] {
    const char* const text = std::getenv("FASTLANE_TRACE");
    return text && std::string(text) == "plan";
  }();
  return traced;
}

}  // namespace

GemmPlan plan_tiles(const GemmFacts& facts, const Caches& caches, int64_t threads) {
  return Planner(facts, caches, threads).plan();
}

std::string describe(const GemmPlan& plan) {
  const GemmFacts& f = plan.facts;
  std::ostringstream text;
  text << f.m << " x " << f.k << " x " << f.n << " " << name_of(f.dtype) << ", " << plan.threads
       << (plan.threads == 1 ? " thread: " : " threads: ");
  if (plan.method == GemmMethod::inner_products) return text.str() + "inner products";
  if (plan.method == GemmMethod::axpy) return text.str() + "rows of B, each times an element of A";
  if (plan.method == GemmMethod::panel_rows) return text.str() + "a few rows times the caller's panels";
  const char *const a = plan.transposed ? "B" : "A", *const b = plan.transposed ? "A" : "B";
  const char* const b_lies = plan.b_in_place ? " in place; "
                             : f.b_is_packed ? " packed by the caller; "
                                             : " packed; ";
  text << "tiles of " << f.tile_rows << " x " << f.tile_cols << (plan.transposed ? ", transposed" : "") << "; " << a
       << (plan.a_in_place ? " in place, " : " packed, ") << b << b_lies << (plan.b_panels_in_l2 > 1 ? b : a)
       << " stays in L2; " << plan.col_blocks << " column blocks of up to " << plan.block_cols
       << (plan.own_blocks ? ", a thread takes whole blocks; " : ", threads share each block; ") << plan.k_blocks
       << " k blocks, " << plan.slab_blocks << " packed at one time, in passes of up to " << plan.pass_steps
       << " steps; tasks of up to " << plan.task_row_panels << " tiles of rows"
       << (plan.prefetches_finish ? "; the finish is prefetched" : "");
  return text.str();
}

void trace(const GemmPlan& plan) {
  if (is_traced()) std::fprintf(stderr, "fastlane plan: %s\n", describe(plan).c_str());
}

}  // namespace fastlane
