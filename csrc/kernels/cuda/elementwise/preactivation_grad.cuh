// dz = dy ⊙ act′(z) and, in the same pass, the column sums of dz. Blocks are kSumCols × kSumRows threads.
#pragma once

#include "kernels/cuda/common/device.cuh"

namespace fastlane::cuda {

template <class T>
struct GradOperands {
  int64_t rows, cols, chunk_rows, chunks;
  const T *dy, *z;
  T* dz;
  compute_t<T>* partial_db;  // chunks × cols, or null
  int64_t dy_stride, z_stride, dz_stride;
};

// A block takes chunks of rows. Its threads add up their own rows in order, then the first thread of each column adds
// the other threads' sums, in order.
template <class T, class Act, int N>
__global__ void __launch_bounds__(kBlockThreads, 2) preactivation_grad_kernel(const GradOperands<T> p) {
  using R = compute_t<T>;
  constexpr int kWidth = kSumCols * N;
  __shared__ R sums[kSumRows][kWidth];
  for (int64_t first_col = int64_t{blockIdx.x} * kWidth; first_col < p.cols;
       first_col += int64_t{gridDim.x} * kWidth) {
    const int64_t col = first_col + int64_t{threadIdx.x} * N;
    for (int64_t chunk = blockIdx.y; chunk < p.chunks; chunk += gridDim.y) {
      const int64_t chunk_end = (chunk + 1) * p.chunk_rows, end = p.rows < chunk_end ? p.rows : chunk_end;
      R db[N];
#pragma unroll
      for (int i = 0; i < N; ++i) db[i] = R(0);
      if (col < p.cols) {
        for (int64_t row = chunk * p.chunk_rows + threadIdx.y; row < end; row += kSumRows) {
          const Access<T, N> dy = load<N>(p.dy + row * p.dy_stride + col);
          Access<T, N> z{}, dz;
          if (p.z) z = load<N>(p.z + row * p.z_stride + col);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const R grad = widen(dy.v[i]) * Act::template slope<InPass<T>>(widen(z.v[i]));
            db[i] += grad;
            dz.v[i] = rounded<T>(grad);
          }
          if (p.dz) store<N>(p.dz + row * p.dz_stride + col, dz);
        }
      }
      if (!p.partial_db) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) sums[threadIdx.y][threadIdx.x * N + i] = db[i];
      __syncthreads();
      if (threadIdx.y == 0 && col < p.cols) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          R total = db[i];
          for (int y = 1; y < kSumRows; ++y) total += sums[y][threadIdx.x * N + i];
          p.partial_db[chunk * p.cols + col + i] = total;
        }
      }
      __syncthreads();
    }
  }
}

// A block sums 32 columns: each thread adds every eighth row, then the first thread of each column adds the eight
// sums. The sums are double, since there may be very many rows.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    sum_rows_kernel(const compute_t<T>* partial, int64_t rows, int64_t cols, int64_t row_stride, T* out) {
  __shared__ double sums[kSumRows][kSumCols];
  for (int64_t first_col = int64_t{blockIdx.x} * kSumCols; first_col < cols;
       first_col += int64_t{gridDim.x} * kSumCols) {
    const int64_t col = first_col + threadIdx.x;
    double sum = 0;
    if (col < cols)
#pragma unroll 8
      for (int64_t row = threadIdx.y; row < rows; row += kSumRows) sum += partial[row * row_stride + col];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && col < cols) {
      for (int y = 1; y < kSumRows; ++y) sum += sums[y][threadIdx.x];
      out[col] = rounded<T>(static_cast<compute_t<T>>(sum));
    }
    __syncthreads();
  }
}

}  // namespace fastlane::cuda
