// A product with its epilogue as one kernel of Hopper's wgmma and TMA (CUTLASS, sm_90a): which problems it takes, and
// with which tile. Plain C++, so that tests need no GPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/common/geometry.h"
#include "kernels/cuda/common/gpu.h"

namespace fastlane::cuda {

// Rows × columns of the result that a block computes at once. Two warpgroups share a tile of 256 columns: more
// multiply-adds for each operand read, but while they are in its epilogue nothing multiplies. Of the narrower tiles
// each warpgroup has its own, and one multiplies while the other is in its epilogue.
enum class HopperTile : uint8_t { m128n256, m128n192, m128n128 };
constexpr HopperTile kHopperTiles[] = {HopperTile::m128n256, HopperTile::m128n192, HopperTile::m128n128};
constexpr int64_t kTileRows = 128;
constexpr int64_t tile_cols(HopperTile tile) {
  return tile == HopperTile::m128n256 ? 256 : tile == HopperTile::m128n192 ? 192 : 128;
}
constexpr bool is_shared(HopperTile tile) { return tile == HopperTile::m128n256; }

// Which kernel: they differ in how B lies and in what their epilogues do.
//   forward: B's columns lie along k; bias, z, activation, addend
//   dgrad: B's rows lie along n; addend
//   through_activation: as dgrad, and on through the activation of the layer before
enum class HopperKind : uint8_t { none, forward, dgrad, through_activation };

// TMA: a base and strides of multiples of 16 bytes, no overlapping rows, strides below 2^40 bytes.
inline bool tma_reads(const void* data, int64_t row_stride, int64_t cols, DType dtype) {
  return rows_are_aligned(data, row_stride, dtype) && row_stride >= cols &&
         row_stride < (int64_t{1} << 40) / element_size(dtype);
}
template <class Rows>
bool tma_takes(const Rows& rows, int64_t cols, DType dtype) {
  return rows.data == nullptr || tma_reads(rows.data, rows.row_stride, cols, dtype);
}

// CUTLASS's int, which also holds what whole clusters of tiles cover.
constexpr int64_t kMaxHopperSize = std::numeric_limits<int32_t>::max() - 512;

// By layout, alignment and dtype alone.
inline HopperKind hopper_kind(const GemmProblem& p) {
  if (p.dtype == DType::f64 || p.slope.data || std::max({p.m, p.n, p.k}) > kMaxHopperSize) return HopperKind::none;
  const int64_t vector = kAccessBytes / element_size(p.dtype);
  if (p.k == 0 || p.n % vector != 0 || p.k % vector != 0) return HopperKind::none;
  const bool rows_fit = p.a.col_stride == 1 && tma_reads(p.a.data, p.a.row_stride, p.k, p.dtype) &&
                        tma_takes(p.addend, p.n, p.dtype) && tma_takes(p.z, p.n, p.dtype) &&
                        tma_takes(p.out, p.n, p.dtype);
  if (!rows_fit) return HopperKind::none;
  const bool through_activation = p.preactivation.data || p.column_sums;
  if (!through_activation && p.b.row_stride == 1 && tma_reads(p.b.data, p.b.col_stride, p.k, p.dtype))
    return HopperKind::forward;
  // wgmma reads 4-byte operands along k only.
  if (p.dtype == DType::f32 || p.bias || p.z.data || p.b.col_stride != 1 ||
      !tma_reads(p.b.data, p.b.row_stride, p.n, p.dtype))
    return HopperKind::none;
  if (!through_activation) return p.activation == Activation::none ? HopperKind::dgrad : HopperKind::none;
  // Of no rows there are sums, but no tiles to write them.
  const bool fits = p.m > 0 && p.n > 0 && p.preactivation.data && p.activation != Activation::none &&
                    tma_reads(p.preactivation.data, p.preactivation.row_stride, p.n, p.dtype) &&
                    tma_takes(p.unscaled, p.n, p.dtype);
  return fits ? HopperKind::through_activation : HopperKind::none;
}

// The tiles of a result, and the columns that they cover.
struct TileGrid {
  int64_t rows, cols, covered_cols;

