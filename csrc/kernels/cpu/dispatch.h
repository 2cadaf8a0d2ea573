// Which kernel set this process runs: the best the CPU and the operating system support, or the one that
// FASTLANE_CPU_ISA names; or none, where that is faster.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/problem.h"

namespace fastlane {

struct KernelTable {
  const char* isa;
  void (*gemm)(const GemmProblem&, const Parallel&);
  // The epilogue of `gemm` alone, in one pass over a product, m × n, that is there already; it may lie in z or out.
  void (*epilogue)(const GemmProblem&, const ConstRowMajor& product, const Parallel&);
  void (*preactivation_grad)(const PreActivationGradProblem&, const Parallel&);
  // In one pass over the rows, dz staying in L2; false, and nothing done, where the layer is too wide for that.
  bool (*layer_backward)(const LayerBackwardProblem&, const Parallel&);
  // The same for an MLP.
  bool (*mlp_backward)(const MlpBackwardProblem&, const Parallel&);
  // A block of rows through all layers while it lies in cache; for layers that stack.h calls narrow.
  void (*stack_forward)(const StackProblem&, const Parallel&);
  void (*stack_backward)(const StackProblem&, const Parallel&);
};

// Null where the set was not compiled for this architecture.
const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512_bf16_kernels();

// No kernels of ours: torch's own operators run.
constexpr const char* kNoIsa = "none";

struct IsaChoice {
  std::string isa;  // a set's name, or kNoIsa
  std::string reason;
};

// `asked` is what FASTLANE_CPU_ISA says, `supported` lists what runs here, best first. The scalar set takes many
// times as long as torch's vectorised operators, so it runs only if asked for. Throws std::runtime_error if `asked`
// is neither empty, nor supported, nor kNoIsa.
IsaChoice choose_isa(const std::string& asked, const std::vector<std::string>& supported);

// Decided once, on first use.
const IsaChoice& chosen_isa();

// The kernels of the chosen set. The set `none` has the scalar kernels, and no operator calls them.
const KernelTable& kernels();

std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

}  // namespace fastlane
