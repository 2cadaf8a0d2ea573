// The formulas as loops over arrays, for one kernel set.
#pragma once

#include "gelu_before-inl.h"
#include "gelu_formulas.h"
#include "kernels/cpu/generic/activation-inl.h"

FASTLANE_BEGIN_TARGET

template <class Gelu, class T>
void values(const T* x, T* y, int64_t count) {
  constexpr int width = decltype(load(x))::width;
  for (int64_t i = 0; i < count; i += width) store(y + i, Gelu::value(load(x + i)));
}
template <class Gelu, class T>
void derivatives(const T* x, T* y, int64_t count) {
  constexpr int width = decltype(load(x))::width;
  for (int64_t i = 0; i < count; i += width) store(y + i, Gelu::derivative(load(x + i)));
}

template <class T>
Formulas<T> formulas_before(Activation activation) {
  using before::ExactGelu;
  using before::TanhGelu;
  if (activation == Activation::gelu) return {values<ExactGelu, T>, derivatives<ExactGelu, T>};
  return {values<TanhGelu, T>, derivatives<TanhGelu, T>};
}

template <class T>
Formulas<T> formulas_now(Activation activation) {
  Formulas<T> now{};
  with_activation<T>(activation, [&](auto act) {
    using Gelu = decltype(act);
    now = {values<Gelu, T>, derivatives<Gelu, T>};
  });
  return now;
}

template <class T>
Formulas<T> formulas(bool now, Activation activation) {
  return now ? formulas_now<T>(activation) : formulas_before<T>(activation);
}

FASTLANE_END_TARGET
