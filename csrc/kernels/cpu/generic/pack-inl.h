// Operands of a GEMM, seen as strips: rows of A or columns of B, each with its steps along k. A panel holds R
// neighbouring strips in the order in which a tile reads them: the R units of one step side by side. Absent
// strips and the missing half of a last pair are zero. One routine serves both operands and all layouts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/generic/activation-inl.h"
#include "kernels/cpu/gemm_plan.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

template <class T>
struct Strips {
  const T* data = nullptr;
  int64_t count = 0;
  int64_t strip_stride = 0, k_stride = 0;
  Activation activation = Activation::none;  // applied when packed

  const T* at(int64_t strip, int64_t k) const { return data + strip * strip_stride + k * k_stride; }
};

// The operands of a product: A's rows and B's columns.
template <class T>
Strips<T> a_strips(const GemmProblem& p) {
  return {static_cast<const T*>(p.a.data), p.m, p.a.row_stride, p.a.col_stride, p.a_activation};
}
template <class T>
Strips<T> b_strips(const GemmProblem& p) {
  return {static_cast<const T*>(p.b.data), p.n, p.b.col_stride, p.b.row_stride, p.b_activation};
}

// Whether a product of type P drops any of these values. Activated values are not looked at: eager rounds them to the
// same type, and eager's product takes the same values for zero.
template <class P, class T>
bool drops_any(const Strips<T>& s, int64_t strip, int64_t strips, int64_t k, int64_t k_end) {
  strips = std::min(strips, s.count - strip);
  bool found = false;
  if constexpr (P::drops_denormals) {
    if (s.activation != Activation::none) return false;
    if (s.k_stride == 1) {
      for (int64_t i = strip; i < strip + strips; ++i) found |= P::drops_any(s.at(i, k), k_end - k);
    } else {
      for (; k < k_end; ++k)
        if (s.strip_stride == 1) {
          found |= P::drops_any(s.at(strip, k), strips);
        } else {
          for (int64_t i = strip; i < strip + strips; ++i) found |= P::drops_any(s.at(i, k), 1);
        }
    }
  }
  return found;
}

// Where a tile finds its operand: a packed panel, or the operand itself. Strides count bytes.
struct Panel {
  const char* data;
  int64_t strip_stride, step_stride;
};

template <class E>
size_t bytes_of(int64_t values) {
  return static_cast<size_t>(values) * sizeof(E);
}
template <class P>
int64_t steps_of(int64_t k) {
  return ceil_div(k, P::k_per_step);
}

// Whether a tile may read the lanes of a step side by side from dense rows of storage.
template <class P, class T>
bool reads_dense_rows(const Strips<T>& s) {
  return P::reads_storage && P::k_per_step == 1 && s.activation == Activation::none && s.strip_stride == 1 &&
         s.k_stride >= 0 && s.k_stride * static_cast<int64_t>(sizeof(T)) <= kDenseRowBytes;
}

// Only whole panels of whole steps can be read where they lie.
template <int R, class P, class T>
bool is_whole_panel(const Strips<T>& s, int64_t strip, int64_t k_count) {
  return s.count - strip >= R && k_count % P::k_per_step == 0;
}
template <class P, class T>
Panel panel_in_place(const Strips<T>& s, int64_t strip, int64_t k) {
  constexpr auto bytes = static_cast<int64_t>(sizeof(T));
  return {reinterpret_cast<const char*>(s.at(strip, k)), s.strip_stride * bytes, P::k_per_step * s.k_stride * bytes};
}
template <int R, class Unit>
Panel packed_panel(const Unit* values) {
  constexpr auto bytes = static_cast<int64_t>(sizeof(Unit));
  return {reinterpret_cast<const char*>(values), bytes, R * bytes};
}

// How many units a store may write beyond the end of a panel whose R is no multiple of the vector's width.
template <class P>
constexpr int kPanelOverhang = P::V::width;

template <int R, class P, class T>
FASTLANE_INLINE void pack_step(const Strips<T>& s, int64_t strip, int64_t k, int64_t k_end, typename P::Unit* dst) {
  const int present = static_cast<int>(std::min<int64_t>(R, s.count - strip));
  for (int r = 0; r < present; ++r) dst[r] = P::unit(s.at(strip + r, k), s.k_stride, k_end - k);
  for (int r = present; r < R; ++r) dst[r] = typename P::Unit{};
}

// For k that runs along memory. Vectors of consecutive units are loaded from the strips of a group and transposed in
// registers. One group follows the other: the lines fetched ahead for more strips would not fit in one set of L1.
template <int R, class P, class T>
void pack_transposing(const Strips<T>& s, int64_t strip, int64_t k, int64_t k_end, typename P::Unit* dst) {
  using V = typename P::V;
  constexpr int W = V::width;
  constexpr int groups = (R + W - 1) / W;
  constexpr int64_t k_per_vector = W * P::k_per_step;
  const int64_t present = s.count - strip, vectors = (k_end - k) / k_per_vector;
  // The last group comes first. What it writes beyond a step's end is then overwritten by the first group.
  for (int g = groups - 1; g >= 0; --g) {
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const int64_t from = k + vector * k_per_vector;
      V t[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int r = g * W + i;
        if (r < R && r < present) __builtin_prefetch(s.at(strip + r, from) + 4 * k_per_vector, 0, 3);
        t[i] = r < R && r < present ? P::units_along_k(s.at(strip + r, from)) : V::set(0);
      }
      transpose(t);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) P::store_units(dst + (vector * W + i) * R + g * W, t[i]);
    }
  }
  k += vectors * k_per_vector, dst += vectors * W * R;
  for (; k < k_end; k += P::k_per_step, dst += R) pack_step<R, P>(s, strip, k, k_end, dst);
}

