// act(z) and act′(z) on vectors, without branches; the formulas of kernels/activation.h at t = |z|:
//
//   gelu(z) = max(z, 0) − t C(t)        gelu′(z) = S(t) for z < 0, 1 − S(t) for z ≥ 0
//
// Here C(t) = Φ(−t), σ(−2u(t)) or σ(−1.702 t), which has no cancellation however far out in the tail.
// S(t) = gelu′(−t) = C + t C′. The relative error near zero is about 2e-7 in float and 4e-16 in double. In the tail
// the error grows with the rounding of exp's argument, to 8e-6 at float(−10) in the tanh form.
#pragma once

#include <cstddef>
#include <type_traits>

#include "kernels/activation.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"

FASTLANE_BEGIN_TARGET

template <class V, size_t N>
FASTLANE_INLINE V polynomial(V x, const typename V::elem (&coefficients)[N]) {
  V sum = V::set(coefficients[N - 1]);
#pragma GCC unroll 24
  for (int i = static_cast<int>(N) - 2; i >= 0; --i) sum = fma(sum, x, V::set(coefficients[i]));
  return sum;
}

// Minimax coefficients for each type of the stored result. A 16-bit result rounds by 2e-4 and more.
//   exp2           2ʳ on [−½, ½]
//   scaled_tail    ½ erfcx(t/√2) = Φ(−t) exp(t²/2) in q = (t − c)/(t + c), c = tail_center, on [0, tail_end]
struct Bits32 {
  // Relative errors: exp2 2e-9; scaled_tail 9e-9 before its coefficients are rounded to float, 2e-7 after.
  using ForSlope = Bits32;
  static constexpr float exp2[] = {1.0f,           0.693147203f,   0.240226479f,   0.0555033247f,
                                   0.00961843736f, 0.00133988746f, 0.000153533621f};
  static constexpr float scaled_tail[] = {0.121513948f,    -0.20640262f,   0.123225041f,     -0.0462132636f,
                                          0.00613194225f,  0.00290438735f, -0.000983288081f, -0.000339012765f,
                                          0.000115013521f, 5.31618155e-5f};
  static constexpr float tail_center = 3.0f, tail_end = 14.5f, logistic_end = 11.0f;
};
struct Bits16 : Bits32 {
  // Relative errors: exp2 3e-6, scaled_tail 1e-5. The slope keeps Bits32's coefficients (ForSlope): GELU′ has a zero,
  // next to which no error is small.
  static constexpr float exp2[] = {0.999999261f, 0.693121816f, 0.240247453f, 0.0559178581f, 0.00957008589f};
  static constexpr float scaled_tail[] = {0.121513667f,   -0.206412405f,  0.123250575f,   -0.0461061655f,
                                          0.00594469565f, 0.00258428073f, -0.00064820446f};
};
struct Bits64 {
  // Relative errors: exp2 9e-18, scaled_tail 3e-18.
  using ForSlope = Bits64;
  static constexpr double exp2[] = {1.0,
                                    0.69314718055994531,
                                    0.24022650695910098,
                                    0.05550410866482166,
                                    0.0096181291076068861,
                                    0.0013333558146396017,
                                    0.0001540353044173901,
                                    1.5252733853275322e-5,
                                    1.3215442586458392e-6,
                                    1.017805172787519e-7,
                                    7.0725862021487573e-9,
                                    4.4566758837837092e-10};
  static constexpr double scaled_tail[] = {
      0.076919304975006296,  -0.14345755526401197,    0.11606881188600329,    -0.080883877264127212,
      0.04785535228417,      -0.023413900487697409,   0.0089913705505911212,  -0.0023788443566325494,
      0.0002195507376097726, 0.00013427684305933549,  -6.0427482741509852e-5, 9.6130708966341764e-7,
      6.644421185144446e-6,  -1.2700779435054455e-6,  -6.7507895834641147e-7, 2.4334983146392616e-7,
      7.7108565466055734e-8, -3.9170682577746764e-8,  -1.0996730009690268e-8, 5.6904030592304442e-9,
      1.8267114907495238e-9, -5.6984668727237212e-10, -2.3197111000479069e-10};
  static constexpr double tail_center = 5.0, tail_end = 40.0, logistic_end = 22.0;
};

// 2^(ab) for ab ≤ 0. The product ab enters the range reduction unrounded.
template <class Coefficients, class V>
FASTLANE_INLINE V exp2_of_product(V a, V b) {
  const V n = round(a * b);
  return scale_by_power(polynomial(multiply_subtract(a, b, n), Coefficients::exp2), n);
}

