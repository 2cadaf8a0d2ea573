// The epilogue of a product that lies in memory: bias, the store of z, activation, addend, one rounding, the store of
// the result.
#pragma once

#include "kernels/cuda/common/device.cuh"

namespace fastlane::cuda {

constexpr int kRowsAtOnce = 4;

template <class T>
struct EpilogueOperands {
  int64_t rows, cols;
  const T *product, *bias, *addend;
  T *z, *out;
  int64_t product_stride, addend_stride, z_stride, out_stride;
};

// A thread keeps to its columns, so that their bias is read once. All rows of an iteration are loaded before any is
// computed, so that many loads are under way. With two blocks on a multiprocessor no register is spilled. There is no
// __restrict__, because the product may lie in z or out.
template <class T, class Act, int N>
__global__ void __launch_bounds__(kBlockThreads, 2) epilogue_kernel(const EpilogueOperands<T> p) {
  using R = compute_t<T>;
  const int64_t row_step = int64_t{gridDim.y} * blockDim.y, col_step = int64_t{gridDim.x} * blockDim.x * N;
  const int64_t first_row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  for (int64_t col = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N; col < p.cols; col += col_step) {
    R bias[N];
#pragma unroll
    for (int i = 0; i < N; ++i) bias[i] = R(0);
    if (p.bias) {
#pragma unroll
      for (int i = 0; i < N; ++i) bias[i] = widen(p.bias[col + i]);
    }
    for (int64_t block = first_row; block < p.rows; block += kRowsAtOnce * row_step) {
      Access<T, N> product[kRowsAtOnce], addend[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int64_t row = block + r * row_step;
        if (row < p.rows) product[r] = load<N>(p.product + row * p.product_stride + col);
        if (row < p.rows && p.addend) addend[r] = load<N>(p.addend + row * p.addend_stride + col);
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int64_t row = block + r * row_step;
        if (row >= p.rows) continue;
        Access<T, N> z, out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const R sum = p.bias ? widen(product[r].v[i]) + bias[i] : widen(product[r].v[i]);
          z.v[i] = rounded<T>(sum);
          const R activated = Act::template value<InPass<T>>(sum);
          out.v[i] = rounded<T>(p.addend ? activated + widen(addend[r].v[i]) : activated);
        }
        if (p.z) store<N>(p.z + row * p.z_stride + col, z);
        store<N>(p.out + row * p.out_stride + col, out);
      }
    }
  }
}

}  // namespace fastlane::cuda
