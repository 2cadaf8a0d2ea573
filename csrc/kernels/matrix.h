// Types of elements, and views of matrices.
#pragma once

#include <cstdint>

namespace fastlane {

enum class DType : uint8_t { f32, f64, bf16, f16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Storage formats for which C++17 has no types. Kernels widen them to float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Strides count elements and may be 0 or negative. They promise no alignment.
struct ConstMatrix {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 0;

  ConstMatrix transposed() const { return {data, col_stride, row_stride}; }
};

// Rows have a unit column stride and lie `row_stride` (the leading dimension) elements apart.
struct RowMajor {
  void* data = nullptr;
  int64_t row_stride = 0;
};
struct ConstRowMajor {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

}  // namespace fastlane
