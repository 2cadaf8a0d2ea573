// Runs the launchers of our own kernels on the host, with the kernels as PTX: tests the grids, shared memory and
// parameters that a launcher gives. Usage: launches_test PTX...
#include "examples.h"
#include "kernels/cuda/elementwise/elementwise.h"
#include "ptx/runtime.h"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

template <class T>
constexpr DType kDType = std::is_same_v<T, double>          ? DType::f64
                         : std::is_same_v<T, float>         ? DType::f32
                         : std::is_same_v<T, __nv_bfloat16> ? DType::bf16
                                                            : DType::f16;

template <class V>
void allow(const std::vector<V>& memory, bool writable) {
  ptx::runtime().allowed.push_back({memory.data(), memory.size() * sizeof(V), writable});
}
template <class T>
void allow(std::initializer_list<Matrix<T>*> matrices, bool writable) {
  for (const Matrix<T>* m : matrices) allow(m->memory, writable);
}

// A gap of 8 leaves rows aligned to 16 bytes, a gap of 3 does not.
template <class T>
void test_epilogue(int64_t rows, int64_t cols, int64_t gap, Activation activation, bool with_all) {
  std::mt19937 random(7);
  Matrix<T> product(rows, cols, gap), bias(1, cols), addend(rows, cols, gap), z(rows, cols, gap),
      out(rows, cols, gap);
  product.fill(random, 1), bias.fill(random, 1), addend.fill(random, 1);
  ptx::runtime().allowed.clear();
  allow({&product, &bias, &addend}, false), allow({&z, &out}, true);
  EpilogueProblem p;
  p.m = rows, p.n = cols, p.dtype = kDType<T>, p.product = {product.row(0), product.stride};
  Epilogue& e = p.epilogue;
  e.activation = activation, e.out = {out.row(0), out.stride};
  if (with_all) e.bias = bias.row(0), e.addend = {addend.row(0), addend.stride}, e.z = {z.row(0), z.stride};
  epilogue(p, nullptr);
  Doubles want, want_z;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      want_z.push_back(product(i, j) + (with_all ? bias(0, j) : 0));
      want.push_back(act(activation, want_z.back()) + (with_all ? addend(i, j) : 0));
    }
  out.check(want, kUnit<T>, "epilogue");
  if (with_all) z.check(want_z, kUnit<T>, "epilogue's z");
}

template <class T>
void test_preactivation_grad(int64_t rows, int64_t cols, int64_t gap, Activation activation, bool with_dz) {
  std::mt19937 random(7);
  Matrix<T> dy(rows, cols, gap), z(rows, cols, gap), dz(rows, cols, gap), db(1, cols);
  dy.fill(random, 1), z.fill(random, 1);
  ptx::runtime().allowed.clear();
  allow({&dy, &z}, false), allow({&dz, &db}, true);
  PreActivationGradProblem p;
  p.rows = rows, p.cols = cols, p.dtype = kDType<T>, p.activation = activation, p.db = db.row(0);
  p.dy = {dy.row(0), dy.stride}, p.z = {z.row(0), z.stride};
  if (with_dz) p.dz = {dz.row(0), dz.stride};
  std::vector<double> workspace((preactivation_grad_workspace(p) + sizeof(double) - 1) / sizeof(double), NAN);
  allow(workspace, true);
  preactivation_grad(p, workspace.data(), nullptr);
  Doubles want, sums(static_cast<size_t>(cols));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      want.push_back(dy(i, j) * slope(activation, z(i, j)));
      sums[static_cast<size_t>(j)] += want.back();
    }
  if (with_dz) dz.check(want, kUnit<T>, "dz");
  db.check(sums, 4 * kUnit<T>, "db");
}

