// What runtime.cpp leaves in a CUtensorMap, in place of the driver's own format.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint8_t kMark = 0x5a;

  uint8_t* base;
  uint64_t strides[4];  // bytes, of all dimensions but the first
  uint64_t sizes[5];
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzle_bits, mark;
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace ptx
