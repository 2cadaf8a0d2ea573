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

// Which of two kernels: they differ in how B lies and in what their epilogues do.
//   forward: B's columns lie along k; bias, z, activation, addend
//   dgrad: B's rows lie along n; addend
enum class HopperKind : uint8_t { none, forward, dgrad };

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
  if (p.b.row_stride == 1 && tma_reads(p.b.data, p.b.col_stride, p.k, p.dtype)) return HopperKind::forward;
  // wgmma reads 4-byte operands along k only.
  const bool adds_only = !p.bias && !p.z.data && p.activation == Activation::none;
  if (p.dtype != DType::f32 && adds_only && p.b.col_stride == 1 && tma_reads(p.b.data, p.b.row_stride, p.n, p.dtype))
    return HopperKind::dgrad;
  return HopperKind::none;
}

// The wide tile reads fewer operands for each multiply-add, the other fills a GPU with smaller problems. Below half a
// GPU of those the library, which can also cut along k, has the product. Estimates, not measured.
inline int64_t tiles(const GemmProblem& p, int64_t rows, int64_t cols) {
  return ceil_div(p.m, rows) * ceil_div(p.n, cols);
}
inline HopperTile hopper_tile(const GemmProblem& p, const Gpu& gpu) {
  const bool wastes_columns = ceil_div(p.n, 256) * 256 > ceil_div(p.n, 128) * 128;
  return !wastes_columns && tiles(p, 128, 256) >= gpu.multiprocessors ? HopperTile::m128n256 : HopperTile::m128n128;
}
inline bool runs_hopper_kernels(const Gpu& gpu) { return gpu.capability == 90; }
inline bool is_worth_a_hopper_kernel(const GemmProblem& p, const Gpu& gpu) {
  return runs_hopper_kernels(gpu) && tiles(p, 128, 128) * 2 >= gpu.multiprocessors;
}

// Whether this build has the kernels.
bool has_hopper_kernels();

// Runs the product, of a kind that is not none, on the given stream of the current device. False, with nothing done,
// if CUTLASS cannot. A failed launch throws std::runtime_error.
bool hopper_gemm(const GemmProblem& problem, HopperKind kind, HopperTile tile, int multiprocessors, Stream stream);

}  // namespace fastlane::cuda
