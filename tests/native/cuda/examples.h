// Operands and results of elementwise passes and narrow stacks, and the same formulas in double.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "check.h"
#include "formulas.h"
#include "kernels/cuda/common/device.cuh"
#include "kernels/cuda/narrow/stack.h"

namespace fastlane::cuda {

template <class T>
constexpr double kUnit = std::is_same_v<T, double>          ? 4e-15
                         : std::is_same_v<T, float>         ? 4e-7
                         : std::is_same_v<T, __nv_bfloat16> ? 8e-3
                                                            : 1e-3;

template <class T>
struct Matrix {
  int64_t rows, cols, stride;
  std::vector<T> memory;

  // Everything is NaN at first, also the gaps between rows.
  Matrix(int64_t rows, int64_t cols, int64_t gap = 0)
      : rows(rows), cols(cols), stride(cols + gap), memory(static_cast<size_t>(rows * stride + 1), rounded<T>(NAN)) {}
  T* row(int64_t i) { return memory.data() + i * stride; }
  double operator()(int64_t i, int64_t j) const {
    return static_cast<compute_t<T>>(memory[static_cast<size_t>(i * stride + j)]);
  }
  void fill(std::mt19937& random, float scale) {
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) row(i)[j] = rounded<T>(normal(random));
  }
  void check(const Doubles& want, double tolerance, const char* what) const {
    double largest = 1e-30, error = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < stride; ++j) {
        const double got = (*this)(i, j);
        if (j >= cols) {
          CHECK(std::isnan(got));
          continue;
        }
        const double wanted = want[static_cast<size_t>(i * cols + j)], difference = std::fabs(got - wanted);
        largest = std::max(largest, std::fabs(wanted));
        error = std::isnan(difference) ? INFINITY : std::max(error, difference);
      }
    if (!(error <= tolerance * largest)) std::printf("%s: error %g of %g\n", what, error, largest);
    CHECK(error <= tolerance * largest);
  }
};

// A stack with its results, and the same results in double from the values that forward kept.
template <class T>
struct Example {
  std::vector<int64_t> sizes;
  int64_t rows;
  std::mt19937 random{7};
  std::vector<Matrix<T>> weights, biases, kept, dz, db, dw;
  Matrix<T> x, y, dy, dx;
  std::vector<float> partial_db, partial_dw;
  NarrowStack stack;

  // Without a gap all rows allow 16-byte accesses, if the sizes do.
  Example(std::vector<int64_t> s, int64_t rows, Activation activation, bool transposed, int64_t gap = 1)
      : sizes(std::move(s)),
        rows(rows),
        x(rows, sizes.front(), gap * 3),
        y(rows, sizes.back(), gap * 1),
        dy(rows, sizes.back(), gap * 2),
        dx(rows, sizes.front(), gap * 5) {
    x.fill(random, 1), dy.fill(random, 1);
    stack.rows = rows, stack.count = static_cast<int>(sizes.size()) - 1, stack.activation = activation;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
      const int64_t in = sizes[i], out = sizes[i + 1];
      weights.emplace_back(transposed ? in : out, transposed ? out : in, gap), biases.emplace_back(1, out),
          db.emplace_back(1, out);
      dw.emplace_back(transposed ? in : out, transposed ? out : in, gap * 3);
      kept.emplace_back(rows, out), dz.emplace_back(rows, out);
      weights.back().fill(random, 1 / std::sqrt(static_cast<float>(in))), biases.back().fill(random, 0.5);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      NarrowLayer& l = stack.layers[i];
      const int64_t stride = weights[i].stride;
      l.weight = transposed ? ConstMatrix{weights[i].row(0), 1, stride} : ConstMatrix{weights[i].row(0), stride, 1};
      if (i % 3 != 2) l.bias = biases[i].row(0);
      l.kept = kept[i].row(0), l.dz = dz[i].row(0), l.db = db[i].row(0);
      l.dweight = {dw[i].row(0), dw[i].stride}, l.dweight_transposed = transposed;
      l.in_features = static_cast<int>(sizes[i]), l.out_features = static_cast<int>(sizes[i + 1]);
      l.adds_input = sizes[i] == sizes[i + 1];
    }
    stack.x = {x.row(0), x.stride}, stack.dy = {dy.row(0), dy.stride};
    stack.y = {y.row(0), y.stride}, stack.dx = {dx.row(0), dx.stride};
  }

  // Memory for the sums of narrow_backward.
  void make_partial_sums(int64_t warps, int width) {
    const int64_t chunks = WgradGeometry(rows, stack.count).chunks;
    partial_db.assign(static_cast<size_t>(warps * stack.count * width), NAN);
    partial_dw.assign(static_cast<size_t>(chunks * stack.count * width * width), NAN);
    stack.partial_db = partial_db.data(), stack.partial_dw = partial_dw.data();
  }

  double weight(size_t layer, int64_t n, int64_t k) const {
    const ConstMatrix& w = stack.layers[layer].weight;
    return static_cast<float>(static_cast<const T*>(w.data)[n * w.row_stride + k * w.col_stride]);
  }
  double z(size_t layer, const Matrix<T>& h, int64_t row, int64_t n) const {
    double sum = stack.layers[layer].bias ? biases[layer](0, n) : 0;
    for (int64_t k = 0; k < sizes[layer]; ++k) sum += h(row, k) * weight(layer, n, k);
    return sum;
  }

  void check_forward() {
    for (size_t i = 0; i < weights.size(); ++i) {
      const Matrix<T>& h = i == 0 ? x : kept[i - 1];
      Doubles want;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < sizes[i + 1]; ++n)
          want.push_back(act(stack.activation, z(i, h, row, n)) + (stack.layers[i].adds_input ? h(row, n) : 0));
      (i + 1 < weights.size() ? kept[i] : y).check(want, kUnit<T>, "layer");
    }
  }

  void check_backward() {
    Doubles dh;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < sizes.back(); ++n) dh.push_back(dy(row, n));
    for (size_t i = weights.size(); i-- > 0;) {
      const Matrix<T>& h = i == 0 ? x : kept[i - 1];
      const int64_t in = sizes[i], out = sizes[i + 1];
      Doubles want_dz, want_db(static_cast<size_t>(out)), next;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t n = 0; n < out; ++n) {
          want_dz.push_back(dh[static_cast<size_t>(row * out + n)] * slope(stack.activation, z(i, h, row, n)));
          want_db[static_cast<size_t>(n)] += want_dz.back();
        }
      const double growth = 2.0 * static_cast<double>(weights.size() - i);
      dz[i].check(want_dz, growth * kUnit<T>, "dz");
      db[i].check(want_db, growth * kUnit<T>, "db");
      Doubles want_dw;
      const bool transposed = stack.layers[i].dweight_transposed;
      for (int64_t r = 0; r < dw[i].rows; ++r)
        for (int64_t c = 0; c < dw[i].cols; ++c) {
          double sum = 0;
          for (int64_t row = 0; row < rows; ++row) sum += dz[i](row, transposed ? c : r) * h(row, transposed ? r : c);
          want_dw.push_back(sum);
        }
      dw[i].check(want_dw, kUnit<T>, "dw");
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < in; ++k) {
          double sum = stack.layers[i].adds_input ? dh[static_cast<size_t>(row * out + k)] : 0;
          for (int64_t n = 0; n < out; ++n) sum += want_dz[static_cast<size_t>(row * out + n)] * weight(i, n, k);
          next.push_back(sum);
        }
      dh = next;
    }
    dx.check(dh, 2.0 * kUnit<T> * static_cast<double>(weights.size() + 1), "dx");
  }
};

}  // namespace fastlane::cuda
