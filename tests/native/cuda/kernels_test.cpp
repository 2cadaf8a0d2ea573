// Runs the elementwise CUDA kernels on the host, against the same formulas in double.
#include "grid.h"

#include <cmath>
#include <cstring>
#include <random>

#include "check.h"
#include "kernels/cuda/elementwise/epilogue.cuh"
#include "kernels/cuda/elementwise/preactivation_grad.cuh"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

template <class T>
constexpr double kUnit = std::is_same_v<T, double>          ? 4e-15
                         : std::is_same_v<T, float>         ? 2e-6
                         : std::is_same_v<T, __nv_bfloat16> ? 4e-3
                                                            : 5e-4;

template <class T>
double value_of(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return x;
  } else {
    return static_cast<double>(static_cast<float>(x));
  }
}

// A matrix with room between its rows. Everything that is not written is NaN, so that a read or write beside the
// matrix shows.
template <class T>
struct Matrix {
  int64_t rows, cols, stride;
  std::vector<T> memory;

  Matrix(int64_t rows, int64_t cols, int64_t gap)
      : rows(rows), cols(cols), stride(cols + gap), memory(static_cast<size_t>(rows * stride + 32)) {
    for (T& x : memory) x = rounded<T>(compute_t<T>(NAN));
  }
  // Where a 16-byte access may begin.
  T* data() { return memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 / sizeof(T); }
  T* at(int64_t row) { return data() + row * stride; }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal(0, 2);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) at(i)[j] = rounded<T>(compute_t<T>(normal(random)));
  }
  void check_gaps() {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = cols; j < stride; ++j) CHECK(std::isnan(value_of(at(i)[j])));
  }
};

template <class T>
void check_close(T got, double want, double scale) {
  const double error = std::fabs(value_of(got) - want), allowed = kUnit<T> * (std::fabs(want) + scale);
  if (!(error <= allowed)) std::printf("got %.9g, expected %.9g within %.2g\n", value_of(got), want, allowed);
  CHECK(error <= allowed);
}

dim3 grid_of(const Geometry& g) { return {static_cast<unsigned>(g.grid_cols), static_cast<unsigned>(g.grid_rows)}; }
dim3 block_of(const Geometry& g) {
  return {static_cast<unsigned>(g.block_cols), static_cast<unsigned>(g.block_rows)};
}

template <class T, class Act, int N>
void test_epilogue(int64_t rows, int64_t cols, bool with_bias, bool with_addend, bool with_z) {
  std::mt19937 random(static_cast<unsigned>(rows * 1000 + cols));
  const int64_t gap = N == 1 ? 3 : 2 * N;
  Matrix<T> product(rows, cols, gap), addend(rows, cols, 2 * gap), out(rows, cols, gap), bias(1, cols, 0);
  for (Matrix<T>* m : {&product, &addend, &bias}) m->fill(random);
  Matrix<T> z = product;  // the product may lie in z
  T* const read_from = with_z ? z.data() : product.data();
  const EpilogueOperands<T> p{rows,
                              cols,
                              read_from,
                              with_bias ? bias.data() : nullptr,
                              with_addend ? addend.data() : nullptr,
                              with_z ? z.data() : nullptr,
                              out.data(),
                              product.stride,
                              addend.stride,
                              z.stride,
                              out.stride};
  const Geometry g = elementwise_geometry(rows, cols, N, kRowsAtOnce);
  run_grid(grid_of(g), block_of(g), epilogue_kernel<T, Act, N>, p);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const double sum = value_of(product.at(i)[j]) + (with_bias ? value_of(bias.at(0)[j]) : 0);
      const double add = with_addend ? value_of(addend.at(i)[j]) : 0;
      check_close(out.at(i)[j], Act::template value<double>(sum) + add, std::fabs(sum) + std::fabs(add));
      if (with_z) check_close(z.at(i)[j], sum, 0);
    }
  out.check_gaps(), z.check_gaps();
}