// Neighbouring panels of one packed operand: one begins so many units after the other.
template <class Unit>
struct PackedPanels {
  Unit* first;
  int64_t count, stride;
};

// For strips that run along memory: every step is a straight copy. Several panels are filled side by side, so that a
// line of memory is read once. Where steps lie a power of two apart, lines share a few sets of each cache, and a line
// would be gone before the next panel needs the rest of it.
template <int R, class P, class T>
void pack_copying(const Strips<T>& s, int64_t strip, int64_t k, int64_t k_end,
                  const PackedPanels<typename P::Unit>& to) {
  constexpr int W = P::V::width;
  // A store may write beyond a panel's end, where the next panel is filled already. So the last step is left out.
  static_assert((R + W - 1) / W * W - R <= R, "a store reaches beyond the step after its own");
  const int64_t steps = (k_end - k) / P::k_per_step - (R % W != 0);
  for (int64_t step = 0; step < steps; ++step, k += P::k_per_step) {
    const T* src = s.at(strip, k);
    typename P::Unit* dst = to.first + step * R;
    for (int64_t panel = 0; panel < to.count; ++panel, src += R, dst += to.stride) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r += W) P::store_units(dst + r, P::units_along_strip(src + r, s.k_stride));
    }
  }
  for (int64_t step = std::max<int64_t>(0, steps); k < k_end; ++step, k += P::k_per_step)
    for (int64_t panel = 0; panel < to.count; ++panel)
      pack_step<R, P>(s, strip + panel * R, k, k_end, to.first + panel * to.stride + step * R);
}

template <int R, class P, class T>
void pack_values(const Strips<T>& s, int64_t strip, int64_t k, int64_t k_end,
                 const PackedPanels<typename P::Unit>& to) {
  constexpr int W = P::V::width;
  constexpr int beyond = (R + W - 1) / W * W - R;  // strips that a copy reads beyond its panel
  PackedPanels<typename P::Unit> rest = to;
  if (s.strip_stride == 1 && s.k_stride != 1) {
    const int64_t whole = std::clamp<int64_t>((s.count - strip - beyond) / R, 0, to.count);
    pack_copying<R, P>(s, strip, k, k_end, {to.first, whole, to.stride});
    rest = {to.first + whole * to.stride, to.count - whole, to.stride};
    strip += whole * R;
  }
  for (int64_t panel = 0; panel < rest.count; ++panel, strip += R) {
    typename P::Unit* const dst = rest.first + panel * rest.stride;
    if (s.k_stride == 1) {
      pack_transposing<R, P>(s, strip, k, k_end, dst);
    } else {
      for (int64_t at = k, step = 0; at < k_end; at += P::k_per_step, ++step)
        pack_step<R, P>(s, strip, at, k_end, dst + step * R);
    }
  }
}

template <class Act, class P>
void activate_units(typename P::Unit* p, int64_t count) {
  for (; count > 0; count -= P::kUnitsOfTwo, p += P::kUnitsOfTwo) {
    VecBlock<typename P::V, 2> values;
    P::load_values(p, count, values.v);
    P::store_values(p, Act::value(values).v, count);
  }
}

// Fills neighbouring panels with the steps [k, k_end) of their strips. Activates piece by piece, while a piece lies
// in L1.
template <int R, class P, class T>
void pack_panels(const Strips<T>& s, int64_t strip, int64_t k, int64_t k_end, PackedPanels<typename P::Unit> to) {
  if (s.activation == Activation::none) return pack_values<R, P>(s, strip, k, k_end, to);
  if (s.k_stride == 1 && to.count > 1) {
    // A panel that is transposed may write beyond its end, so the next panel comes after it with all of its pieces.
    for (int64_t panel = 0; panel < to.count; ++panel)
      pack_panels<R, P>(s, strip + panel * R, k, k_end, {to.first + panel * to.stride, 1, to.stride});
    return;
  }
  constexpr int64_t kPieceSteps = 64;
  with_activation<T>(s.activation, [&](auto act) {
    for (; k < k_end; k += kPieceSteps * P::k_per_step, to.first += kPieceSteps * R) {
      const int64_t piece_end = std::min(k_end, k + kPieceSteps * P::k_per_step);
      pack_values<R, P>(s, strip, k, piece_end, to);
      for (int64_t panel = 0; panel < to.count; ++panel)
        activate_units<decltype(act), P>(to.first + panel * to.stride, R * steps_of<P>(piece_end - k));
    }
  });
}

template <int R, class P, class T>
void pack_panel(const Strips<T>& s, int64_t strip, int64_t k, int64_t k_end, typename P::Unit* dst) {
  pack_panels<R, P>(s, strip, k, k_end, {dst, 1, 0});
}

// Fills the panels that a tile does not read where they lie. If the first is read there, all are, but for a last one
// that lacks strips. `in_place` says so of the panel that begins at a strip.
template <int R, class P, class T, class InPlace>
void pack_unless_in_place(const Strips<T>& s, int64_t strip, int64_t k, int64_t k_end,
                          const PackedPanels<typename P::Unit>& to, InPlace in_place) {
  const int64_t last = to.count - 1, last_strip = strip + last * R;
  if (!in_place(strip)) return pack_panels<R, P>(s, strip, k, k_end, to);
  if (!in_place(last_strip)) pack_panel<R, P>(s, last_strip, k, k_end, to.first + last * to.stride);
}

// So many panels are worth filling together: they read a few neighbouring lines of memory in each step.
template <int R, class T>
constexpr int64_t kPanelsTogether = std::max<int64_t>(1, 384 / (R * static_cast<int64_t>(sizeof(T))));

FASTLANE_END_TARGET
