// What is timed: loops over arrays, one for each kernel set, type, activation and age of the formulas.
#pragma once

#include <cstdint>

#include "kernels/problem.h"

namespace fastlane {

template <class T>
using Loop = void (*)(const T* x, T* y, int64_t count);

template <class T>
struct Formulas {
  Loop<T> value, derivative;
};

// For float, double and BFloat16. `now`: the kernels' formulas, not those that this project began with.
template <class T>
Formulas<T> avx2_formulas(bool now, Activation activation);
template <class T>
Formulas<T> avx512_formulas(bool now, Activation activation);

}  // namespace fastlane
