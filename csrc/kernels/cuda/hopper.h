// A product with its epilogue as one kernel of Hopper's wgmma and TMA (CUTLASS, sm_90a): which problems it takes, and
// with which tile. Plain C++, so that tests need no GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "elementwise.h"
#include "geometry.h"
#include "gpu.h"

namespace fastlane::cuda {

// Rows × columns of the result that a block computes at once.
enum class HopperTile : uint8_t { m128n256, m128n128 };

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

// By layout, alignment and dtype alone.
inline HopperKind hopper_kind(const GemmProblem& p) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (p.dtype == DType::f64 || p.slope.data || std::max({p.m, p.n, p.k}) > kMax) return HopperKind::none;
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

  TileGrid(const GemmProblem& p, HopperTile tile) {
    const int64_t tile_rows = 128, tile_cols = tile == HopperTile::m128n256 ? 256 : 128;
    rows = ceil_div(p.m, tile_rows), cols = ceil_div(p.n, tile_cols), covered_cols = cols * tile_cols;
  }
  int64_t tiles() const { return rows * cols; }
};

// The wide tile reads fewer operands for each multiply-add, the other fills a GPU with smaller problems. Below half a
// GPU of those the library, which can also cut along k, has the product. Estimates, not measured.
inline bool suits_wide_tile(const GemmProblem& p, const Gpu& gpu) {
  const TileGrid wide(p, HopperTile::m128n256), narrow(p, HopperTile::m128n128);
  return wide.covered_cols == narrow.covered_cols && wide.tiles() >= gpu.multiprocessors;
}
// Through an activation there is the wide one only.
inline HopperTile hopper_tile(const GemmProblem& p, HopperKind kind, const Gpu& gpu) {
  return kind == HopperKind::through_activation || suits_wide_tile(p, gpu) ? HopperTile::m128n256
                                                                           : HopperTile::m128n128;
}
inline bool runs_hopper_kernels(const Gpu& gpu) { return gpu.capability == 90; }
inline bool is_worth_a_hopper_kernel(const GemmProblem& p, HopperKind kind, const Gpu& gpu) {
  if (!runs_hopper_kernels(gpu)) return false;
  return kind == HopperKind::through_activation
             ? suits_wide_tile(p, gpu)
             : TileGrid(p, HopperTile::m128n128).tiles() * 2 >= gpu.multiprocessors;
}

// The sums of its columns that each tile writes: for each row of tiles a row of floats, one for each column covered.
inline int64_t hopper_workspace(const GemmProblem& p, HopperTile tile) {
  const TileGrid grid(p, tile);
  return p.column_sums ? grid.rows * grid.covered_cols * int64_t{sizeof(float)} : 0;
}

// Whether this build has the kernels.
bool has_hopper_kernels();

// Runs the product, of a kind that is not none, on the given stream of the current device. `workspace` has as many
// bytes as asked for, aligned to 16. False, with nothing done, if CUTLASS cannot. A failed launch throws
// std::runtime_error.
bool hopper_gemm(const GemmProblem& problem, HopperKind kind, HopperTile tile, int multiprocessors, void* workspace,
                 Stream stream);

}  // namespace fastlane::cuda
