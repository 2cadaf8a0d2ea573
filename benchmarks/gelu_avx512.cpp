#if defined(__x86_64__)

#define FASTLANE_TARGET_AVX512
// GCC 12 takes the deliberately undefined pass-through operand of its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "gelu_contestants-inl.h"

namespace fastlane {

template <class T>
Formulas<T> avx512_formulas(bool now, Activation activation) {
  return formulas<T>(now, activation);
}
template Formulas<float> avx512_formulas(bool, Activation);
template Formulas<double> avx512_formulas(bool, Activation);
template Formulas<BFloat16> avx512_formulas(bool, Activation);

}  // namespace fastlane

#endif