// exp(−t²/2). In double the rounding of the first product is corrected: it would be the largest error.
template <class Coefficients, class V>
FASTLANE_INLINE V gaussian(V t) {
  using E = typename V::elem;
  const V scale = V::set(static_cast<E>(-0.5 * gelu_constants::log2_e)), scaled = t * scale;
  if constexpr (std::is_same_v<E, double>) {
    const V n = round(scaled * t), lost = multiply_subtract(t, scale, scaled);
    return scale_by_power(polynomial(fma(lost, t, multiply_subtract(scaled, t, n)), Coefficients::exp2), n);
  } else {
    return exp2_of_product<Coefficients>(scaled, t);
  }
}

// (t − c)/(t + c). In double the roundings of both sums and of the quotient are corrected. The polynomial in q is
// steep near t = 0, so these roundings would be the largest error.
template <class V>
FASTLANE_INLINE V tail_argument(V t, V c) {
  const V sum = t + c, inverse = V::set(1) / sum;
  if constexpr (std::is_same_v<typename V::elem, double>) {
    const V difference = t - c, q = difference * inverse;
    const V difference_lost = t - (difference + c), sum_lost = t - (sum - c);
    const V lost = negated_multiply_add(q, sum, difference) + negated_multiply_add(q, sum_lost, difference_lost);
    return fma(lost, inverse, q);
  } else {
    return negated_multiply_add(c + c, inverse, V::set(1));
  }
}

template <class Coefficients, class V>
FASTLANE_INLINE V scaled_normal_tail(V t) {
  return polynomial(tail_argument(t, V::set(Coefficients::tail_center)), Coefficients::scaled_tail);
}

template <class V>
struct ValueAndSlope {
  V value, slope;
};

template <class Coefficients>
struct NormalTail {
  // At `end` exp(−t²/2) is 0 in the type. Clamping t there keeps ∞ from becoming ∞ · 0.
  static constexpr auto end = Coefficients::tail_end;

  template <class V>
  static FASTLANE_INLINE V value(V t) {
    return gaussian<Coefficients>(t) * scaled_normal_tail<Coefficients>(t);
  }
  template <class V>
  static FASTLANE_INLINE V slope(V t) {
    const V inv_sqrt_2pi = V::set(static_cast<typename V::elem>(gelu_constants::inv_sqrt_2pi));
    return gaussian<typename Coefficients::ForSlope>(t) *
           negated_multiply_add(inv_sqrt_2pi, t, scaled_normal_tail<typename Coefficients::ForSlope>(t));
  }
  template <class V>
  static FASTLANE_INLINE ValueAndSlope<V> both(V t) {
    const V inv_sqrt_2pi = V::set(static_cast<typename V::elem>(gelu_constants::inv_sqrt_2pi));
    const V density = gaussian<typename Coefficients::ForSlope>(t),
            tail = scaled_normal_tail<typename Coefficients::ForSlope>(t);
    return {density * tail, density * negated_multiply_add(inv_sqrt_2pi, t, tail)};
  }
};

template <class Coefficients>
struct LogisticTail {
  static constexpr auto end = Coefficients::logistic_end;

  static constexpr double linear = gelu_constants::two_sqrt_2_over_pi;
  static constexpr double cubic = gelu_constants::two_sqrt_2_over_pi * gelu_constants::tanh_cubic;

  // exp(−2u)
  template <class C, class V>
  static FASTLANE_INLINE V exponential(V t, V square) {
    using E = typename V::elem;
    const V factor = fma(V::set(static_cast<E>(-cubic * gelu_constants::log2_e)), square,
                         V::set(static_cast<E>(-linear * gelu_constants::log2_e)));
    return exp2_of_product<C>(factor, t);
  }
  template <class V>
  static FASTLANE_INLINE V value(V t) {
    const V e = exponential<Coefficients>(t, t * t);
    return e / (V::set(1) + e);
  }
  template <class V>
  static FASTLANE_INLINE V slope(V t) {
    return slope_at(t, t * t, exponential<typename Coefficients::ForSlope>(t, t * t));
  }
  template <class V>
  static FASTLANE_INLINE ValueAndSlope<V> both(V t) {
    // slope_at computes the same quotient with other roundings. The division here keeps value()'s bits.
    const V square = t * t, e = exponential<typename Coefficients::ForSlope>(t, square);
    return {e / (V::set(1) + e), slope_at(t, square, e)};
  }

 private:
  template <class V>
  static FASTLANE_INLINE V slope_at(V t, V square, V e) {
    using E = typename V::elem;
    const V inverse = V::set(1) / (V::set(1) + e), tail = e * inverse;
    const V derivative_of_2u = fma(V::set(static_cast<E>(3 * cubic)), square, V::set(static_cast<E>(linear)));
    return negated_multiply_add(t * derivative_of_2u * inverse, tail, tail);
  }
};

