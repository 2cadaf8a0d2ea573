#include "device.cuh"
#include "elementwise.h"

namespace fastlane::cuda {
namespace {

template <class T>
struct GradOperands {
  int64_t rows, cols, chunk_rows, chunks;
  const T *dy, *z;
  T* dz;
  compute_t<T>* partial_db;  // chunks × cols, or null
  int64_t dy_stride, z_stride, dz_stride;
};

// A block takes chunks of rows. Its threads add up their own rows in order, then the first of each column adds what
// the others have, in order.
template <class T, class Act, int N>
__global__ void __launch_bounds__(kBlockThreads) preactivation_grad_kernel(const GradOperands<T> p) {
  using R = compute_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  R* const sums = reinterpret_cast<R*>(shared);  // blockDim.y × (blockDim.x · N)
  const int64_t width = int64_t{blockDim.x} * N;
  for (int64_t first_col = blockIdx.x * width; first_col < p.cols; first_col += gridDim.x * width) {
    const int64_t col = first_col + int64_t{threadIdx.x} * N;
    for (int64_t chunk = blockIdx.y; chunk < p.chunks; chunk += gridDim.y) {
      const int64_t end = min(p.rows, (chunk + 1) * p.chunk_rows);
      R db[N];
#pragma unroll
      for (int i = 0; i < N; ++i) db[i] = R(0);
      if (col < p.cols) {
        for (int64_t row = chunk * p.chunk_rows + threadIdx.y; row < end; row += blockDim.y) {
          const Access<T, N> dy = load<N>(p.dy + row * p.dy_stride + col);
          Access<T, N> z{}, dz;
          if (p.z) z = load<N>(p.z + row * p.z_stride + col);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const R grad = widen(dy.v[i]) * Act::slope(widen(z.v[i]));
            db[i] += grad;
            dz.v[i] = rounded<T>(grad);
          }
          if (p.dz) store<N>(p.dz + row * p.dz_stride + col, dz);
        }
      }
      if (!p.partial_db) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) sums[threadIdx.y * width + threadIdx.x * N + i] = db[i];
      __syncthreads();
      if (threadIdx.y == 0 && col < p.cols) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          R total = db[i];
          for (int y = 1; y < blockDim.y; ++y) total += sums[y * width + threadIdx.x * N + i];
          p.partial_db[chunk * p.cols + col + i] = total;
        }
      }
      __syncthreads();
    }
  }
}

constexpr int kSumCols = 32, kSumRows = kBlockThreads / kSumCols;

// db of 32 columns: each thread adds every eighth chunk, then the first of each column adds the eight sums. In
// double, since there may be very many chunks.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    sum_chunks_kernel(const compute_t<T>* partial_db, int64_t chunks, int64_t cols, T* db) {
  __shared__ double sums[kSumRows][kSumCols];
  for (int64_t first_col = int64_t{blockIdx.x} * kSumCols; first_col < cols;
       first_col += int64_t{gridDim.x} * kSumCols) {
    const int64_t col = first_col + threadIdx.x;
    double sum = 0;
    if (col < cols)
      for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSumRows) sum += partial_db[chunk * cols + col];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && col < cols) {
      for (int y = 1; y < kSumRows; ++y) sum += sums[y][threadIdx.x];
      db[col] = rounded<T>(static_cast<compute_t<T>>(sum));
    }
    __syncthreads();
  }
}

int64_t grad_access(const PreActivationGradProblem& p) { return access_elements(p.cols, p.dtype, p.dy, p.z, p.dz); }

}  // namespace

size_t preactivation_grad_workspace(const PreActivationGradProblem& p) {
  if (!p.db) return 0;
  const int64_t sum_size = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(column_sum_geometry(p.rows, p.cols, grad_access(p)).chunks * p.cols * sum_size);
}

void preactivation_grad(const PreActivationGradProblem& problem, void* workspace, Stream stream) {
  if (problem.cols == 0) return;
  const int64_t access = grad_access(problem);
  const ColumnSumGeometry g = column_sum_geometry(problem.rows, problem.cols, access);
  with_types(problem.dtype, access, problem.activation, [&](auto stored, auto activation) {
    using T = typename decltype(stored)::type;
    using R = compute_t<T>;
    constexpr int N = decltype(stored)::access;
    R* const partial_db = problem.db ? static_cast<R*>(workspace) : nullptr;
    if (problem.rows > 0) {
      const GradOperands<T> operands{problem.rows,
                                     problem.cols,
                                     g.chunk_rows,
                                     g.chunks,
                                     static_cast<const T*>(problem.dy.data),
                                     static_cast<const T*>(problem.z.data),
                                     static_cast<T*>(problem.dz.data),
                                     partial_db,
                                     problem.dy.row_stride,
                                     problem.z.row_stride,
                                     problem.dz.row_stride};
      const dim3 grid(static_cast<unsigned>(g.grid_cols), static_cast<unsigned>(g.grid_rows));
      const dim3 block(g.block_cols, g.block_rows);
      const size_t shared_bytes = partial_db ? sizeof(R) * kBlockThreads * N : 0;
      preactivation_grad_kernel<T, decltype(activation), N><<<grid, block, shared_bytes, stream>>>(operands);
      FASTLANE_CHECK_LAUNCH("preactivation_grad");
    }
    if (problem.db) {
      const auto blocks = static_cast<unsigned>(std::min(kMaxGridCols, ceil_div(problem.cols, kSumCols)));
      sum_chunks_kernel<T><<<blocks, dim3(kSumCols, kSumRows), 0, stream>>>(partial_db, g.chunks, problem.cols,
                                                                            static_cast<T*>(problem.db));
      FASTLANE_CHECK_LAUNCH("sum_chunks");
    }
  });
}

}  // namespace fastlane::cuda
