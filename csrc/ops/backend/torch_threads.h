// Torch's threads, lent to kernels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "kernels/cpu/arithmetic.h"
#include "kernels/cpu/parallel.h"

#ifndef _OPENMP
// Clang compiles OpenMP's pragmas for LLVM's runtime. Torch has loaded GNU's on Linux, and a second runtime would not
// follow torch.set_num_threads. So a build by clang has no pragmas and calls the runtime that torch has loaded;
// LLVM's exports these names too.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* context, unsigned int threads, unsigned int flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace fastlane {

#ifdef _OPENMP
inline void on_torch_threads(int64_t tasks, Parallel::Body body, void* context) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
#else
// This function shares tasks as at::parallel_for does. Without OpenMP's pragmas torch's header would use one thread.
inline void on_torch_threads(int64_t tasks, Parallel::Body body, void* context) {
  struct Region {
    int64_t tasks;
    Parallel::Body body;
    void* context;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error;

    void run_share() {
      const int64_t thread = omp_get_thread_num(), share = ceil_div(tasks, omp_get_num_threads());
      if (thread * share >= tasks) return;
      const at::internal::ThreadIdGuard id(static_cast<int>(thread));
      const c10::ParallelGuard inside(true);
      try {
        body(context, thread * share, std::min(tasks, (thread + 1) * share));
      } catch (...) {
        if (!failed.test_and_set()) error = std::current_exception();
      }
    }
  };
  at::internal::lazy_init_num_threads();
  if (tasks <= 1 || at::in_parallel_region() || at::get_num_threads() <= 1) {
    const at::internal::ThreadIdGuard id(0);
    const c10::ParallelGuard inside(true);
    return body(context, 0, tasks);
  }
  Region region{tasks, body, context};
  GOMP_parallel([](void* of) { static_cast<Region*>(of)->run_share(); }, &region, /*threads=*/0, /*flags=*/0);
  if (region.error) std::rethrow_exception(region.error);
}
#endif

}  // namespace fastlane
