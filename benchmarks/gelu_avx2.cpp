#if defined(__x86_64__)

#define FASTLANE_TARGET_AVX2
#include "gelu_contestants-inl.h"

namespace fastlane {

template <class T>
Formulas<T> avx2_formulas(bool now, Activation activation) {
  return formulas<T>(now, activation);
}
template Formulas<float> avx2_formulas(bool, Activation);
template Formulas<double> avx2_formulas(bool, Activation);
template Formulas<BFloat16> avx2_formulas(bool, Activation);

}  // namespace fastlane

#endif
