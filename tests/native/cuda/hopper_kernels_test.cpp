// Runs the Hopper kernels' PTX on the host, launched by CUTLASS's own host code, against the same formulas in double.
// Usage: hopper_kernels_test bf16|f16|f32 PTX...
#include <cmath>
#include <random>

#include "check.h"
#include "formulas.h"
#include "kernels/cuda/hopper/hopper.h"
#include "ptx/instructions.h"
#include "ptx/runtime.h"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

DType dtype;
// Half a unit in the last place of a result. float32 operands are exact in TF32, but their sums are in another order.
double rounding() { return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 2e-6; }
// gelu16.h's largest relative error, which applies to t Φ(−t) ≤ 0.17 or Φ(−t) + t φ(t) ≤ 0.5.
double gelu_error(Activation activation) {
  if (activation != Activation::gelu) return activation == Activation::none ? 0 : 1e-5;
  return dtype == DType::bf16 ? 5.2e-4 : dtype == DType::f16 ? 2e-5 : 6e-5;
}

double get(const void* data, int64_t i) {
  switch (dtype) {
    case DType::bf16: return ptx::from_bf16(static_cast<const uint16_t*>(data)[i]);
    case DType::f16: return ptx::from_f16(static_cast<const uint16_t*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}
void set(void* data, int64_t i, float value) {
  switch (dtype) {
    case DType::bf16: static_cast<uint16_t*>(data)[i] = ptx::to_bf16(value); break;
    case DType::f16: static_cast<uint16_t*>(data)[i] = ptx::to_f16(value); break;
    default: static_cast<float*>(data)[i] = value; break;
  }
}

// Rows between NaNs, aligned as TMA asks. Kernels may touch the rows and nothing beside them.
struct Matrix {
  int64_t rows, cols, stride;
  std::vector<std::byte> memory;
  std::byte* data;

  Matrix(int64_t rows, int64_t cols, int64_t gap, bool writable)
      : rows(rows), cols(cols), stride(cols + gap), memory(bytes(rows * stride) + 32, std::byte{0xff}) {
    data = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16);
    for (int64_t i = 0; i < rows; ++i) {
      const void* const row = data + bytes(i * stride);
      // TMA reads and writes its box row by row, so an allowed range is a row.
      ptx::runtime().allowed.push_back({row, bytes(cols), writable});
    }
  }
  Matrix(const Matrix&) = delete;

  static size_t bytes(int64_t elements) { return static_cast<size_t>(elements * element_size(dtype)); }
  double operator()(int64_t i, int64_t j) const { return get(data, i * stride + j); }
  ConstRowMajor in() const { return {data, stride}; }
  RowMajor out() { return {data, stride}; }

  void fill(std::mt19937& random, float scale) {
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) set(data, i * stride + j, ptx::from_bf16(ptx::to_bf16(normal(random))));
  }

  // `size` is the size of what was added up; `approximation` is the error that the terms had before.
  void check(const Doubles& want, double size, const char* what, double approximation = 0) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < stride; ++j) {
        const double got = (*this)(i, j);
        if (j >= cols) {
          CHECK(std::isnan(got));
          continue;
        }
        const double wanted = want[static_cast<size_t>(i * cols + j)];
        const double error = std::fabs(got - wanted);
        if (error <= 1.01 * rounding() * std::fabs(wanted) + 4e-6 * size + approximation) continue;
        std::printf("%s: %g instead of %g at row %lld, column %lld\n", what, got, wanted, static_cast<long long>(i),
                    static_cast<long long>(j));
        ++failures;
        return;
      }
  }
};

struct Case {
  int64_t m, n, k;
  HopperTile tile;
  int multiprocessors;
  Activation activation;
  bool bias, addend, stores_more;  // z, or the gradient before the activation
  bool sums;
  int64_t gap;
};

// A problem with every operand, the results that the kernel wrote, and the same results in double.
struct Example {
  const Case c;
  const HopperKind kind;
  std::mt19937 random{7};
  const bool forward = kind == HopperKind::forward;
  Matrix a, b, bias, addend, z, out, unscaled, sums;

  Example(HopperKind kind, const Case& c)
      : c(c),
        kind(kind),
        a(c.m, c.k, c.gap, false),
        b(forward ? c.n : c.k, forward ? c.k : c.n, c.gap, false),
        bias(1, c.n, 0, false),
        addend(c.m, c.n, c.gap, false),
        z(c.m, c.n, c.gap, forward),
        out(c.m, c.n, c.gap, true),
        unscaled(c.m, c.n, c.gap, true),
        sums(1, c.n, 0, true) {
    a.fill(random, 1), b.fill(random, 1 / std::sqrt(static_cast<float>(c.k)));
    bias.fill(random, 1), addend.fill(random, 1);
    if (!forward) z.fill(random, 1.5);
  }

  GemmProblem problem() {
    GemmProblem p;
    p.m = c.m, p.n = c.n, p.k = c.k, p.dtype = dtype;
    p.a = {a.data, a.stride, 1};
    p.b = forward ? ConstMatrix{b.data, 1, b.stride} : ConstMatrix{b.data, b.stride, 1};
    if (kind == HopperKind::through_activation) {
      GradientEpilogue& e = p.gradient;
      p.ends_in_gradient = true;
      e.activation = c.activation, e.preactivation = z.in(), e.out = out.out();
      if (c.addend) e.addend = addend.in();
      if (c.stores_more) e.unscaled = unscaled.out();
      if (c.sums) e.column_sums = sums.data;
      return p;
    }
    Epilogue& e = p.epilogue;
    e.out = out.out();
    if (c.addend) e.addend = addend.in();
    if (!forward) return p;
    e.activation = c.activation;
    if (c.bias) e.bias = bias.data;
    if (c.stores_more) e.z = z.out();
    return p;
  }

