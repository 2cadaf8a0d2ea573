// CUDA kernels on the host: a block's threads are threads, and blocks come one after the other. This is slow, and
// blind to what only a GPU does. But the code is the kernels' own: indices, edges, sums, roundings, the use of shared
// memory.
#pragma once

#include <cuda_runtime.h>

#include <barrier>
#include <thread>
#include <vector>

// Blocks do not run at the same time, so a block's memory may be the program's.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
inline thread_local std::barrier<>* block_barrier = nullptr;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <class Kernel, class... Arguments>
void run_grid(dim3 grid, dim3 block, Kernel kernel, const Arguments&... arguments) {
  std::barrier<> barrier(block.x * block.y);
  std::vector<std::thread> threads;
  for (unsigned y = 0; y < block.y; ++y)
    for (unsigned x = 0; x < block.x; ++x)
      threads.emplace_back([&, x, y] {
        threadIdx = {x, y, 0}, blockDim = block, gridDim = grid, block_barrier = &barrier;
        for (unsigned by = 0; by < grid.y; ++by)
          for (unsigned bx = 0; bx < grid.x; ++bx) {
            blockIdx = {bx, by, 0};
            kernel(arguments...);
            __syncthreads();
          }
      });
  for (std::thread& thread : threads) thread.join();
}