template <class T>
void test_stack(const std::vector<int64_t>& sizes, int width, int64_t rows, Activation activation, bool transposed,
                int64_t gap = 1) {
  Example<T> e(sizes, rows, activation, transposed, gap);
  ptx::runtime().allowed.clear();
  for (auto* matrices : {&e.weights, &e.biases})
    for (Matrix<T>& m : *matrices) allow({&m}, false);
  for (auto* matrices : {&e.kept, &e.dz, &e.db, &e.dw})
    for (Matrix<T>& m : *matrices) allow({&m}, true);
  allow({&e.x, &e.dy}, false), allow({&e.y, &e.dx}, true);
  narrow_forward(e.stack, width, kDType<T>, nullptr);
  e.check_forward();
  e.make_partial_sums(narrow_partial_sums(rows, width, kDType<T>), width);
  allow(e.partial_db, true), allow(e.partial_dw, true);
  narrow_backward(e.stack, width, kDType<T>, nullptr);
  e.check_backward();
  if (e.stack.count == 1) return;

  // Runs again without one layer's dW and another layer's db, then without any.
  const auto is_nan = [](const std::vector<T>& memory) {
    return std::all_of(memory.begin(), memory.end(), [](T x) { return std::isnan(static_cast<compute_t<T>>(x)); });
  };
  const std::vector<T> dw = e.dw[1].memory, db = e.db[0].memory, dx = e.dx.memory;
  const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
  };
  const auto run_again = [&] {
    for (Matrix<T>* m : {&e.dw[0], &e.dw[1], &e.db[0], &e.db[1], &e.dx})
      std::fill(m->memory.begin(), m->memory.end(), rounded<T>(compute_t<T>(NAN)));
    narrow_backward(e.stack, width, kDType<T>, nullptr);
    CHECK(same(e.dx.memory, dx) && is_nan(e.dw[0].memory) && is_nan(e.db[1].memory));
  };
  e.stack.layers[0].dweight = {}, e.stack.layers[1].db = nullptr;
  run_again();
  CHECK(same(e.dw[1].memory, dw) && same(e.db[0].memory, db));
  e.stack.partial_dw = nullptr;
  for (NarrowLayer& l : e.stack.layers) l.dweight = {};
  run_again();
  CHECK(is_nan(e.dw[1].memory) && same(e.db[0].memory, db));
  e.stack.partial_db = nullptr;
  for (NarrowLayer& l : e.stack.layers) l.db = nullptr;
  run_again();
  CHECK(is_nan(e.db[0].memory));
}

template <class T>
void test_passes() {
  for (const Activation activation :
       {Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu}) {
    test_epilogue<T>(37, 80, 8, activation, true);
    test_epilogue<T>(300, 9, 3, activation, true);
    test_preactivation_grad<T>(1100, 16, 8, activation, true);
    test_preactivation_grad<T>(70, 33, 3, activation, true);
  }
  test_epilogue<T>(5, 2000, 8, Activation::none, false);
  test_preactivation_grad<T>(9, 600, 8, Activation::none, false);
}

// Includes more layers of 128 features than fit into shared memory at a time.
template <class T>
void test_stacks_of_16_bits() {
  test_stack<T>({3, 3, 3, 1}, 32, 1, Activation::gelu, false);
  test_stack<T>({25, 43, 43, 54}, 64, 140, Activation::gelu_tanh, true);
  test_stack<T>({100, 128, 128, 128, 7}, 128, 70, Activation::gelu, false);
  test_stack<T>({64, 64, 64}, 64, 300, Activation::gelu, false, /*gap=*/0);
  test_stack<T>({128, 128, 128, 128}, 128, 150, Activation::none, false, /*gap=*/0);
}

}  // namespace

int main(int argc, char** argv) {
  size_t kernels = 0;
  for (int i = 1; i < argc; ++i) kernels += ptx::load(argv[i]);
  try {
    test_passes<float>();
    test_passes<double>();
    test_passes<__nv_bfloat16>();
    test_passes<__half>();
    test_stacks_of_16_bits<__nv_bfloat16>();
    test_stacks_of_16_bits<__half>();
    test_stack<float>({17, 32, 32, 5}, 32, 130, Activation::gelu, false);
    test_stack<float>({64, 64, 64, 64, 33}, 64, 70, Activation::gelu_tanh, true);
    test_stack<float>({64, 64, 64}, 64, 130, Activation::gelu, false, /*gap=*/0);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  CHECK(ptx::runtime().kernels.size() == kernels);
  std::printf("%d launches, %zu kernels of %zu\n", ptx::runtime().launches, ptx::runtime().kernels.size(), kernels);
  return failures != 0;
}
