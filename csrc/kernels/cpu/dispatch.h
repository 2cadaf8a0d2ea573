// Which kernel set this process runs: the set that FASTLANE_CPU_ISA names, otherwise the best set that the CPU and
// the operating system support, or none where torch's operators are faster.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/problem.h"

namespace fastlane {

struct KernelTable {
  const char* isa;
  void (*gemm)(const GemmProblem&, const Parallel&);
  // The epilogue of `gemm` alone, in one pass over an m × n product that lies in memory, perhaps in z or out.
  void (*epilogue)(const GemmProblem&, const ConstRowMajor& product, const Parallel&);
  void (*preactivation_grad)(const PreActivationGradProblem&, const Parallel&);
  // One pass over the rows, with dz in L2. Returns false, and does nothing, if the layer is too wide for this.
  bool (*layer_backward)(const LayerBackwardProblem&, const Parallel&);
  // The same for an MLP.
  bool (*mlp_backward)(const MlpBackwardProblem&, const Parallel&);
  // Both take a block of rows through all layers while the block lies in cache, for stacks that narrow_stack.h calls
  // narrow.
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

// `asked` is the value of FASTLANE_CPU_ISA; `supported` lists the sets that run here, best first. The scalar set
// takes many times as long as torch's vectorised operators, so the scalar set runs only if asked for. Throws
// std::runtime_error if `asked` is neither empty, nor supported, nor kNoIsa.
IsaChoice choose_isa(const std::string& asked, const std::vector<std::string>& supported);

// Decided once, on first use.
const IsaChoice& chosen_isa();

// The kernels of the chosen set. The set `none` has the scalar kernels, and no operator calls them.
const KernelTable& kernels();

std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

}  // namespace fastlane
