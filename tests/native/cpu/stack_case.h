// Cases of whole stacks: what a case draws, and the layers one after the other in long double.
#pragma once

#include <vector>

#include "kernels/stack_reads.h"
#include "case.h"

namespace sweep {

constexpr int64_t kStackSizes[] = {0, 1, 2, 3, 5, 8, 12, 13, 17, 31, 33, 48, 65, 100};
constexpr int64_t kStackRows[] = {0, 1, 2, 3, 7, 12, 16, 17, 24, 31, 48, 64, 65, 100, 193, 385, 511, 512, 1100};
constexpr double kMaxStackMultiplyAdds = 1.2e6;

struct DrawnLayer {
  int64_t in, out;
  bool adds_input = false, projected = false;
  Operand weight, bias, projection, projection_bias;

  StackLayer plain() const {
    StackLayer l;
    l.in_features = in, l.out_features = out, l.adds_input = adds_input;
    l.weight = weight.matrix(), l.bias = bias.data;
    l.projection = projection.matrix(), l.projection_bias = projection_bias.data;
    // A matrix without features has no memory, but is not absent.
    if (projected && l.projection.data == nullptr) l.projection.data = this;
    return l;
  }
};

// What forward and backward cases have in common.
struct DrawnStack {
  int64_t rows, in;
  bool concat;
  std::vector<DrawnLayer> layers;

  explicit DrawnStack(Case& c) {
    enum { identity, projection, concatenation, none };
    const int64_t shortcut = c.rng.below(4);
    concat = shortcut == concatenation;
    // Through more layers integers would grow beyond what the formats hold exactly.
    const int64_t count = 1 + c.rng.below(c.kind == Kind::integers ? 2 : 4);
    const bool equal = c.rng.one_in(2), rows_of_weights = c.rng.one_in(2);
    double multiply_adds;
    do {
      layers.resize(static_cast<size_t>(count));
      rows = c.rng.pick(kStackRows), in = c.rng.pick(kStackSizes);
      multiply_adds = 0;
      int64_t features = in;
      for (DrawnLayer& l : layers) {
        l.in = features, l.out = equal ? in : c.rng.pick(kStackSizes);
        features = concat ? features + l.out : l.out;
        multiply_adds += static_cast<double>(rows * l.in * l.out);
      }
    } while (multiply_adds > kMaxStackMultiplyAdds);
    c.describe("rows", rows), c.describe("in", in), c.describe("concat", concat);

    const auto draw = [&](const char* name, const DrawnLayer& l) {
      const int64_t choice = c.rng.below(rows_of_weights ? 2 : kLayouts);
      return c.input(name, l.out, l.in, layout(choice, l.out, l.in, c.rng), 1 / std::sqrt(static_cast<double>(l.in)));
    };
    const auto draw_bias = [&](const char* name, const DrawnLayer& l) {
      return c.rng.one_in(2) ? c.absent(name) : c.input(name, 1, l.out, {"rows", l.out, 1}, 1);
    };
    for (DrawnLayer& l : layers) {
      c.describe("out", l.out);
      l.weight = draw("weight", l), l.bias = draw_bias("bias", l);
      l.projected = shortcut == projection && (l.in != l.out || c.rng.one_in(4));
      l.adds_input = !l.projected && l.in == l.out && (shortcut == identity || shortcut == projection);
      l.projection = l.projected ? draw("projection", l) : c.absent("projection");
      l.projection_bias = l.projected ? draw_bias("projection_bias", l) : c.absent("projection_bias");
    }
  }

  int64_t out_features(size_t i) const { return layers[i].out + (concat ? layers[i].in : 0); }