// σ(−1.702 t)
template <class Coefficients>
struct QuickTail {
  // Beyond it σ is 0 in the type.
  static constexpr auto end = static_cast<std::remove_const_t<decltype(Coefficients::logistic_end)>>(
      sizeof(Coefficients::logistic_end) == 8 ? quick_gelu_constants::saturation : 66);

  template <class V>
  static FASTLANE_INLINE V value(V t) {
    const V e = exponential<Coefficients>(t);
    return e / (V::set(1) + e);
  }
  template <class V>
  static FASTLANE_INLINE V slope(V t) {
    return slope_at(t, exponential<typename Coefficients::ForSlope>(t));
  }
  template <class V>
  static FASTLANE_INLINE ValueAndSlope<V> both(V t) {
    const V e = exponential<typename Coefficients::ForSlope>(t);
    return {e / (V::set(1) + e), slope_at(t, e)};
  }

 private:
  template <class C, class V>
  static FASTLANE_INLINE V exponential(V t) {
    return exp2_of_product<C>(
        V::set(static_cast<typename V::elem>(-quick_gelu_constants::scale * gelu_constants::log2_e)), t);
  }
  template <class V>
  static FASTLANE_INLINE V slope_at(V t, V e) {
    const V inverse = V::set(1) / (V::set(1) + e), tail = e * inverse;
    const V scaled = t * V::set(static_cast<typename V::elem>(quick_gelu_constants::scale));
    return negated_multiply_add(scaled * inverse, tail, tail);
  }
};

template <class Tail>
struct Gelu {
  // min and max return their second operand where it is NaN. max also keeps the sign of a zero z, and −0 keeps the
  // sign of a result below the smallest denormal.
  template <class V>
  static FASTLANE_INLINE V value(V z) {
    const V t = distance(z);
    return negated_multiply_add(t, Tail::value(t), max(V::set(-0.0), z));
  }
  template <class V>
  static FASTLANE_INLINE V derivative(V z) {
    const V slope = Tail::slope(distance(z));
    return select_negative(z, slope, V::set(1) - slope);
  }
  template <class V>
  static FASTLANE_INLINE ValueAndSlope<V> both(V z) {
    const V t = distance(z);
    const ValueAndSlope<V> tail = Tail::both(t);
    return {negated_multiply_add(t, tail.value, max(V::set(-0.0), z)),
            select_negative(z, tail.slope, V::set(1) - tail.slope)};
  }

 private:
  template <class V>
  static FASTLANE_INLINE V distance(V z) {
    return min(V::set(Tail::end), abs(z));
  }
};

struct NoActivation {
  template <class V>
  static FASTLANE_INLINE V value(V z) {
    return z;
  }
  template <class V>
  static FASTLANE_INLINE V derivative(V) {
    return V::set(1);
  }
  template <class V>
  static FASTLANE_INLINE ValueAndSlope<V> both(V z) {
    return {z, V::set(1)};
  }
};

// For an operand that is act′(z) already.
struct GivenSlope {
  template <class V>
  static FASTLANE_INLINE V derivative(V slope) {
    return slope;
  }
};

template <class T>
using coefficients_t = std::conditional_t<sizeof(T) == 8, Bits64, std::conditional_t<sizeof(T) == 4, Bits32, Bits16>>;

// The type that computes an activation on vectors.
template <Activation, class Coefficients>
struct OnVectors;
template <class Coefficients>
struct OnVectors<Activation::none, Coefficients> {
  using type = NoActivation;
};
template <class Coefficients>
struct OnVectors<Activation::gelu, Coefficients> {
  using type = Gelu<NormalTail<Coefficients>>;
};
template <class Coefficients>
struct OnVectors<Activation::gelu_tanh, Coefficients> {
  using type = Gelu<LogisticTail<Coefficients>>;
};
template <class Coefficients>
struct OnVectors<Activation::quick_gelu, Coefficients> {
  using type = Gelu<QuickTail<Coefficients>>;
};

// Calls f with the activation's type for results stored as T.
template <class T, class F>
FASTLANE_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
#define FASTLANE_ACTIVATION(name) \
  case Activation::name: return f(typename OnVectors<Activation::name, coefficients_t<T>>::type{});
    FASTLANE_ACTIVATIONS(FASTLANE_ACTIVATION)
#undef FASTLANE_ACTIVATION
  }
}

FASTLANE_END_TARGET
