// What the CUDA launchers compute on the host: alignment, coverage of every element exactly once, limits of a grid.
#include "kernels/cuda/common/geometry.h"

#include <vector>

#include "check.h"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

const char* const kAligned = reinterpret_cast<const char*>(uintptr_t{1} << 20);

void test_access() {
  const ConstRowMajor even{kAligned, 64}, odd_stride{kAligned, 63}, misaligned{kAligned + 4, 64}, absent{};
  const ConstRowMajor broadcast{kAligned, 0};
  CHECK(access_elements(64, DType::f32, even, absent, broadcast) == 4);
  CHECK(access_elements(64, DType::f64, even) == 2);
  CHECK(access_elements(64, DType::bf16, even) == 8);
  CHECK(access_elements(62, DType::f32, even) == 1);
  CHECK(access_elements(60, DType::bf16, even) == 1);
  CHECK(access_elements(64, DType::f32, even, odd_stride) == 1);
  CHECK(access_elements(64, DType::f32, even, misaligned) == 1);
  CHECK(access_elements(64, DType::bf16, ConstRowMajor{kAligned, 68}) == 1);
  CHECK(access_elements(64, DType::f32, ConstRowMajor{kAligned, -64}) == 4);
}

void test_limits(const Geometry& g) {
  CHECK(g.block_cols >= 1 && g.block_rows >= 1 && g.block_cols * g.block_rows <= 1024);
  CHECK(g.grid_cols >= 1 && g.grid_cols <= kMaxGridCols);
  CHECK(g.grid_rows >= 1 && g.grid_rows <= kMaxGridRows);
}

// The kernels' loops, on the host.
void test_elementwise_coverage(int64_t rows, int64_t cols, int64_t access) {
  constexpr int64_t kRowsAtOnce = 4;
  const Geometry g = elementwise_geometry(rows, cols, access, kRowsAtOnce);
  test_limits(g);
  std::vector<int> seen(static_cast<size_t>(rows * cols));
  for (int64_t x = 0; x < g.grid_cols * g.block_cols; ++x)
    for (int64_t y = 0; y < g.grid_rows * g.block_rows; ++y)
      for (int64_t col = x * access; col < cols; col += g.grid_cols * g.block_cols * access)
        for (int64_t row = y; row < rows; row += g.grid_rows * g.block_rows)
          for (int64_t i = 0; i < access; ++i) ++seen[static_cast<size_t>(row * cols + col + i)];
  for (const int count : seen) CHECK(count == 1);
}

void test_column_sum_coverage(int64_t rows, int64_t cols, int64_t access) {
  const ColumnSumGeometry g = column_sum_geometry(rows, cols, access);
  test_limits(g);
  CHECK(g.chunk_rows % g.block_rows == 0 && g.chunk_rows / g.block_rows <= 64);
  CHECK(g.chunks * g.chunk_rows >= rows && (g.chunks - 1) * g.chunk_rows < std::max<int64_t>(rows, 1));
  CHECK(g.grid_cols * g.block_cols * access >= cols);
  CHECK(g.grid_rows <= std::max<int64_t>(g.chunks, 1));
}

void test_huge() {
  const int64_t huge = int64_t{1} << 40;
  test_limits(elementwise_geometry(huge, 1, 1, 4));
  test_limits(elementwise_geometry(1, huge, 1, 4));
  test_limits(column_sum_geometry(huge, 1, 1));
  test_limits(column_sum_geometry(1, huge, 1));
  CHECK(column_sum_geometry(huge, 1, 1).chunks == huge / (64 * 8));
  CHECK(ceil_div(INT64_MAX, 2) == (INT64_MAX >> 1) + 1);
}

}  // namespace

int main() {
  test_access();
  for (const int64_t rows : {1, 3, 4, 5, 31, 64, 65, 1000})
    for (const int64_t cols : {1, 2, 7, 8, 24, 64, 256, 264, 1032}) {
      test_elementwise_coverage(rows, cols, 1);
      test_column_sum_coverage(rows, cols, 1);
      if (cols % 8 == 0) test_elementwise_coverage(rows, cols, 8), test_column_sum_coverage(rows, cols, 8);
    }
  test_elementwise_coverage(300000, 1, 1);
  test_column_sum_coverage(0, 8, 1);
  test_huge();
  return failures != 0;
}