  StackProblem problem(const Case& c, const Operand& x) const {
    StackProblem p;
    p.rows = rows, p.dtype = c.dtype, p.activation = c.activation, p.concat = concat;
    p.count = static_cast<int64_t>(layers.size()), p.x = x.row_major();
    return p;
  }
  std::vector<StackLayer> plain_layers() const {
    std::vector<StackLayer> plain;
    for (const DrawnLayer& l : layers) plain.push_back(l.plain());
    return plain;
  }
};

// Values of scale 1; in the cases of denormals one value is a denormal, which some products would lose.
inline Operand draw_rows(Case& c, const char* name, int64_t rows, int64_t cols) {
  Operand o = c.input(name, rows, cols, row_layout(rows, cols, c.rng), 1);
  const bool with_denormal = c.kind == Kind::denormals || c.kind == Kind::one_denormal;
  if (with_denormal && rows > 0 && cols > 0) {
    const int64_t row = c.rng.below(rows), col = c.rng.below(cols);
    o.set(row, col, c.format.min_normal / 2);
  }
  return o;
}

inline Approx beside(const Approx& a, const Approx& b) {
  Approx both(a.rows, a.cols + b.cols);
  for (int64_t i = 0; i < both.rows; ++i)
    for (int64_t j = 0; j < both.cols; ++j) {
      const Approx& from = j < a.cols ? a : b;
      const auto source = static_cast<size_t>(i * from.cols + (j < a.cols ? j : j - a.cols)),
                 to = static_cast<size_t>(i * both.cols + j);
      both.value[to] = from.value[source], both.error[to] = from.error[source];
    }
  return both;
}

inline Approx columns(const Approx& a, int64_t begin, int64_t end) {
  Approx part(a.rows, end - begin);
  for (int64_t i = 0; i < part.rows; ++i)
    for (int64_t j = begin; j < end; ++j) {
      const auto from = static_cast<size_t>(i * a.cols + j), to = static_cast<size_t>(i * part.cols + j - begin);
      part.value[to] = a.value[from], part.error[to] = a.error[from];
    }
  return part;
}

inline Approx linear(const Approx& h, const Operand& weight, const Operand& bias, Real roundoff) {
  Approx z = product(h, Approx(weight), roundoff);
  add(z, bias, roundoff);
  return z;
}

// A layer's output for h, before rounding. z is the layer's own z, or a z that was kept.
inline Approx layer_output(const Case& c, const DrawnStack& s, size_t i, const Approx& h, const Approx& z) {
  const DrawnLayer& l = s.layers[i];
  Approx out = activated(z, c.activation, c.format);
  if (l.projected) {
    add(out, rounded(linear(h, l.projection, l.projection_bias, c.roundoff), c.format), c.roundoff);
  } else if (l.adds_input) {
    add(out, h, c.roundoff);
  }
  return s.concat ? beside(h, out) : out;
}

inline void stack_forward_case(int64_t number) {
  Case c("stack_forward", number);
  const DrawnStack s(c);
  const Operand x = draw_rows(c, "x", s.rows, s.in);
  const bool with_z = c.rng.one_in(2);
  std::vector<Output> zs;
  zs.reserve(s.layers.size());
  for (const DrawnLayer& l : s.layers) zs.emplace_back(c, "z", s.rows, l.out, with_z);
  const Output y(c, "y", s.rows, s.out_features(s.layers.size() - 1), true);
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    std::vector<StackLayer> layers = s.plain_layers();
    for (size_t i = 0; i < layers.size(); ++i) layers[i].z = zs[i].of_run(run).mutable_row_major();
    StackProblem p = s.problem(c, x);
    p.layers = layers.data(), p.y = y.of_run(run).mutable_row_major();
    kernels().stack_forward(p, parallel);
    return true;
  });
  if (!checks) return;

  Approx h{x};
  for (size_t i = 0; i < s.layers.size(); ++i) {
    const Approx z = linear(h, s.layers[i].weight, s.layers[i].bias, c.roundoff);
    zs[i].check(z);
    const Approx out = layer_output(c, s, i, h, z);
    if (i + 1 == s.layers.size()) y.check(out);
    h = rounded(out, c.format);
  }
}

// What autograd does not save.
inline void leave_out_unread(StackProblem& p, std::vector<StackLayer>& layers) {
  const auto use_of = [&](int64_t i) {
    const StackLayer& l = layers[static_cast<size_t>(i)];
    StackLayerUse use;
    use.adds_input = l.adds_input, use.projects = l.projection.data != nullptr, use.keeps_z = l.z.data != nullptr;
    use.dweight = l.dweight.data != nullptr, use.db = l.db != nullptr;
    use.dprojection = l.dprojection.data != nullptr, use.dprojection_bias = l.dprojection_bias != nullptr;
    return use;
  };
  stack_reads(p.count, p.dx.data != nullptr, p.activation != Activation::none, p.concat, use_of,
              [&](int64_t i, const StackLayerReads& reads) {
                StackLayer& l = layers[static_cast<size_t>(i)];
                if (!reads.weight()) l.weight = {};
                if (!reads.forms_z) l.bias = nullptr;
                if (!reads.output) l.projection_bias = nullptr;
                if (!reads.projection()) l.projection = {};
                if (i == 0 && !reads.input) p.x = {};
              });
}

