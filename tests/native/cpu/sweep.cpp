// Every function of the kernel table over awkward sizes, layouts and formats, against reference.h; meant to run under
// AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`). A case depends on its number alone:
//
//   sweep                          all cases, on the instruction set that FASTLANE_CPU_ISA names or the best one
//   sweep FROM [TO [STEP]]         this case, or the cases from FROM up to TO, each or every STEP-th
//   sweep --write RECORD [FROM …]  the same, but the results go to a file (record.h)
//   sweep --read RECORD [FROM …]   the same, but the results come from that file
//   sweep --isas                   the instruction sets of this machine
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/schedule.h"
#include "case.h"
#include "operands.h"
#include "reference.h"
#include "stack_case.h"

// Absent in a build without sanitizers (tests/test_qemu.py).
#pragma weak __sanitizer_set_death_callback

// Fresh memory is NaN, so that a read of work memory before a write shows.
extern "C" const char* __asan_default_options() {
  return "malloc_fill_byte=255:max_malloc_fill_size=2000000000:quarantine_size_mb=32";
}

namespace sweep {
namespace {

// Cases are numbered function by function. gemm and layer_backward meet every pair of layouts in every format with
// every activation.
constexpr int64_t kAllCombinations = kLayouts * kLayouts * 4 * kActivations;
constexpr int64_t kGemmCases = kAllCombinations, kPreactivationGradCases = 804;
constexpr int64_t kLayerBackwardCases = kAllCombinations, kEpilogueCases = 804;
constexpr int64_t kFirstLayerBackward = kGemmCases + kPreactivationGradCases;
constexpr int64_t kFirstEpilogue = kFirstLayerBackward + kLayerBackwardCases;
constexpr int64_t kStackCases = 804;
constexpr int64_t kFirstStackForward = kFirstEpilogue + kEpilogueCases;
constexpr int64_t kFirstStackBackward = kFirstStackForward + kStackCases;
constexpr int64_t kFirstGradientGemm = kFirstStackBackward + kStackCases, kGradientGemmCases = kAllCombinations;
constexpr int64_t kFirstMlpBackward = kFirstGradientGemm + kGradientGemmCases, kMlpBackwardCases = 804;
constexpr int64_t kFirstMlpForward = kFirstMlpBackward + kMlpBackwardCases, kMlpForwardCases = 804;
constexpr int64_t kFirstPackedGemm = kFirstMlpForward + kMlpForwardCases, kPackedGemmCases = kAllCombinations / 2;
constexpr int64_t kCases = kFirstPackedGemm + kPackedGemmCases;

constexpr int64_t kSizes[] = {0,  1,  2,  3,  5,  7,  8,  11,  12,  13,  15, 16,
                              17, 24, 31, 33, 48, 63, 65, 100, 129, 193, 385};
constexpr int64_t kLongSizes[] = {1100, 2101};
constexpr double kMaxMultiplyAdds = 1.2e6;

struct Shape {
  int64_t m, n, k;
};

Shape draw_shape(Rng& rng) {
  for (;;) {
    int64_t sizes[3];
    for (int64_t& size : sizes) size = rng.pick(kSizes);
    // Most long sizes are k, whose blocks' sums wait in work memory.
    if (rng.one_in(4)) sizes[rng.one_in(3) ? rng.below(2) : 2] = rng.pick(kLongSizes);
    if (static_cast<double>(sizes[0]) * static_cast<double>(sizes[1]) * static_cast<double>(sizes[2]) <=
        kMaxMultiplyAdds)
      return {sizes[0], sizes[1], sizes[2]};
  }
}

// Empty products; several blocks of columns; k in several slabs for formats of 4, 8 and 2 bytes.
constexpr Shape kGemmShapes[] = {{0, 5, 3},  {5, 0, 3},     {0, 0, 0},       {5, 3, 0},      {17, 65, 0},
                                 {1, 33, 0}, {13, 2100, 9}, {2100, 13, 9},   {48, 1100, 17}, {193, 100, 129},
                                 {1, 1, 1},  {16, 17, 385}, {9, 260, 16500}, {7, 257, 8300}, {3, 257, 33001}};

// B in panels, in memory of exactly their size. Written back from there, it has its values again.
struct PackedOperand {
  std::vector<unsigned char> memory;
  Panels panels;  // absent if the product would drop a value