template <class T, class Act, int N>
void test_preactivation_grad(int64_t rows, int64_t cols, bool with_dz, bool with_db, bool in_place = false) {
  std::mt19937 random(static_cast<unsigned>(rows * 1000 + cols));
  const int64_t gap = N == 1 ? 1 : N;
  Matrix<T> dy(rows, cols, gap), z(rows, cols, 2 * gap), dz(rows, cols, gap), db(1, cols, 0);
  dy.fill(random), z.fill(random);
  if (in_place) dz = dy;
  const ColumnSumGeometry g = column_sum_geometry(rows, cols, N);
  std::vector<compute_t<T>> partial(static_cast<size_t>(g.chunks * cols), NAN);
  const GradOperands<T> p{rows,
                          cols,
                          g.chunk_rows,
                          g.chunks,
                          in_place ? dz.data() : dy.data(),
                          z.data(),
                          with_dz ? dz.data() : nullptr,
                          with_db ? partial.data() : nullptr,
                          dy.stride,
                          z.stride,
                          dz.stride};
  // With half the blocks, each has to go on to further columns or chunks.
  const dim3 grid = grid_of(g), half((grid.x + 1) / 2, (grid.y + 1) / 2);
  if (rows > 0) run_grid(half, block_of(g), preactivation_grad_kernel<T, Act, N>, p);
  if (with_db)
    run_grid(dim3(static_cast<unsigned>(ceil_div(cols, kSumCols))), dim3(kSumCols, kSumRows), sum_rows_kernel<T>,
             partial.data(), g.chunks, cols, cols, db.data());
  for (int64_t j = 0; j < cols; ++j) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const double grad = value_of(dy.at(i)[j]) * Act::template slope<double>(value_of(z.at(i)[j]));
      if (with_dz) check_close(dz.at(i)[j], grad, std::fabs(value_of(dy.at(i)[j])));
      sum += grad, size += std::fabs(grad);
    }
    if (with_db) check_close(db.at(0)[j], sum, size * 0.05);
  }
  dz.check_gaps();
}

// Rows of partial sums with room between the rows, as the tiles of a GEMM write them.
template <class T>
void test_sum_rows(int64_t rows, int64_t cols, int64_t gap) {
  std::mt19937 random(static_cast<unsigned>(rows * 1000 + cols));
  Matrix<compute_t<T>> partial(rows, cols, gap);
  Matrix<T> sums(1, cols, 5);
  partial.fill(random);
  run_grid(dim3(static_cast<unsigned>(std::max<int64_t>(1, cols / kSumCols / 2))), dim3(kSumCols, kSumRows),
           sum_rows_kernel<T>, partial.data(), rows, cols, partial.stride, sums.data());
  for (int64_t j = 0; j < cols; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += value_of(partial.at(i)[j]);
    check_close(sums.at(0)[j], sum, 0);
  }
  sums.check_gaps();
}

template <class T, class Act>
void test_type() {
  constexpr int N = static_cast<int>(kAccessBytes / sizeof(T));
  test_epilogue<T, Act, N>(37, 5 * N, true, true, true);
  test_epilogue<T, Act, N>(5, 300 * N, true, false, false);
  test_epilogue<T, Act, 1>(67, 3, false, true, true);
  test_epilogue<T, Act, 1>(3, 301, true, true, false);
  test_preactivation_grad<T, Act, N>(70, 33 * N, true, true);
  test_preactivation_grad<T, Act, N>(9, N, false, true);
  test_preactivation_grad<T, Act, N>(70, 3 * N, true, true, /*in_place=*/true);
  test_preactivation_grad<T, Act, 1>(300, 37, true, false);
  test_preactivation_grad<T, Act, 1>(1100, 2, true, true);
  test_preactivation_grad<T, Act, 1>(0, 5, false, true);
  test_sum_rows<T>(17, 200, 56);
  test_sum_rows<T>(1, 3, 0);
}

}  // namespace

int main() {
  test_type<float, OnDevice<Activation::gelu>>();
  test_type<float, OnDevice<Activation::none>>();
  test_type<double, OnDevice<Activation::gelu_tanh>>();
  test_type<__nv_bfloat16, OnDevice<Activation::gelu>>();
  test_type<__half, OnDevice<Activation::gelu_tanh>>();
  test_type<__half, OnDevice<Activation::quick_gelu>>();
  test_type<float, OnDevice<Activation::quick_gelu>>();
  return failures != 0;
}