inline void stack_backward_case(int64_t number) {
  Case c("stack_backward", number);
  const DrawnStack s(c);
  const size_t count = s.layers.size();
  const Operand x = draw_rows(c, "x", s.rows, s.in);
  const int64_t y_features = s.out_features(count - 1);
  const Operand dy = draw_rows(c, "dy", s.rows, y_features);
  const bool with_z = c.rng.one_in(2), without_unread = c.rng.one_in(2);
  // Any z will do: backward takes it for forward's z.
  std::vector<Operand> zs;
  for (const DrawnLayer& l : s.layers)
    zs.push_back(with_z ? c.input("z", s.rows, l.out, layout(c.rng.below(2), s.rows, l.out, c.rng), 1)
                        : c.absent("z"));

  struct Gradients {
    bool dweight_transposed, dprojection_transposed;
    Output dweight, db, dprojection, dprojection_bias;
  };
  std::vector<Gradients> gradients;
  gradients.reserve(count);
  for (const DrawnLayer& l : s.layers) {
    const bool transposed[2] = {c.rng.one_in(2), c.rng.one_in(2)};
    const auto matrix = [&](const char* name, bool present, bool flip) {
      return Output(c, name, flip ? l.in : l.out, flip ? l.out : l.in, present && !c.rng.one_in(4));
    };
    const auto bias = [&](const char* name, bool present) {
      return Output(c, name, 1, l.out, present && !c.rng.one_in(4));
    };
    gradients.push_back({transposed[0], transposed[1], matrix("dweight", true, transposed[0]),
                         bias("db", !l.bias.values.empty()), matrix("dprojection", l.projected, transposed[1]),
                         bias("dprojection_bias", !l.projection_bias.values.empty())});
  }
  const Output dx(c, "dx", s.rows, s.in, !c.rng.one_in(3));
  const bool checks = run_twice(c, [&](size_t run, const Parallel& parallel) {
    std::vector<StackLayer> layers = s.plain_layers();
    for (size_t i = 0; i < count; ++i) {
      StackLayer& l = layers[i];
      const Gradients& g = gradients[i];
      l.z = zs[i].mutable_row_major();
      l.dweight = g.dweight.of_run(run).mutable_row_major(), l.dweight_transposed = g.dweight_transposed;
      l.dprojection = g.dprojection.of_run(run).mutable_row_major();
      l.dprojection_transposed = g.dprojection_transposed;
      l.db = g.db.of_run(run).data, l.dprojection_bias = g.dprojection_bias.of_run(run).data;
    }
    StackProblem p = s.problem(c, x);
    p.layers = layers.data(), p.dy = dy.row_major(), p.dx = dx.of_run(run).mutable_row_major();
    if (without_unread) leave_out_unread(p, layers);
    kernels().stack_backward(p, parallel);
    return true;
  });
  if (!checks) return;

  std::vector<Approx> inputs{Approx(x)}, z;
  for (size_t i = 0; i < count; ++i) {
    z.push_back(with_z ? Approx(zs[i]) : linear(inputs[i], s.layers[i].weight, s.layers[i].bias, c.roundoff));
    inputs.push_back(rounded(layer_output(c, s, i, inputs[i], z[i]), c.format));
  }
  Approx grad{dy};
  for (size_t i = count; i-- > 0;) {
    const DrawnLayer& l = s.layers[i];
    const Gradients& g = gradients[i];
    const Approx activated_grad = s.concat ? columns(grad, l.in, l.in + l.out) : grad;
    Approx dz = preactivation_grad(activated_grad, z[i], c.activation, c.format, c.roundoff);
    g.db.check(column_sums(dz, c.roundoff));
    dz = rounded(dz, c.format);
    const auto check_product = [&](const Output& output, const Approx& of_output, bool transposed) {
      const Approx expected = product(of_output.transposed(), inputs[i].transposed(), c.roundoff);
      output.check(transposed ? expected.transposed() : expected);
    };
    check_product(g.dweight, dz, g.dweight_transposed);
    Approx dh = product(dz, Approx(l.weight).transposed(), c.roundoff);
    if (l.projected) {
      g.dprojection_bias.check(column_sums(grad, c.roundoff));
      check_product(g.dprojection, grad, g.dprojection_transposed);
      add(dh, rounded(product(grad, Approx(l.projection).transposed(), c.roundoff), c.format), c.roundoff);
    } else if (l.adds_input) {
      add(dh, grad, c.roundoff);
    } else if (s.concat) {
      add(dh, columns(grad, 0, l.in), c.roundoff);
    }
    if (i == 0) dx.check(dh);
    grad = rounded(dh, c.format);
  }
}

}  // namespace sweep