  PackedOperand(const Case& c, const Operand& b, int64_t n, int64_t k, const Parallel& parallel) {
    PanelsProblem p{n, k, c.dtype, b.matrix(), nullptr};
    memory.resize(static_cast<size_t>(std::max<int64_t>(1, kernels().panel_bytes(p, parallel))), 0xff);
    p.panels = memory.data();
    if (!kernels().pack(p, parallel)) return;
    panels = {memory.data(), p.b.row_stride == 1 || k <= 1, p.b.col_stride == 1 || n <= 1};
    Rng rng(0);
    Operand back(c.dtype, k, n, {"rows", n, 1}, rng);
    kernels().unpack({n, k, c.dtype, memory.data(), back.mutable_row_major().data, 1, n}, parallel);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (back.read(i, j) != b.read(i, j)) fail(c, place("b", i, j) + ": the panels hold another value");
  }
};

void any_gemm_case(const char* name, int64_t number, int64_t own, bool packs) {
  Case c(name, number);
  constexpr int64_t fixed = sizeof kGemmShapes / sizeof *kGemmShapes;
  const bool is_fixed = own < 4 * fixed;
  const auto [m, n, k] = is_fixed ? kGemmShapes[own / 4] : draw_shape(c.rng);
  c.describe("m", m), c.describe("n", n), c.describe("k", k);
  // All pairs of layouts in turn. A long k is cut into slabs only if both operands are packed.
  const bool steps = is_fixed && k > 8000;
  const int64_t a_layout = steps ? 4 : own % kLayouts, b_layout = steps ? 5 : own / kLayouts % kLayouts;

  const double terms = std::sqrt(static_cast<double>(std::max<int64_t>(1, k)));
  Kind kinds[2] = {Kind::normal, Kind::normal};
  double scales[2] = {1, 2 / terms}, sum_scale = 1;
  if (c.kind == Kind::denormals || c.kind == Kind::one_denormal) {
    const int64_t small = c.rng.below(2);
    sum_scale = 0x1p-3;
    kinds[small] = c.kind == Kind::one_denormal ? c.kind : Kind::normal;
    const auto least = static_cast<double>(c.format.min_normal);
    scales[small] = least, scales[1 - small] = sum_scale / least / terms;
  }
  const Operand a = c.input("a", m, k, layout(a_layout, m, k, c.rng), scales[0], kinds[0]);
  const Operand b = c.input("b", k, n, layout(b_layout, k, n, c.rng), scales[1], kinds[1]);
  const Operand bias = c.rng.one_in(2) ? c.input("bias", 1, n, {"rows", n, 1}, sum_scale) : c.absent("bias");
  const Operand addend =
      c.rng.one_in(2) ? c.input("addend", m, n, row_layout(m, n, c.rng), sum_scale) : c.absent("addend");
  const Output z(c, "z", m, n, c.rng.one_in(2)), out(c, "out", m, n, true);

  GemmProblem p;
  p.m = m, p.n = n, p.k = k, p.dtype = c.dtype, p.a = a.matrix(), p.b = b.matrix();
  p.epilogue.activation = c.activation, p.epilogue.bias = bias.data, p.epilogue.addend = addend.row_major();
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    GemmProblem own = p;
    own.epilogue.z = z.of_run(run).mutable_row_major(), own.epilogue.out = out.of_run(run).mutable_row_major();
    if (!packs) {
      kernels().gemm(own, parallel);
      return true;
    }
    const PackedOperand packed(c, b, n, k, parallel);
    own.b_panels = packed.panels;
    if (packed.panels.data) own.b = {};
    kernels().gemm(own, parallel);
    return true;
  });
  if (!checks) return;

  Approx expected = product(Approx(a), Approx(b).transposed(), c.roundoff);
  add(expected, bias, c.roundoff);
  z.check(expected);
  expected = activated(expected, c.activation, c.format);
  add(expected, addend, c.roundoff);
  out.check(expected);
}

void gemm_case(int64_t number) { any_gemm_case("gemm", number, number, /*packs=*/false); }
void packed_gemm_case(int64_t number) {
  any_gemm_case("packed_gemm", number, number - kFirstPackedGemm, /*packs=*/true);
}

