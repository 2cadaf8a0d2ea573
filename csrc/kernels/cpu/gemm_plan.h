// How a product is cut. A plan is a value that follows from sizes, layouts, caches and threads alone: nothing is
// computed and no operand is read. FASTLANE_TRACE=plan prints the plan of each product.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/cpu/caches.h"
#include "kernels/matrix.h"

namespace fastlane {

// An operand as strips: rows of A or columns of B, each with its values along k.
struct OperandFacts {
  int64_t count = 0;
  bool reads_along_k = false;  // the left operand of a tile may be read where it lies, because strips run along k
  bool reads_across = false;  // either operand of a tile may be read where it lies, across dense rows
  bool shares_a_set = false;  // strips run along k and lie whole pages apart, all in one set of L1
};

struct GemmFacts {
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::f32;
  OperandFacts a, b;
  bool b_is_packed = false;  // the caller brings B in panels
  // The finish may read a matrix, whose rows lie this far apart; 0 if it reads none.
  int64_t finish_row_bytes = 0;
  // The kernel set's tile, and the unit that its product for this dtype takes in a step (tile-inl.h, product-inl.h).
  int64_t tile_rows = 1, tile_cols = 1;
  int64_t unit_bytes = 4, k_per_step = 1;
  int64_t chain_steps = 1, block_steps = 1;  // of a chain, of a k block
};

// The ways to compute a product, each a file: dot-inl.h, axpy-inl.h, panel_rows-inl.h, gemm-inl.h.
enum class GemmMethod : uint8_t { inner_products, axpy, panel_rows, tiles };

struct GemmPlan {
  GemmFacts facts;
  GemmMethod method = GemmMethod::tiles;
  int64_t threads = 1;

  // The rest is for tiles.
  bool transposed = false;  // Bᵀ Aᵀ is computed; below, A is then the problem's B
  bool a_in_place = false, b_in_place = false;  // read where they lie, otherwise packed
  int64_t b_panels_in_l2 = 1;  // so many panels of B stay in L2 while A passes by; 1 if A stays and B passes by
  bool own_blocks = false;  // a thread takes whole column blocks; otherwise threads share each block
  bool prefetches_finish = false;
  int64_t k_blocks = 1;
  int64_t col_blocks = 1, block_cols = 0;  // how many, and the columns of the largest
  int64_t slab_blocks = 1;  // k blocks whose packed B exists at one time
  int64_t pass_steps = 1;  // at most; a k block is cut into passes, and all tiles take one pass before the next
  int64_t task_row_panels = 1;  // at most
};

// The rows of one tile are no multiple of the vector's width, the rows of four tiles are. So a group of four tiles is
// transposed together.
constexpr int64_t kMaxGroup = 4;

// Rows at most this far apart are dense: tiles read across them where they lie, and the hardware prefetchers follow
// along them.
constexpr int64_t kDenseRowBytes = 512;

GemmPlan plan_tiles(const GemmFacts& facts, const Caches& caches, int64_t threads);

// One line.
std::string describe(const GemmPlan& plan);

// Prints that line to the standard error stream if FASTLANE_TRACE is "plan". The variable is read once.
void trace(const GemmPlan& plan);

}  // namespace fastlane
