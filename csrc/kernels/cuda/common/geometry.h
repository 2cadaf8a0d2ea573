// Alignment rules and launch geometry of the elementwise passes, in plain C++ so that tests need no GPU.
//
// A block's threads lie side by side along the columns, each with one vector of columns, and below each other along
// the rows. Whatever decides the order of a sum depends on the problem alone, not on the GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/problem.h"

namespace fastlane::cuda {

constexpr int64_t kAccessBytes = 16;
constexpr int kBlockThreads = 256;
constexpr int kSumCols = 32, kSumRows = kBlockThreads / kSumCols;  // threads of a block that sums columns
constexpr int64_t kMaxGridRows = 65535;  // of gridDim.y
constexpr int64_t kMaxGridCols = 2147483647;  // of gridDim.x

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Whether every row starts where a 16-byte access may.
inline bool rows_are_aligned(const void* data, int64_t row_stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0 &&
         row_stride * element_size(dtype) % kAccessBytes == 0;
}
template <class Rows>
bool rows_are_aligned(const Rows& rows, DType dtype) {
  return rows.data == nullptr || rows_are_aligned(rows.data, rows.row_stride, dtype);
}

// Elements of an access if every operand allows 16 bytes at once, otherwise 1.
template <class... Rows>
int64_t access_elements(int64_t cols, DType dtype, const Rows&... operands) {
  const int64_t elements = kAccessBytes / element_size(dtype);
  return cols % elements == 0 && (rows_are_aligned(operands, dtype) && ...) ? elements : 1;
}

struct Geometry {
  int block_cols, block_rows;  // threads
  int64_t grid_cols, grid_rows;  // blocks
};

// The smallest power of two that holds n, at most `limit`.
inline int power_of_two_for(int64_t n, int limit) {
  int power = 1;
  while (power < limit && power < n) power *= 2;
  return power;
}

// Threads step over the rows by the grid's height, so that any number of rows fits.
inline Geometry elementwise_geometry(int64_t rows, int64_t cols, int64_t access, int64_t rows_at_once) {
  const int64_t vectors = ceil_div(cols, access);
  Geometry g;
  g.block_cols = power_of_two_for(vectors, kBlockThreads);
  g.block_rows = kBlockThreads / g.block_cols;
  g.grid_cols = std::min(kMaxGridCols, ceil_div(vectors, g.block_cols));
  g.grid_rows = std::clamp<int64_t>(ceil_div(rows, g.block_rows * rows_at_once), 1, kMaxGridRows);
  return g;
}

// For sums over the rows: each block adds up a chunk of rows, then the chunks are added in order.
struct ColumnSumGeometry : Geometry {
  int64_t chunk_rows, chunks;
};

// No sum in a thread is longer than kMaxThreadRows. If there are rows enough, there are blocks enough for a large
// GPU.
inline ColumnSumGeometry column_sum_geometry(int64_t rows, int64_t cols, int64_t access) {
  constexpr int64_t kMaxThreadRows = 64, kMinThreadRows = 4, kWantedBlocks = 1024;
  const int64_t vectors = ceil_div(cols, access);
  ColumnSumGeometry g;
  g.block_cols = kSumCols, g.block_rows = kSumRows;
  g.grid_cols = std::min(kMaxGridCols, ceil_div(vectors, g.block_cols));
  const int64_t wanted_chunks = ceil_div(kWantedBlocks, g.grid_cols);
  const int64_t thread_rows =
      std::clamp(ceil_div(rows, wanted_chunks * g.block_rows), kMinThreadRows, kMaxThreadRows);
  g.chunk_rows = thread_rows * g.block_rows;
  g.chunks = ceil_div(rows, g.chunk_rows);
  g.grid_rows = std::clamp<int64_t>(g.chunks, 1, kMaxGridRows);
  return g;
}

}  // namespace fastlane::cuda
