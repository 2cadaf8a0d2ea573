// Converts 16-bit storage formats ↔ float, rounding to nearest even and keeping denormals and NaN. For CPUs and
// builds without the conversion instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/problem.h"

namespace fastlane {

inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
inline float float_from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline float to_float(BFloat16 h) { return float_from_bits(uint32_t{h.bits} << 16); }

inline BFloat16 to_bfloat16(float f) {
  const uint32_t u = float_bits(f);
  if (f != f) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

inline float to_float(Half h) {
  const uint32_t sign = uint32_t{h.bits & 0x8000u} << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x0400) {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return float_from_bits(sign | float_bits(subnormal));
  }
  return float_from_bits(sign | ((magnitude << 13) + (uint32_t{127 - 15} << 23)));
}

inline Half to_half(float f) {
  const uint32_t u = float_bits(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu))};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 0.5 lines the subnormal's last bit up with float's, so the addition itself rounds to nearest even.
    const float aligned = float_from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(aligned) - float_bits(0.5f)))};
  }
  const uint32_t rebased = magnitude - (uint32_t{127 - 15} << 23);
  return {static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1)) >> 13))};
}

}  // namespace fastlane