  TileGrid(const GemmProblem& p, HopperTile tile)
      : rows(ceil_div(p.m, kTileRows)), cols(ceil_div(p.n, tile_cols(tile))), covered_cols(cols * tile_cols(tile)) {}
  int64_t tiles() const { return rows * cols; }
};

// Whether there is such a kernel: nvcc 13.0 has registers enough for the tile of 192 columns in a 16-bit forward
// only.
inline bool has_tile(HopperKind kind, DType dtype, HopperTile tile) {
  return tile != HopperTile::m128n192 || (kind == HopperKind::forward && element_size(dtype) == 2);
}

// Cycles that a multiprocessor takes, by what it can do at most: multiply-adds of 16-bit values, bytes of operands
// from L2 (the two blocks of a cluster share B), and instructions of the epilogue, of which a scheduler issues one in
// two cycles if it has a warp in it and four in five if it has two. Counted and estimated, not measured.
inline double hopper_cycles(const GemmProblem& p, HopperKind kind, HopperTile tile, const Gpu& gpu) {
  constexpr double kMultiplyAdds = 2048, kL2Bytes = 27, kLanes = 4 * 32;
  const double cols = static_cast<double>(tile_cols(tile)), rows = kTileRows, k = static_cast<double>(p.k);
  const double bytes = static_cast<double>(element_size(p.dtype));
  const double main_loop =
      k * std::max(rows * cols / kMultiplyAdds * bytes / 2, (rows + cols / 2) * bytes / kL2Bytes);
  const double instructions = kind == HopperKind::through_activation ? 34 : p.activation == Activation::none ? 5 : 17;
  const double epilogue = rows * cols * instructions / (kLanes * (is_shared(tile) ? 0.8 : 0.5));
  const double rounds = static_cast<double>(ceil_div(TileGrid(p, tile).tiles(), gpu.multiprocessors));
  // Of two warpgroups with tiles of their own one at a time multiplies, and one at a time is in its epilogue.
  return is_shared(tile) ? rounds * (main_loop + epilogue)
                         : main_loop + epilogue + (rounds - 1) * std::max(main_loop, epilogue);
}

// The columns of the tile for every product that has such a kernel, to test and to measure it; 0: the choice below.
inline std::atomic<int64_t> forced_tile_cols = 0;

inline HopperTile hopper_tile(const GemmProblem& p, HopperKind kind, const Gpu& gpu) {
  HopperTile best = HopperTile::m128n256;
  double least = std::numeric_limits<double>::infinity();
  for (const HopperTile tile : kHopperTiles) {
    if (!has_tile(kind, p.dtype, tile)) continue;
    if (tile_cols(tile) == forced_tile_cols) return tile;
    const double cycles = hopper_cycles(p, kind, tile, gpu);
    if (cycles < least) best = tile, least = cycles;
  }
  return best;
}
inline bool runs_hopper_kernels(const Gpu& gpu) { return gpu.capability == 90; }
// Below half a GPU of the smallest tiles the library, which can also cut along k, has the product.
inline bool is_worth_a_hopper_kernel(const GemmProblem& p, const Gpu& gpu) {
  return runs_hopper_kernels(gpu) && TileGrid(p, HopperTile::m128n128).tiles() * 2 >= gpu.multiprocessors;
}

// Rows of column sums that each row of tiles writes: one for each of the warps that share the tile.
constexpr int column_sum_rows(HopperTile tile) { return is_shared(tile) ? 8 : 4; }
// Their bytes; a row has as many columns as the tiles cover.
inline int64_t hopper_workspace(const GemmProblem& p, HopperTile tile) {
  const TileGrid grid(p, tile);
  return p.column_sums ? grid.rows * column_sum_rows(tile) * grid.covered_cols * int64_t{sizeof(float)} : 0;
}

// Whether this build has the kernels.
bool has_hopper_kernels();

// Runs the product, of a kind that is not none, on the given stream of the current device. `workspace` has as many
// bytes as asked for, aligned to 16. False, with nothing done, if CUTLASS cannot. A failed launch throws
// std::runtime_error.
bool hopper_gemm(const GemmProblem& problem, HopperKind kind, HopperTile tile, int multiprocessors, void* workspace,
                 Stream stream);

}  // namespace fastlane::cuda
