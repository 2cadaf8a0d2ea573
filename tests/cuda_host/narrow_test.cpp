// The kernels of a narrow stack run on the host, against the same formulas in double.
#include <cmath>
#include <random>

#include "check.h"
#include "warp.h"
// The kernels after what they run on.
#include "kernels/cuda/narrow_stack.cuh"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

template <class T>
constexpr double kUnit = std::is_same_v<T, float>           ? 4e-7
                         : std::is_same_v<T, __nv_bfloat16> ? 8e-3
                                                            : 1e-3;

using Doubles = std::vector<double>;

template <class T>
struct Matrix {
  int64_t rows, cols, stride;
  std::vector<T> memory;

  // All NaN, also the gaps between rows.
  Matrix(int64_t rows, int64_t cols, int64_t gap = 0)
      : rows(rows), cols(cols), stride(cols + gap), memory(static_cast<size_t>(rows * stride + 1), rounded<T>(NAN)) {}
  T* row(int64_t i) { return memory.data() + i * stride; }
  double operator()(int64_t i, int64_t j) const {
    return static_cast<float>(memory[static_cast<size_t>(i * stride + j)]);
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

double act(Activation a, double z) {
  return a == Activation::none ? z : a == Activation::gelu ? gelu(z) : gelu_tanh(z);
}
double slope(Activation a, double z) {
  return a == Activation::none ? 1 : a == Activation::gelu ? gelu_derivative(z) : gelu_tanh_derivative(z);
}

// A stack with its results, and the same in double from the values that forward kept.
template <class T>
struct Example {
  std::vector<int64_t> sizes;
  int64_t rows;
  std::mt19937 random{7};
  std::vector<Matrix<T>> weights, biases, kept, dz, db;
  Matrix<T> x, y, dy, dx;
  std::vector<float> partial;
  NarrowStack stack;

  Example(std::vector<int64_t> s, int64_t rows, Activation activation, bool transposed)
      : sizes(std::move(s)),
        rows(rows),
        x(rows, sizes.front(), 3),
        y(rows, sizes.back(), 1),
        dy(rows, sizes.back(), 2),
        dx(rows, sizes.front(), 5) {
    x.fill(random, 1), dy.fill(random, 1);
    stack.rows = rows, stack.count = static_cast<int>(sizes.size()) - 1, stack.activation = activation;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
      const int64_t in = sizes[i], out = sizes[i + 1];
      weights.emplace_back(transposed ? in : out, transposed ? out : in, 1), biases.emplace_back(1, out),
          db.emplace_back(1, out);
      kept.emplace_back(rows, out), dz.emplace_back(rows, out);
      weights.back().fill(random, 1 / std::sqrt(static_cast<float>(in))), biases.back().fill(random, 0.5);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      NarrowLayer& l = stack.layers[i];
      const int64_t stride = weights[i].stride;
      l.weight = transposed ? ConstMatrix{weights[i].row(0), 1, stride} : ConstMatrix{weights[i].row(0), stride, 1};
      if (i % 3 != 2) l.bias = biases[i].row(0);
      l.kept = kept[i].row(0), l.dz = dz[i].row(0), l.db = db[i].row(0);
      l.in_features = static_cast<int>(sizes[i]), l.out_features = static_cast<int>(sizes[i + 1]);
      l.adds_input = sizes[i] == sizes[i + 1];
    }
    stack.x = {x.row(0), x.stride}, stack.dy = {dy.row(0), dy.stride};
    stack.y = {y.row(0), y.stride}, stack.dx = {dx.row(0), dx.stride};
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

// As narrow_stack.cu launches them, with fewer blocks than tiles.
template <class T, int kWidth>
void test(std::vector<int64_t> sizes, int64_t rows, Activation activation, bool transposed, unsigned blocks) {
  Example<T> e(std::move(sizes), rows, activation, transposed);
  const dim3 threads(kStackWarps * 32);
  run_grid(dim3(blocks), threads, narrow_forward_kernel<T, kWidth, HostWarp>, e.stack);
  e.check_forward();
  const int64_t partials = blocks * kStackWarps;
  e.partial.assign(static_cast<size_t>(partials * e.stack.count * kWidth), NAN);
  e.stack.partial_db = e.partial.data();
  run_grid(dim3(blocks), threads, narrow_backward_kernel<T, kWidth, HostWarp>, e.stack);
  run_grid(dim3(static_cast<unsigned>(e.stack.count)), dim3(kSumCols, kSumRows), narrow_bias_grad_kernel<T>, e.stack,
           kWidth, partials);
  e.check_backward();
  // Again, without what only the first layer needs.
  if (e.stack.count == 1) return;
  e.dz[0] = Matrix<T>(rows, e.sizes[1]);
  const std::vector<T> before = e.dz[1].memory;
  for (T& value : e.dz[1].memory) value = rounded<T>(NAN);
  e.stack.first = 1, e.stack.dx = {}, e.stack.layers[0].db = nullptr, e.stack.layers[0].dz = e.dz[0].row(0);
  run_grid(dim3(blocks), threads, narrow_backward_kernel<T, kWidth, HostWarp>, e.stack);
  for (const T value : e.dz[0].memory) CHECK(std::isnan(static_cast<float>(value)));
  CHECK(std::memcmp(before.data(), e.dz[1].memory.data(), before.size() * sizeof(T)) == 0);
}

// An infinite input stays infinite: what lies beyond a layer's columns must not make it NaN.
template <class T>
void test_infinity() {
  Example<T> e({5, 5, 5, 3}, 4, Activation::gelu, false);
  for (Matrix<T>& w : e.weights)
    for (int64_t n = 0; n < w.rows; ++n)
      for (int64_t k = 0; k < w.cols; ++k) w.row(n)[k] = rounded<T>(0.5f);
  e.x.row(2)[1] = rounded<T>(INFINITY);
  run_grid(dim3(1), dim3(kStackWarps * 32), narrow_forward_kernel<T, 32, HostWarp>, e.stack);
  for (int64_t n = 0; n < 3; ++n) CHECK(std::isinf(e.y(2, n)) && std::isfinite(e.y(1, n)));
  run_grid(dim3(1), dim3(kStackWarps * 32), narrow_backward_kernel<T, 32, HostWarp>, e.stack);
  for (int64_t k = 0; k < 5; ++k) CHECK(std::isfinite(e.dx(2, k)));

  Example<T> infinite({1, 1}, 1, Activation::gelu, false);
  infinite.weights[0].row(0)[0] = rounded<T>(INFINITY), infinite.x.row(0)[0] = rounded<T>(1.0f);
  infinite.partial.assign(kStackWarps * 32, NAN);
  infinite.stack.partial_db = infinite.partial.data();
  run_grid(dim3(1), dim3(kStackWarps * 32), narrow_backward_kernel<T, 32, HostWarp>, infinite.stack);
  run_grid(dim3(1), dim3(kSumCols, kSumRows), narrow_bias_grad_kernel<T>, infinite.stack, 32, int64_t{kStackWarps});
  CHECK(infinite.db[0](0, 0) == infinite.dy(0, 0));
}

StackProblem problem(std::vector<StackLayer>& layers, const std::vector<int64_t>& sizes, DType dtype) {
  layers.resize(sizes.size() - 1);
  for (size_t i = 0; i < layers.size(); ++i) layers[i].in_features = sizes[i], layers[i].out_features = sizes[i + 1];
  StackProblem p;
  p.dtype = dtype, p.layers = layers.data(), p.count = static_cast<int64_t>(layers.size());
  return p;
}
int width(const std::vector<int64_t>& sizes, DType dtype = DType::bf16) {
  std::vector<StackLayer> layers;
  return narrow_width(problem(layers, sizes, dtype));
}

void test_plan() {
  CHECK(width({3, 3, 1}) == 32 && width({16, 32}) == 32 && width({25, 43, 54}) == 64 && width({64, 65}) == 128);
  CHECK(width({128, 129}) == 0 && width({64, 65}, DType::f32) == 0 && width({64, 64}, DType::f32) == 64);
  CHECK(width({64, 64}, DType::f64) == 0 && width({8, 0, 8}) == 0);
  CHECK(width(std::vector<int64_t>(129, 64)) == 64 && width(std::vector<int64_t>(130, 64)) == 0);
  std::vector<StackLayer> layers;
  StackProblem p = problem(layers, {8, 8}, DType::bf16);
  p.concat = true;
  CHECK(narrow_width(p) == 0);
  p.concat = false, layers[0].projection.data = &p;
  CHECK(narrow_width(p) == 0);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    for (const int w : {32, 64, 128}) {
      const int64_t element = element_size(dtype);
      for (int64_t layers = 1; layers <= kMaxStackLayers; ++layers)
        CHECK(narrow_shared_bytes(layers, w, dtype) <= kWeightBytes);
      CHECK(layers_at_once(w, element) >= 1);
    }
  CHECK(sizeof(NarrowStack) + 64 <= 32764);  // what CUDA takes as parameters since 12.1
  const int64_t huge = (int64_t{1} << 40) + 1;
  CHECK(narrow_tiles(huge) == (int64_t{1} << 34) + 1 && narrow_blocks(huge) == kMaxStackBlocks &&
        narrow_blocks(1) == 1);
}

}  // namespace

int main() {
  test_plan();
  test_infinity<__nv_bfloat16>();
  test_infinity<float>();
  test<__nv_bfloat16, 32>({3, 3, 3, 3, 3, 1}, 1, Activation::gelu, false, 1);
  test<__nv_bfloat16, 64>({25, 25, 43, 43, 54, 54}, 70, Activation::gelu, true, 1);
  test<__nv_bfloat16, 64>(std::vector<int64_t>(13, 64), 300, Activation::gelu_tanh, false, 2);  // in two parts
  test<__nv_bfloat16, 128>({100, 128, 128, 128, 7}, 140, Activation::gelu, false, 2);
  test<__half, 32>({16, 16, 16}, 400, Activation::none, false, 3);
  test<float, 32>({17, 32, 32, 5}, 130, Activation::gelu, false, 1);
  test<float, 64>({64, 64, 64, 64, 64, 64, 64, 33}, 129, Activation::gelu_tanh, true, 2);
  return failures != 0;
}