// An operand that is activated as it is packed, the epilogue that multiplies by act′ and sums the columns, or both.
void gradient_gemm_case(int64_t number) {
  Case c("gradient_gemm", number);
  c.kind = c.kind == Kind::integers ? c.kind : Kind::normal;
  const int64_t own = number - kFirstGradientGemm;
  constexpr int64_t fixed = sizeof kGemmShapes / sizeof *kGemmShapes;
  const auto [m, n, k] = own < 4 * fixed ? kGemmShapes[own / 4] : draw_shape(c.rng);
  c.describe("m", m), c.describe("n", n), c.describe("k", k);
  const Operand a = c.input("a", m, k, layout(own % kLayouts, m, k, c.rng), 1);
  const Operand b = c.input("b", k, n, layout(own / kLayouts % kLayouts, k, n, c.rng),
                            2 / std::sqrt(static_cast<double>(std::max<int64_t>(1, k))));
  const int64_t which = c.rng.below(3);
  const bool with_gradient = which == 0 || c.rng.one_in(2), has_z = with_gradient && c.activation != Activation::none;
  const Operand z = has_z ? c.input("z", m, n, row_layout(m, n, c.rng), 2) : c.absent("z");
  const Output out(c, "out", m, n, true), sums(c, "column_sums", 1, n, with_gradient);

  GemmProblem p;
  p.m = m, p.n = n, p.k = k, p.dtype = c.dtype;
  p.a = a.matrix(), p.b = b.matrix(), p.ends_in_gradient = with_gradient;
  p.gradient.activation = c.activation, p.gradient.preactivation = z.row_major();
  if (which == 1) p.a_activation = c.activation;
  if (which == 2) p.b_activation = c.activation;
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    GemmProblem own_problem = p;
    (with_gradient ? own_problem.gradient.out : own_problem.epilogue.out) = out.of_run(run).mutable_row_major();
    own_problem.gradient.column_sums = sums.of_run(run).data;
    kernels().gemm(own_problem, parallel);
    return true;
  });
  if (!checks) return;

  // 16-bit activations may be rounded, and denormal ones may be taken for zero.
  const auto multiplied = [&](const Operand& operand, Activation activation) {
    Approx values(operand);
    if (activation == Activation::none) return values;
    values = rounded(activated(values, activation, c.format), c.format);
    for (Real& error : values.error) error += c.format.min_normal;
    return values;
  };
  Approx expected = product(multiplied(a, p.a_activation), multiplied(b, p.b_activation).transposed(), c.roundoff);
  if (with_gradient) expected = preactivation_grad(expected, Approx(z), c.activation, c.format, c.roundoff);
  out.check(expected);
  if (with_gradient) sums.check(column_sums(expected, c.roundoff));
}

void preactivation_grad_case(int64_t number) {
  Case c("preactivation_grad", number);
  const auto [rows, cols, unused] = draw_shape(c.rng);
  c.describe("rows", rows), c.describe("cols", cols);
  const Real scale = c.kind == Kind::denormals ? c.format.min_normal : 1;
  const bool has_z = c.activation != Activation::none;
  const Operand dy = c.input("dy", rows, cols, row_layout(rows, cols, c.rng), scale, c.kind);
  const Operand z = has_z ? c.input("z", rows, cols, row_layout(rows, cols, c.rng), 2) : c.absent("z");
  const bool with_dz = !c.rng.one_in(3);
  const Output dz(c, "dz", rows, cols, with_dz), db(c, "db", 1, cols, !c.rng.one_in(3));
  const bool in_place = with_dz && c.rng.one_in(3);
  c.describe("in_place", in_place);

  PreActivationGradProblem p;
  p.rows = rows, p.cols = cols, p.dtype = c.dtype, p.activation = c.activation;
  p.dy = dy.row_major(), p.z = z.row_major();
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    PreActivationGradProblem own = p;
    Operand own_dz = dz.of_run(run);
    own.dz = own_dz.mutable_row_major(), own.db = db.of_run(run).data;
    if (in_place) {
      own_dz.fill([&](int64_t i, int64_t j) { return dy.read(i, j); });
      own.dy = own_dz.row_major();
    }
    kernels().preactivation_grad(own, parallel);
    return true;
  });
  if (!checks) return;

  const Approx expected = preactivation_grad(Approx(dy), Approx(z), c.activation, c.format, c.roundoff);
  dz.check(expected);
  db.check(column_sums(expected, c.roundoff));
}

