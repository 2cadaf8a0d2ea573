// A product with its epilogue as one kernel on Hopper's wgmma and TMA (CUTLASS, sm_90a). This file says which
// problems the kernels take, and with which tile, in plain C++, so that tests need no GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/common/geometry.h"
#include "kernels/cuda/common/gpu.h"

namespace fastlane::cuda {

// Rows × columns of the result that a block computes at once. Two warpgroups share a tile of 256 columns: each
// operand that is read serves more multiply-adds, but during the tile's epilogue nothing multiplies. With the smaller
// tiles each warpgroup has a tile of its own, and one multiplies while the other is in its epilogue.
enum class HopperTile : uint8_t { m128n256, m128n192, m128n128 };
constexpr HopperTile kHopperTiles[] = {HopperTile::m128n256, HopperTile::m128n192, HopperTile::m128n128};
constexpr int64_t kTileRows = 128;
constexpr int64_t tile_cols(HopperTile tile) {
  return tile == HopperTile::m128n256 ? 256 : tile == HopperTile::m128n192 ? 192 : 128;
}
constexpr bool is_shared(HopperTile tile) { return tile == HopperTile::m128n256; }

// The kinds of kernels. They differ in B's layout and in the epilogue.
//   forward: B's columns lie along k; bias, z, activation, addend
//   dgrad: B's rows lie along n; addend
//   through_activation: as dgrad, and on through the activation of the layer before
enum class HopperKind : uint8_t { none, forward, dgrad, through_activation };

// TMA asks for a base and strides that are multiples of 16 bytes, rows that do not overlap, and strides below 2^40
// bytes.
inline bool tma_reads(const void* data, int64_t row_stride, int64_t cols, DType dtype) {
  return rows_are_aligned(data, row_stride, dtype) && row_stride >= cols &&
         row_stride < (int64_t{1} << 40) / element_size(dtype);
}
template <class Rows>
bool tma_takes(const Rows& rows, int64_t cols, DType dtype) {
  return rows.data == nullptr || tma_reads(rows.data, rows.row_stride, cols, dtype);
}

// CUTLASS's sizes are int, and int must also hold what whole clusters of tiles cover.
constexpr int64_t kMaxHopperSize = std::numeric_limits<int32_t>::max() - 512;

// Which kind of kernel can compute the problem. Whether that pays, is_worth_a_hopper_kernel decides.
inline HopperKind hopper_kind(const GemmProblem& p) {
  if (p.dtype == DType::f64 || p.epilogue.slope.data || std::max({p.m, p.n, p.k}) > kMaxHopperSize)
    return HopperKind::none;
  const int64_t vector = kAccessBytes / element_size(p.dtype);
  if (p.k == 0 || p.n % vector != 0 || p.k % vector != 0) return HopperKind::none;
  const bool rows_fit = p.a.col_stride == 1 && tma_reads(p.a.data, p.a.row_stride, p.k, p.dtype) &&
                        tma_takes(p.addend(), p.n, p.dtype) && tma_takes(p.epilogue.z, p.n, p.dtype) &&
                        tma_takes(p.out(), p.n, p.dtype);
  if (!rows_fit) return HopperKind::none;
  if (!p.ends_in_gradient && p.b.row_stride == 1 && tma_reads(p.b.data, p.b.col_stride, p.k, p.dtype))
    return HopperKind::forward;
  // wgmma reads 4-byte operands along k only.
  if (p.dtype == DType::f32 || p.epilogue.bias || p.epilogue.z.data || p.b.col_stride != 1 ||
      !tma_reads(p.b.data, p.b.row_stride, p.n, p.dtype))
    return HopperKind::none;
  if (!p.ends_in_gradient) return p.epilogue.activation == Activation::none ? HopperKind::dgrad : HopperKind::none;
  // Without rows there are still column sums, but no tiles to write them.
  const GradientEpilogue& e = p.gradient;
  const bool fits = p.m > 0 && p.n > 0 && e.preactivation.data && e.activation != Activation::none &&
                    tma_reads(e.preactivation.data, e.preactivation.row_stride, p.n, p.dtype) &&
                    tma_takes(e.unscaled, p.n, p.dtype);
  return fits ? HopperKind::through_activation : HopperKind::none;
}

// The tiles of a result, and the columns that they cover.
struct TileGrid {
  int64_t rows, cols, covered_cols;