  void run() {
    const GemmProblem p = problem();
    CHECK(hopper_kind(p) == kind);
    std::vector<float> partial(static_cast<size_t>(hopper_workspace(p, c.tile)) / sizeof(float), NAN);
    ptx::runtime().allowed.push_back({partial.data(), partial.size() * sizeof(float), true});
    const int before = ptx::runtime().launches;
    CHECK(hopper_gemm(p, kind, c.tile, c.multiprocessors, partial.data(), nullptr));
    CHECK(ptx::runtime().launches == before + (p.gradient.column_sums ? 2 : 1));
    ptx::runtime().allowed.pop_back();
  }

  void check() {
    Doubles result, before_activation, column_sums(static_cast<size_t>(c.n));
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = 0; j < c.n; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < c.k; ++k) sum += a(i, k) * (forward ? b(j, k) : b(k, j));
        const double added = c.addend ? addend(i, j) : 0;
        sum += forward ? (c.bias ? bias(0, j) : 0) : added;
        before_activation.push_back(sum);
        if (forward) sum = act(c.activation, sum) + added;
        if (kind == HopperKind::through_activation) sum *= slope(c.activation, z(i, j));
        result.push_back(sum);
        column_sums[static_cast<size_t>(j)] += sum;
      }
    // A gradient is at most 5 or so.
    const double approximation = gelu_error(c.activation) * (forward ? 0.17 : 0.5 * 5);
    out.check(result, 1, "out", approximation);
    if (forward && c.stores_more) z.check(before_activation, 1, "z");
    if (kind != HopperKind::through_activation) return;
    if (c.stores_more) unscaled.check(before_activation, 1, "unscaled");
    // Errors have either sign, as roundings do, since gradients have either sign.
    const double root = std::sqrt(static_cast<double>(c.m));
    if (c.sums) sums.check(column_sums, root, "column sums", approximation * root);
  }
};

void test(HopperKind kind, const Case& c) {
  const int before = failures;
  ptx::runtime().allowed.clear();
  Example first(kind, c), again(kind, c);
  try {
    first.run();
    first.check();
    again.run();  // runs the threads in another order
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    ++failures;
  }
  for (const auto& [one, other] : {std::pair{&first.out, &again.out},
                                   {&first.z, &again.z},
                                   {&first.unscaled, &again.unscaled},
                                   {&first.sums, &again.sums}})
    CHECK(std::memcmp(one->data, other->data, Matrix::bytes(one->rows * one->stride)) == 0);
  if (failures > before)
    std::printf("above: kind %d, %lld×%lld×%lld, tile %d, activation %d\n", static_cast<int>(kind),
                static_cast<long long>(c.m), static_cast<long long>(c.n), static_cast<long long>(c.k),
                static_cast<int>(c.tile), static_cast<int>(c.activation));
}

// Less than a tile; a cluster's block beside the matrix; edges both ways; several tiles a block; many steps along k.
constexpr int64_t kSizes[][3] = {{8, 8, 8},       {1, 264, 72},   {128, 64, 256}, {257, 264, 136},
                                 {130, 520, 200}, {640, 136, 72}, {100, 72, 1000}};

void test_kind(HopperKind kind) {
  int turns[std::size(kHopperTiles)] = {};  // for each tile, so that each tile meets every option
  for (const auto& [m, n, k] : kSizes)
    for (const HopperTile tile : kHopperTiles) {
      if (!has_tile(kind, dtype, tile)) continue;
      int& number = turns[static_cast<int>(tile)];
      for (const Activation activation :
           {Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu, Activation::none}) {
        const bool none = activation == Activation::none;
        // The tree has one node for each option. So every option has to be tested, but not every combination.
        if (none && (kind == HopperKind::through_activation || number % 2 == 0)) continue;
        if (kind == HopperKind::dgrad && activation != Activation::gelu && !none) continue;
        const int turn = number++;
        test(kind, {m, n, k, tile, turn % 3 == 0 ? 132 : 4, activation, turn % 4 != 1, turn % 4 != 2, turn % 4 != 3,
                    turn % 4 != 1, turn % 2 * 8});
      }
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name != "bf16" && name != "f16" && name != "f32") {
    std::printf("usage: hopper_kernels_test bf16|f16|f32 PTX...\n");
    return 2;
  }
  dtype = name == "bf16" ? DType::bf16 : name == "f16" ? DType::f16 : DType::f32;
  for (int i = 2; i < argc; ++i) ptx::load(argv[i]);
  test_kind(HopperKind::forward);
  if (dtype != DType::f32) {
    test_kind(HopperKind::dgrad);
    test_kind(HopperKind::through_activation);
  }
  // Forward with and without z. In 16 bits forward has three tiles, dgrad and through_activation have two; sum_rows
  // is one more kernel.
  CHECK(ptx::runtime().kernels.size() == (dtype == DType::f32 ? 2 * 2 : 2 * 3 + 2 + 2 + 1));
  std::printf("%d launches, %zu kernels\n", ptx::runtime().launches, ptx::runtime().kernels.size());
  return failures != 0;
}
