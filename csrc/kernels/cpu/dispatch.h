// Which kernel set this process runs: the set that FASTLANE_CPU_ISA names, otherwise the best set that the CPU and
// the operating system support, or none where torch's operators are faster.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/gemm_plan.h"
#include "kernels/cpu/parallel.h"
#include "kernels/problem.h"

namespace fastlane {

template <class Result, class... Arguments>
using Kernel = Result (*)(const Arguments&..., const Parallel&);

// The kernels of a set, each with the type of its result and its arguments; the first is a problem with a dtype. The
// table below, the ISA files' functions and the forwarding of avx512_bf16 follow from this list.
//
// `plan` computes nothing: it returns the plan that `gemm` would follow. `panel_bytes` is the size of B's panels;
// `pack` returns false, and the panels are worthless, if the set's product would drop one of B's values
// (product-inl.h). `layer_backward` and `mlp_backward` pass over the rows once, with dz in L2; they return false, and
// do nothing, where the layer is too wide for that. The stacks' kernels take a block of rows through all layers while
// the block lies in cache, for layers that narrow_stack.h calls narrow.
#define FASTLANE_PRODUCTS(KERNEL)                    \
  KERNEL(gemm, void, GemmProblem)                    \
  KERNEL(plan, GemmPlan, GemmProblem)                \
  KERNEL(panel_bytes, int64_t, PanelsProblem)        \
  KERNEL(pack, bool, PanelsProblem)                  \
  KERNEL(unpack, void, UnpackProblem)                \
  KERNEL(layer_backward, bool, LayerBackwardProblem) \
  KERNEL(mlp_backward, bool, MlpBackwardProblem)     \
  KERNEL(stack_forward, void, StackProblem)          \
  KERNEL(stack_backward, void, StackProblem)
#define FASTLANE_PASSES(KERNEL)           \
  KERNEL(epilogue, void, EpilogueProblem) \
  KERNEL(preactivation_grad, void, PreActivationGradProblem)
#define FASTLANE_KERNELS(KERNEL) FASTLANE_PRODUCTS(KERNEL) FASTLANE_PASSES(KERNEL)

struct KernelTable {
  const char* isa;
#define FASTLANE_MEMBER(name, ...) Kernel<__VA_ARGS__> name;
  FASTLANE_KERNELS(FASTLANE_MEMBER)
#undef FASTLANE_MEMBER
};

// A table of the functions that have the kernels' names where the macro stands.
#define FASTLANE_ENTRY(name, ...) name,
#define FASTLANE_KERNEL_TABLE(isa) {isa, FASTLANE_KERNELS(FASTLANE_ENTRY)}

// Null where the set was not compiled for this architecture.
const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512_bf16_kernels();
const KernelTable* neon_kernels();

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

// The kernels of a set that runs here; null for any other name.
const KernelTable* kernels_of(const std::string& isa);

// Whether this CPU is AMD's Zen 3, Zen 4 or Zen 5.
bool core_is_zen3_to_zen5();

std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

}  // namespace fastlane
