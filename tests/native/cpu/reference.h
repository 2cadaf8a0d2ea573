// What the kernels should compute, plainly and in long double, and how far from this a right result may be.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "operands.h"

namespace sweep {

// A matrix, row by row, and for each element the largest error of its computation without the final rounding.
struct Approx {
  int64_t rows = 0, cols = 0;
  std::vector<Real> value, error;

  Approx(int64_t row_count, int64_t col_count)
      : rows(row_count), cols(col_count), value(static_cast<size_t>(rows * cols)), error(value.size()) {}
  explicit Approx(const Operand& exact) : Approx(exact.rows, exact.cols) { value = exact.values; }

  Approx transposed() const {
    Approx t(cols, rows);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        const auto from = static_cast<size_t>(i * cols + j), to = static_cast<size_t>(j * rows + i);
        t.value[to] = value[from], t.error[to] = error[from];
      }
    return t;
  }
};

// The error of a sum of `count` terms, in units of the roundoff: the kernels add chains of 64, then the chains' sums,
// then the lanes' or chunks'.
inline Real sum_error(int64_t count) { return 24 + static_cast<Real>(std::min<int64_t>(count, 64) + count / 64); }

// What a sum loses at each term below the normal numbers of the type that has this roundoff.
inline Real smallest_step(Real roundoff) {
  return std::ldexp(Real{1}, roundoff == std::ldexp(Real{1}, -53) ? -1074 : -149);
}

// a bᵀ. Either operand may be a result with an error of its own.
inline Approx product(const Approx& a, const Approx& b, Real roundoff) {
  Approx c(a.rows, b.rows);
  const auto k = static_cast<size_t>(a.cols);
  const Real relative = roundoff * sum_error(a.cols);
  std::vector<Real> spread(a.value.size());
  for (size_t i = 0; i < spread.size(); ++i) spread[i] = std::fabs(a.value[i]) * relative + a.error[i];
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < b.rows; ++j) {
      const Real *ai = a.value.data() + static_cast<size_t>(i) * k, *si = spread.data() + static_cast<size_t>(i) * k,
                 *bj = b.value.data() + static_cast<size_t>(j) * k, *ej = b.error.data() + static_cast<size_t>(j) * k;
      Real sum = 0, error = static_cast<Real>(a.cols) * smallest_step(roundoff);
      for (size_t step = 0; step < k; ++step) {
        sum += ai[step] * bj[step];
        error += si[step] * (std::fabs(bj[step]) + ej[step]) + std::fabs(ai[step]) * ej[step];
      }
      const auto element = static_cast<size_t>(i * c.cols + j);
      c.value[element] = sum, c.error[element] = error;
    }
  return c;
}

// `terms` has the matrix's columns, and its rows or a single row. Without data `terms` adds nothing.
inline void add(Approx& sum, const Operand& terms, Real roundoff) {
  if (terms.values.empty()) return;
  for (size_t i = 0; i < sum.value.size(); ++i) {
    sum.value[i] += terms.values[i % terms.values.size()];
    sum.error[i] += roundoff * (std::fabs(sum.value[i]) + sum.error[i]);
  }
}

inline void add(Approx& sum, const Approx& terms, Real roundoff) {
  for (size_t i = 0; i < sum.value.size(); ++i) {
    sum.value[i] += terms.value[i], sum.error[i] += terms.error[i];
    sum.error[i] += roundoff * (std::fabs(sum.value[i]) + sum.error[i]);
  }
}

inline Real normal_cdf(Real z) { return std::erfc(-z * std::sqrt(Real{0.5})) / 2; }
inline Real normal_density(Real z) {
  static const Real inv_sqrt_2pi = 1 / std::sqrt(2 * std::acos(Real{-1}));
  return inv_sqrt_2pi * std::exp(-z * z / 2);
}
// gelu_tanh is z σ(2u). This gives 2u and its derivative.
inline Real twice_u(Real z) {
  static const Real scale = 2 * std::sqrt(2 / std::acos(Real{-1}));
  return scale * (z + Real{0.044715L} * z * z * z);
}
inline Real twice_u_slope(Real z) {
  static const Real scale = 2 * std::sqrt(2 / std::acos(Real{-1}));
  return scale * (1 + 3 * Real{0.044715L} * z * z);
}
constexpr Real kQuickScale = 1.702L;  // of quick_gelu, z σ(1.702 z)
inline Real logistic(Real x) { return 1 / (1 + std::exp(-x)); }

inline Real activate(Activation activation, Real z) {
  switch (activation) {
    case Activation::none: return z;
    case Activation::gelu: return z * normal_cdf(z);
    case Activation::gelu_tanh: return z * logistic(twice_u(z));
    case Activation::quick_gelu: break;
  }
  return z * logistic(kQuickScale * z);
}
inline Real activation_slope(Activation activation, Real z) {
  switch (activation) {
    case Activation::none: return 1;
    case Activation::gelu: return normal_cdf(z) + z * normal_density(z);
    case Activation::gelu_tanh:
    case Activation::quick_gelu: break;
  }
  const bool is_tanh = activation == Activation::gelu_tanh;
  const Real s = logistic(is_tanh ? twice_u(z) : kQuickScale * z);
  return s + z * s * (1 - s) * (is_tanh ? twice_u_slope(z) : kQuickScale);
}

// act(z); the steepest slope is below 1.2.
inline Approx activated(Approx z, Activation activation, const Format& format) {
  if (activation == Activation::none) return z;
  for (size_t i = 0; i < z.value.size(); ++i) {
    z.error[i] = Real{1.2} * z.error[i] + format.gelu_error * std::fabs(z.value[i]);
    z.value[i] = activate(activation, z.value[i]);
  }
  return z;
}

// dy ⊙ act′(z); act″ and act′ are below 1.2. Without an activation z has no values.
inline Approx preactivation_grad(const Approx& dy, const Approx& z, Activation activation, const Format& format,
                                 Real roundoff) {
  Approx dz = dy;
  if (activation == Activation::none) return dz;
  for (size_t i = 0; i < dz.value.size(); ++i) {
    const Real slope_error = 16 * roundoff + Real{1.2} * z.error[i];
    dz.error[i] =
        slope_error * std::fabs(dy.value[i]) + (Real{1.2} + slope_error) * dy.error[i] + format.min_denormal;
    dz.value[i] *= activation_slope(activation, z.value[i]);
  }
  return dz;
}

// Adds the error of storing the matrix in the format.
inline Approx rounded(Approx a, const Format& format) {
  for (size_t i = 0; i < a.value.size(); ++i)
    a.error[i] += format.roundoff * (std::fabs(a.value[i]) + a.error[i]) + format.min_denormal;
  return a;
}

inline Approx column_sums(const Approx& a, Real roundoff) {
  Approx sums(1, a.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.cols; ++j) {
      const auto from = static_cast<size_t>(i * a.cols + j), to = static_cast<size_t>(j);
      sums.value[to] += a.value[from];
      sums.error[to] += a.error[from] + roundoff * sum_error(a.rows) * std::fabs(a.value[from]);
    }
  return sums;
}

}  // namespace sweep
