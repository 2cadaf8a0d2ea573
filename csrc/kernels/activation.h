// The activations: their list and their definitions, for host and device, in float or double. Faster forms are in
// cpu/generic/activation-inl.h for vectors, and in cuda/common/gelu16.h for 16-bit results.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#if defined(__CUDACC__)
#define FASTLANE_HOST_DEVICE __host__ __device__
#else
#define FASTLANE_HOST_DEVICE
#endif

// An operator's argument `activation` is one of these names. All tables and switches follow from the list.
#define FASTLANE_ACTIVATIONS(X) \
  X(none)                       \
  X(gelu)                       \
  X(gelu_tanh)                  \
  X(quick_gelu)

namespace fastlane {

enum class Activation : uint8_t {
#define FASTLANE_ACTIVATION(name) name,
  FASTLANE_ACTIVATIONS(FASTLANE_ACTIVATION)
#undef FASTLANE_ACTIVATION
};

// By Activation's numbers.
inline constexpr std::array kActivationNames = {
#define FASTLANE_ACTIVATION(name) std::string_view(#name),
    FASTLANE_ACTIVATIONS(FASTLANE_ACTIVATION)
#undef FASTLANE_ACTIVATION
};
constexpr std::string_view name_of(Activation activation) {
  return kActivationNames[static_cast<size_t>(activation)];
}

// The value and the derivative of an activation.
template <Activation>
struct Definition;

template <>
struct Definition<Activation::none> {
  template <class R>
  static FASTLANE_HOST_DEVICE R value(R z) {
    return z;
  }
  template <class R>
  static FASTLANE_HOST_DEVICE R derivative(R) {
    return 1;
  }
};

// Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
namespace gelu_constants {

constexpr double log2_e = 1.44269504088896340736;
constexpr double sqrt_half = 0.70710678118654752440;
constexpr double inv_sqrt_2pi = 0.39894228040143267794;
constexpr double tanh_cubic = 0.044715;
constexpr double two_sqrt_2_over_pi = 1.59576912160573071176;  // 2 √(2/π)

// Beyond this |z|, Φ is 0 or 1 in double. Clamping z there keeps ±inf from becoming inf · 0.
constexpr double saturation = 40.0;

}  // namespace gelu_constants

template <class R>
FASTLANE_HOST_DEVICE inline R at_least(R z, double limit) {
  return z < R(limit) ? R(limit) : z;
}
template <class R>
FASTLANE_HOST_DEVICE inline R clamped(R z, double limit) {
  return z > R(limit) ? R(limit) : at_least(z, -limit);
}

template <class R>
FASTLANE_HOST_DEVICE inline R normal_cdf(R z) {
  return R(0.5) * std::erfc(-z * R(gelu_constants::sqrt_half));
}

// gelu(z) = z Φ(z), Φ(z) = ½ erfc(−z/√2). erfc has no cancellation in the negative tail, where 1 + erf loses every
// digit.
template <>
struct Definition<Activation::gelu> {
  template <class R>
  static FASTLANE_HOST_DEVICE R value(R z) {
    return at_least(z, -gelu_constants::saturation) * normal_cdf(clamped(z, gelu_constants::saturation));
  }
  template <class R>
  static FASTLANE_HOST_DEVICE R derivative(R z) {
    const R c = clamped(z, gelu_constants::saturation);
    return normal_cdf(c) + c * R(gelu_constants::inv_sqrt_2pi) * std::exp(R(-0.5) * c * c);
  }
};

// For e = exp(−|a|), σ(a) is 1/(1 + e) where a ≥ 0 and e/(1 + e) where a < 0, without cancellation. `z` has a's sign.
template <class R>
FASTLANE_HOST_DEVICE inline R times_logistic(R factor, R z, R e) {
  return (z < 0 ? factor * e : factor) / (R(1) + e);
}
// The derivative of z σ(a(z)).
template <class R>
FASTLANE_HOST_DEVICE inline R times_logistic_derivative(R z, R a_derivative, R e) {
  const R inverse = R(1) / (R(1) + e);
  return (z < 0 ? e * inverse : inverse) + z * a_derivative * e * inverse * inverse;
}

// gelu_tanh(z) = ½ z (1 + tanh u) = z σ(2u), u = √(2/π) (z + 0.044715 z³).
template <>
struct Definition<Activation::gelu_tanh> {
  template <class R>
  static FASTLANE_HOST_DEVICE R value(R z) {
    return times_logistic(at_least(z, -gelu_constants::saturation), z,
                          exponential(clamped(z, gelu_constants::saturation)));
  }
  template <class R>
  static FASTLANE_HOST_DEVICE R derivative(R z) {
    const R c = clamped(z, gelu_constants::saturation);
    const R slope = R(gelu_constants::two_sqrt_2_over_pi) * (R(1) + R(3 * gelu_constants::tanh_cubic) * c * c);
    return times_logistic_derivative(c, slope, exponential(c));
  }

 private:
  template <class R>
  static FASTLANE_HOST_DEVICE R exponential(R z) {
    const R two_u = R(gelu_constants::two_sqrt_2_over_pi) * z * (R(1) + R(gelu_constants::tanh_cubic) * z * z);
    return std::exp(-std::fabs(two_u));
  }
};

// quick_gelu(z) = z σ(1.702 z): the approximation in the same paper, which CLIP uses.
namespace quick_gelu_constants {

constexpr double scale = 1.702;
// Beyond this |z|, σ(1.702 z) is 0 or 1 in double.
constexpr double saturation = 470;

}  // namespace quick_gelu_constants

template <>
struct Definition<Activation::quick_gelu> {
  template <class R>
  static FASTLANE_HOST_DEVICE R value(R z) {
    return times_logistic(at_least(z, -quick_gelu_constants::saturation), z,
                          exponential(clamped(z, quick_gelu_constants::saturation)));
  }
  template <class R>
  static FASTLANE_HOST_DEVICE R derivative(R z) {
    const R c = clamped(z, quick_gelu_constants::saturation);
    return times_logistic_derivative(c, R(quick_gelu_constants::scale), exponential(c));
  }

 private:
  template <class R>
  static FASTLANE_HOST_DEVICE R exponential(R z) {
    return std::exp(-std::fabs(R(quick_gelu_constants::scale) * z));
  }
};

}  // namespace fastlane
