// The caller lends a kernel its thread pool, since kernels start no threads, and the cache sizes to block for.
#pragma once

#include <cstdint>

#include "kernels/cpu/caches.h"

namespace fastlane {

struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);

  int64_t threads = 1;
  // Splits [0, tasks) over the pool and returns when all tasks are done.
  void (*run)(int64_t tasks, Body body, void* context) = nullptr;
  Caches caches;

  template <class Task>
  void for_each(int64_t tasks, Task task) const {
    const Body body = [](void* context, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) (*static_cast<Task*>(context))(i);
    };
    if (threads <= 1 || tasks <= 1 || run == nullptr) {
      body(&task, 0, tasks);
    } else {
      run(tasks, body, &task);
    }
  }
};

}  // namespace fastlane