  TileGrid(const GemmProblem& p, HopperTile tile)
      : rows(ceil_div(p.m, kTileRows)), cols(ceil_div(p.n, tile_cols(tile))), covered_cols(cols * tile_cols(tile)) {}
  int64_t tiles() const { return rows * cols; }
};

// Whether there is a kernel with this tile. With nvcc 13.0 only a 16-bit forward has registers enough for the tile of
// 192 columns.
inline bool has_tile(HopperKind kind, DType dtype, HopperTile tile) {
  return tile != HopperTile::m128n192 || (kind == HopperKind::forward && element_size(dtype) == 2);
}

// Cycles that a multiprocessor takes, by its limits: multiply-adds of 16-bit values, bytes of operands from L2 (the
// two blocks of a cluster share B), and instructions of the epilogue. A scheduler with one warp in the epilogue
// issues one of these instructions in two cycles, with two warps four in five cycles. The limits are counted and
// estimated, not measured.
inline double hopper_cycles(const GemmProblem& p, HopperKind kind, HopperTile tile, const Gpu& gpu) {
  constexpr double kMultiplyAdds = 2048, kL2Bytes = 27, kLanes = 4 * 32;
  const double cols = static_cast<double>(tile_cols(tile)), rows = kTileRows, k = static_cast<double>(p.k);
  const double bytes = static_cast<double>(element_size(p.dtype));
  const double main_loop =
      k * std::max(rows * cols / kMultiplyAdds * bytes / 2, (rows + cols / 2) * bytes / kL2Bytes);
  const bool activates = p.epilogue.activation != Activation::none;
  const double instructions = kind == HopperKind::through_activation ? 34 : activates ? 17 : 5;
  const double epilogue = rows * cols * instructions / (kLanes * (is_shared(tile) ? 0.8 : 0.5));
  const double rounds = static_cast<double>(ceil_div(TileGrid(p, tile).tiles(), gpu.multiprocessors));
  // Where two warpgroups have tiles of their own, one at a time multiplies, and one at a time is in its epilogue.
  return is_shared(tile) ? rounds * (main_loop + epilogue)
                         : main_loop + epilogue + (rounds - 1) * std::max(main_loop, epilogue);
}

// The tile with the least cycles; the tile of `wanted_cols` columns wherever the product has a kernel with that tile.
inline HopperTile hopper_tile(const GemmProblem& p, HopperKind kind, const Gpu& gpu, int64_t wanted_cols = 0) {
  HopperTile best = HopperTile::m128n256;
  double least = std::numeric_limits<double>::infinity();
  for (const HopperTile tile : kHopperTiles) {
    if (!has_tile(kind, p.dtype, tile)) continue;
    if (tile_cols(tile) == wanted_cols) return tile;
    const double cycles = hopper_cycles(p, kind, tile, gpu);
    if (cycles < least) best = tile, least = cycles;
  }
  return best;
}
inline bool runs_hopper_kernels(const Gpu& gpu) { return gpu.capability == 90; }
// A product whose smallest tiles fill less than half the GPU goes to the library, which can also cut along k.
inline bool is_worth_a_hopper_kernel(const GemmProblem& p, const Gpu& gpu) {
  return runs_hopper_kernels(gpu) && TileGrid(p, HopperTile::m128n128).tiles() * 2 >= gpu.multiprocessors;
}

// Rows of column sums that each row of tiles writes: one for each of the warps that share the tile.
constexpr int column_sum_rows(HopperTile tile) { return is_shared(tile) ? 8 : 4; }
// The bytes of these rows; a row has as many columns as the tiles cover.
inline int64_t hopper_workspace(const GemmProblem& p, HopperTile tile) {
  const TileGrid grid(p, tile);
  return p.gradient.column_sums ? grid.rows * column_sum_rows(tile) * grid.covered_cols * int64_t{sizeof(float)} : 0;
}

// Whether this build has the kernels.
bool has_hopper_kernels();

// Runs the product, of a kind that is not none, on the given stream of the current device. `workspace` has
// hopper_workspace(problem, tile) bytes, aligned to 16. Returns false, and does nothing, if CUTLASS cannot run the
// product. A failed launch throws std::runtime_error.
bool hopper_gemm(const GemmProblem& problem, HopperKind kind, HopperTile tile, int multiprocessors, void* workspace,
                 Stream stream);

}  // namespace fastlane::cuda
