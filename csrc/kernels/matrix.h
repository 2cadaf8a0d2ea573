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

// A copy of a product's B in the order in which tiles read B: panel after panel, each over all of k (PanelsProblem).
// The other fields tell the layout that B had: with few rows the layout decides in which order products are summed.
struct Panels {
  const void* data = nullptr;
  bool ran_along_k = false, ran_along_n = false;
};

// A weight of a forward, out_features × in_features: where it lies, or its panels.
struct Weight {
  ConstMatrix matrix;
  Panels panels;

  bool is_present() const { return matrix.data || panels.data; }
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