// rows × out_features × in_features: empty shapes, and more rows than the largest number of chunks of the smallest
// size holds.
constexpr Shape kBackwardShapes[] = {{0, 5, 3}, {5, 0, 3}, {5, 3, 0}, {0, 0, 0}, {25000, 3, 2}, {1100, 33, 17}};

// Half of the cases of a backward run the schedule, which takes every problem; the others run the kernel alone, which
// may decline.
bool draw_scheduled(Case& c) {
  const bool scheduled = c.rng.one_in(2);
  c.describe("scheduled", scheduled);
  return scheduled;
}

void layer_backward_case(int64_t number) {
  Case c("layer_backward", number);
  constexpr int64_t fixed = sizeof kBackwardShapes / sizeof *kBackwardShapes;
  const int64_t own = number - kFirstLayerBackward;
  const auto [rows, out, in] = own < 4 * fixed ? kBackwardShapes[own / 4] : draw_shape(c.rng);
  c.describe("rows", rows), c.describe("out_features", out), c.describe("in_features", in);
  const bool has_z = c.activation != Activation::none, has_dx = !c.rng.one_in(4), has_dw = !c.rng.one_in(4);
  const bool transposed = c.rng.one_in(2);
  // So many terms of the same value would overflow f16.
  const bool plain = rows > 10000;
  const auto rows_layout = [&](int64_t cols) {
    return plain ? layout(1, rows, cols, c.rng) : row_layout(rows, cols, c.rng);
  };
  c.describe("dweight_transposed", transposed);

  Real dy_scale = 1, other_scale = 1, sum_scale = 1;
  Kind dy_kind = Kind::normal, other_kind = Kind::normal;
  if (c.kind == Kind::denormals || c.kind == Kind::one_denormal) {
    const Kind kind = c.kind == Kind::one_denormal ? c.kind : Kind::normal;
    sum_scale = std::ldexp(Real{1}, -11);
    const bool small_dy = c.rng.one_in(2);
    (small_dy ? dy_kind : other_kind) = kind;
    dy_scale = small_dy ? c.format.min_normal : sum_scale / c.format.min_normal;
    other_scale = small_dy ? sum_scale / c.format.min_normal : c.format.min_normal;
  }
  const Operand dy = c.input("dy", rows, out, rows_layout(out), dy_scale, dy_kind);
  const Operand z = has_z ? c.input("z", rows, out, rows_layout(out), 2) : c.absent("z");
  const Strides x_strides = layout(plain ? 1 : number % kLayouts, rows, in, c.rng),
                weight_strides = layout(number / kLayouts % kLayouts, out, in, c.rng);
  const Operand x = has_dw ? c.input("x", rows, in, x_strides, other_scale, other_kind) : c.absent("x");
  const Operand weight =
      has_dx ? c.input("weight", out, in, weight_strides, other_scale, other_kind) : c.absent("weight");
  const Operand shortcut = has_dx && c.rng.one_in(2) ? c.input("shortcut_grad", rows, in, rows_layout(in), sum_scale)
                                                     : c.absent("shortcut_grad");
  const Output dx(c, "dx", rows, in, has_dx), db(c, "db", 1, out, !c.rng.one_in(3)),
      dweight(c, "dweight", transposed ? in : out, transposed ? out : in, has_dw);

  LayerBackwardProblem p;
  p.rows = rows, p.out_features = out, p.in_features = has_dx || has_dw ? in : 0;
  p.dtype = c.dtype, p.activation = c.activation;
  p.dy = dy.row_major(), p.z = z.row_major(), p.x = x.matrix(), p.weight = weight.matrix();
  p.shortcut_grad = shortcut.row_major(), p.dweight_transposed = transposed;
  const bool scheduled = draw_scheduled(c);
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    LayerBackwardProblem own = p;
    own.dx = dx.of_run(run).mutable_row_major(), own.dweight = dweight.of_run(run).mutable_row_major();
    own.db = db.of_run(run).data;
    if (!scheduled) return kernels().layer_backward(own, parallel);
    layer_backward(kernels(), own, parallel);
    return true;
  });
  if (!checks) return;

  Approx dz = preactivation_grad(Approx(dy), Approx(z), c.activation, c.format, c.roundoff);
  db.check(column_sums(dz, c.roundoff));
  if (has_z) dz = rounded(dz, c.format);
  if (has_dx) {
    Approx expected = product(dz, Approx(weight).transposed(), c.roundoff);
    add(expected, shortcut, c.roundoff);
    dx.check(expected);
  }
  if (has_dw) {
    const Approx expected = product(dz.transposed(), Approx(x).transposed(), c.roundoff);
    dweight.check(transposed ? expected.transposed() : expected);
  }
}

