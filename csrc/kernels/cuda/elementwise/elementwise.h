// The passes around a library's GEMM on a CUDA GPU. They run on the given stream of the current device and wait for
// nothing. A failed launch throws std::runtime_error with its file and line.
#pragma once

#include <cstddef>

#include "kernels/problem.h"

struct CUstream_st;

namespace fastlane::cuda {

using Stream = CUstream_st*;

// In one pass over the product.
void epilogue(const EpilogueProblem& problem, Stream stream);

// Computes dz, and db in a fixed order of additions. `workspace` has preactivation_grad_workspace(problem) bytes,
// aligned to 8.
size_t preactivation_grad_workspace(const PreActivationGradProblem& problem);
void preactivation_grad(const PreActivationGradProblem& problem, void* workspace, Stream stream);

// Adds up `rows` rows of partial sums in a fixed order. Partial sums are double for f64, otherwise float. `sums` has
// `cols` elements of `dtype`.
void sum_rows(const ConstRowMajor& partial, int64_t rows, int64_t cols, DType dtype, void* sums, Stream stream);

}  // namespace fastlane::cuda
