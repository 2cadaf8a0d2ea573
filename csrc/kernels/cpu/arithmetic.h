// Small arithmetic of all CPU kernels.
#pragma once

#include <cstdint>

namespace fastlane {

// Always inlined: a copy compiled in an ISA file must never serve other code.
__attribute__((always_inline)) inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below these, waking the pool costs more than the arithmetic.
constexpr double kSerialMultiplyAdds = 64 * 1024;
constexpr int64_t kSerialElements = 4096;

}  // namespace fastlane