// The hidden activations, rounded as they are stored.
Approx hidden_activations(const Approx& z, const Case& c) {
  Approx activations = rounded(activated(z, c.activation, c.format), c.format);
  for (Real& error : activations.error) error += c.format.min_normal;
  return activations;
}

void mlp_forward_case(int64_t number) {
  Case c("mlp_forward", number);
  c.kind = Kind::normal, c.roundoff = c.format.compute_roundoff;
  auto [rows, hidden, in] = draw_shape(c.rng);
  const int64_t out = c.rng.pick(kSizes);
  if (static_cast<double>(rows) * static_cast<double>(hidden) * static_cast<double>(out) > kMaxMultiplyAdds) rows = 3;
  c.describe("rows", rows), c.describe("in", in), c.describe("hidden", hidden), c.describe("out", out);
  const auto optional_bias = [&](const char* name, int64_t features) {
    return c.rng.one_in(2) ? c.input(name, 1, features, {"rows", features, 1}, 1) : c.absent(name);
  };
  const Operand x = c.input("x", rows, in, layout(number % kLayouts, rows, in, c.rng), 1);
  const Operand w1 = c.input("w1", hidden, in, layout(number / 2 % kLayouts, hidden, in, c.rng), Real{0.1});
  const Operand w2 = c.input("w2", out, hidden, layout(number / 3 % kLayouts, out, hidden, c.rng), Real{0.1});
  const Operand b1 = optional_bias("b1", hidden), b2 = optional_bias("b2", out);
  const Operand residual =
      c.rng.one_in(2) ? c.input("residual", rows, out, row_layout(rows, out, c.rng), 1) : c.absent("residual");
  const Output z(c, "z", rows, hidden, c.rng.one_in(2)), y(c, "y", rows, out, true);

  MlpProblem p;
  p.rows = rows, p.in_features = in, p.hidden = hidden, p.out_features = out;
  p.dtype = c.dtype, p.activation = c.activation;
  p.x = x.matrix(), p.fc1_weight.matrix = w1.matrix(), p.fc2_weight.matrix = w2.matrix();
  p.fc1_bias = b1.data, p.fc2_bias = b2.data, p.residual = residual.row_major();
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    MlpProblem own = p;
    own.z = z.of_run(run).mutable_row_major(), own.y = y.of_run(run).mutable_row_major();
    mlp_forward(kernels(), own, parallel);
    return true;
  });
  if (!checks) return;

  Approx expected = product(Approx(x), Approx(w1), c.roundoff);
  add(expected, b1, c.roundoff);
  z.check(expected);
  expected = product(hidden_activations(expected, c), Approx(w2), c.roundoff);
  add(expected, b2, c.roundoff);
  add(expected, residual, c.roundoff);
  y.check(expected);
}

