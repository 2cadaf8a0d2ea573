// Shared parts of products with few rows. These products pack at most a panel of B at a time, and fetching B from
// memory is their cost.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

inline bool multiplies_as_stored(const GemmProblem& p) {
  return p.a_activation == Activation::none && p.b_activation == Activation::none;
}

inline int64_t few_rows_threads(const GemmProblem& p, const Parallel& parallel) {
  const double multiply_adds = static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  return multiply_adds < kSerialMultiplyAdds ? 1 : parallel.threads;
}

// Calls run(col, cols) for tasks of at most `max_cols` columns, cut evenly, at multiples of `width`.
template <class Run>
void for_columns(const GemmProblem& p, int64_t width, int64_t max_cols, Parallel parallel, Run run) {
  parallel.threads = few_rows_threads(p, parallel);
  const int64_t groups = ceil_div(p.n, width);
  const int64_t tasks = std::min(groups, parallel.threads * ceil_div(p.n, parallel.threads * max_cols));
  const int64_t task_cols = ceil_div(groups, tasks) * width;
  parallel.for_each(ceil_div(p.n, task_cols),
                    [&](int64_t i) { run(i * task_cols, std::min(task_cols, p.n - i * task_cols)); });
}

FASTLANE_END_TARGET