void mlp_backward_case(int64_t number) {
  Case c("mlp_backward", number);
  c.kind = Kind::normal, c.roundoff = c.format.compute_roundoff;
  auto [rows, hidden, in] = draw_shape(c.rng);
  const int64_t out = c.rng.pick(kSizes);
  if (static_cast<double>(rows) * static_cast<double>(hidden) * static_cast<double>(out) > kMaxMultiplyAdds) rows = 3;
  c.describe("rows", rows), c.describe("in", in), c.describe("hidden", hidden), c.describe("out", out);
  const bool has_dx = c.rng.one_in(2), has_dw1 = !c.rng.one_in(4), has_db1 = c.rng.one_in(2);
  const bool has_dw2 = !c.rng.one_in(4), has_dz = has_dx || has_dw1 || has_db1;
  const bool transposed1 = c.rng.one_in(2), transposed2 = c.rng.one_in(2);
  const auto rows_layout = [&](int64_t cols) { return row_layout(rows, cols, c.rng); };
  const Operand dy = c.input("dy", rows, out, rows_layout(out), 1);
  const Operand z = c.input("z", rows, hidden, rows_layout(hidden), 2);
  const Operand x = has_dw1 ? c.input("x", rows, in, layout(number % kLayouts, rows, in, c.rng), 1) : c.absent("x");
  const Operand w1 = has_dx ? c.input("w1", hidden, in, layout(number / 2 % kLayouts, hidden, in, c.rng), Real{0.1})
                            : c.absent("w1");
  const Operand w2 = has_dz ? c.input("w2", out, hidden, layout(number / 3 % kLayouts, out, hidden, c.rng), Real{0.1})
                            : c.absent("w2");
  const Operand shortcut =
      has_dx && c.rng.one_in(2) ? c.input("shortcut_grad", rows, in, rows_layout(in), 1) : c.absent("shortcut_grad");
  const Output dx(c, "dx", rows, in, has_dx), db1(c, "db1", 1, hidden, has_db1),
      db2(c, "db2", 1, out, c.rng.one_in(2)),
      dw1(c, "dw1", transposed1 ? in : hidden, transposed1 ? hidden : in, has_dw1),
      dw2(c, "dw2", transposed2 ? hidden : out, transposed2 ? out : hidden, has_dw2);

  MlpBackwardProblem p;
  p.rows = rows, p.in_features = in, p.hidden = hidden, p.out_features = out;
  p.dtype = c.dtype, p.activation = c.activation;
  p.dy = dy.row_major(), p.z = z.row_major(), p.x = x.matrix(), p.fc1_weight = w1.matrix(),
  p.fc2_weight = w2.matrix();
  p.shortcut_grad = shortcut.row_major(), p.dfc1_transposed = transposed1, p.dfc2_transposed = transposed2;
  const bool scheduled = draw_scheduled(c);
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    MlpBackwardProblem own = p;
    own.dx = dx.of_run(run).mutable_row_major(), own.dfc1_weight = dw1.of_run(run).mutable_row_major();
    own.dfc2_weight = dw2.of_run(run).mutable_row_major();
    own.dfc1_bias = db1.of_run(run).data, own.dfc2_bias = db2.of_run(run).data;
    if (!scheduled) return kernels().mlp_backward(own, parallel);
    mlp_backward(kernels(), own, parallel);
    return true;
  });
  if (!checks) return;
  const auto stored = [&](const Approx& gradient, bool transposed) {
    return transposed ? gradient.transposed() : gradient;
  };
  const Approx exact_dy(dy);
  db2.check(column_sums(exact_dy, c.roundoff));
  if (has_dw2) {
    const Approx activations = hidden_activations(Approx(z), c);
    dw2.check(stored(product(exact_dy.transposed(), activations.transposed(), c.roundoff), transposed2));
  }
  if (!has_dz) return;
  Approx dz = rounded(product(exact_dy, Approx(w2).transposed(), c.roundoff), c.format);
  dz = preactivation_grad(dz, Approx(z), c.activation, c.format, c.roundoff);
  db1.check(column_sums(dz, c.roundoff));
  dz = rounded(dz, c.format);
  if (has_dx) {
    Approx expected = product(dz, Approx(w1).transposed(), c.roundoff);
    add(expected, shortcut, c.roundoff);
    dx.check(expected);
  }
  if (has_dw1) dw1.check(stored(product(dz.transposed(), Approx(x).transposed(), c.roundoff), transposed1));
}

// The product lies in memory of its own, or in the memory of z or of the result.
void epilogue_case(int64_t number) {
  Case c("epilogue", number);
  const auto [m, n, unused] = draw_shape(c.rng);
  c.describe("m", m), c.describe("n", n);
  const Real scale = c.kind == Kind::denormals ? c.format.min_normal : 2;
  const Operand product = c.input("product", m, n, row_layout(m, n, c.rng), scale, c.kind);
  const Operand bias = c.rng.one_in(2) ? c.input("bias", 1, n, {"rows", n, 1}, scale) : c.absent("bias");
  const Operand addend =
      c.rng.one_in(2) ? c.input("addend", m, n, row_layout(m, n, c.rng), scale) : c.absent("addend");
  const Output z(c, "z", m, n, c.rng.one_in(2)), out(c, "out", m, n, true);
  const bool in_place = c.rng.one_in(2);
  c.describe("in_place", in_place);

  EpilogueProblem p;
  p.m = m, p.n = n, p.dtype = c.dtype;
  p.epilogue.activation = c.activation, p.epilogue.bias = bias.data, p.epilogue.addend = addend.row_major();
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    EpilogueProblem own = p;
    own.epilogue.z = z.of_run(run).mutable_row_major(), own.epilogue.out = out.of_run(run).mutable_row_major();
    const Operand& shared = z.present() ? z.of_run(run) : out.of_run(run);
    if (in_place)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) write(shared.at(i, j), c.dtype, product.read(i, j));
    own.product = in_place ? shared.row_major() : product.row_major();
    kernels().epilogue(own, parallel);
    return true;
  });
  if (!checks) return;

  Approx expected{product};
  add(expected, bias, c.roundoff);
  z.check(expected);
  expected = activated(expected, c.activation, c.format);
  add(expected, addend, c.roundoff);
  out.check(expected);
}

void run_case(int64_t number) {
  const auto run = number < kGemmCases            ? gemm_case
                   : number < kFirstLayerBackward ? preactivation_grad_case
                   : number < kFirstEpilogue      ? layer_backward_case
                   : number < kFirstStackForward  ? epilogue_case
                   : number < kFirstStackBackward ? stack_forward_case
                   : number < kFirstGradientGemm  ? stack_backward_case
                   : number < kFirstMlpBackward   ? gradient_gemm_case
                   : number < kFirstMlpForward    ? mlp_backward_case
                   : number < kFirstPackedGemm    ? mlp_forward_case
                                                  : packed_gemm_case;
  run(number);
}

void print_running_case() {
  if (running != nullptr) std::fprintf(stderr, "%s\n", running->line().c_str());
}

int run(std::vector<std::string> arguments) {
  if (arguments == std::vector<std::string>{"--isas"}) {
    for (const std::string& isa : supported_isas()) std::puts(isa.c_str());
    return 0;
  }
  isa_of_results = kernels().isa;
  if (arguments.size() >= 2 && (arguments[0] == "--write" || arguments[0] == "--read")) {
    isa_of_results = open_record(arguments[1], arguments[0] == "--write");
    arguments.erase(arguments.begin(), arguments.begin() + 2);
  }
  if (&__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(print_running_case);
  const auto number = [&](size_t i, int64_t otherwise) {
    return arguments.size() > i ? int64_t{std::stoll(arguments[i])} : otherwise;
  };
  const int64_t begin = number(0, 0), end = number(1, arguments.empty() ? kCases : begin + 1), step = number(2, 1);
  if (step < 1 || begin < 0 || begin >= kCases)
    throw std::runtime_error("expected FROM below " + std::to_string(kCases) + " and STEP from 1 on");
  int64_t cases = 0;
  for (int64_t i = begin; i < std::min(end, kCases); i += step, ++cases) run_case(i);
  record.close();
  if (record.writes()) {
    std::printf("%s: %lld cases recorded\n", isa_of_results.c_str(), static_cast<long long>(cases));
    return 0;
  }
  std::printf(
      "%s: %lld cases, %lld of them declined; largest error beyond the last rounding: %.2Lf of its tolerance (%s)\n",
      isa_of_results.c_str(), static_cast<long long>(cases), static_cast<long long>(declined), largest.error,
      largest.where.c_str());
  return 0;
}

}  // namespace
}  // namespace sweep

extern "C" void __ubsan_on_report() { sweep::print_running_case(); }

int main(int argc, char** argv) {
  try {
    return sweep::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "sweep: %s\n", error.what());
    return 2;
  }
}
