// The path of a call: one fused product, or the library's product and one fused pass over it, or torch's own
// operators alone.
#pragma once

#include <cstdint>
#include <optional>

#include "kernels/layer.h"
#include "kernels/problem.h"

namespace fastlane {

// `fused`: this library's own kernels. `library`: the library's products and our passes. `hopper`: the fused product
// of a CUDA GPU of capability 9.0. `torch`: torch's operators, on a CPU without vector kernels of ours.
enum class Path : uint8_t { fused, library, hopper, torch };
constexpr int kPaths = 4;
constexpr const char* kPathNames[kPaths] = {"fused", "library", "hopper", "torch"};

// The path of several products: the library's, if any product took the library's.
class CommonPath {
 public:
  void add(Path path) {
    if (!path_ || path == Path::library) path_ = path;
  }
  Path path() const { return path_.value_or(Path::fused); }

 private:
  std::optional<Path> path_;
};

// The path that FASTLANE_PATH names; read once. Throws c10::ValueError if its value is neither fused nor library.
std::optional<Path> forced_path();

// The columns of the tile that every product with a Hopper kernel of this tile takes; 0 lets each product choose.
// Tests and measurements set it.
int64_t forced_hopper_tile_cols();
void force_hopper_tile_cols(int64_t cols);

// Whether CPU tensors take the path `torch`. Decided once. Throws c10::ValueError if they do and FASTLANE_PATH asks
// for kernels.
bool torch_runs_on_cpu();

// Whether anybody has measured this CPU with the chosen kernel set. Otherwise products run in the library until
// `fastlane tune` has measured them.
bool cpu_is_measured();

// Whether CPU tensors of these shapes take the path `fused`, otherwise `library`: as FASTLANE_PATH says, or the
// profile of `fastlane tune` (profile.h), or the rules of path.cpp.
bool fuses_forward(const LayerShape& shape);
bool fuses_backward(const LayerShape& shape);
// Whether a forward of so many rows reads a frozen weight's panels rather than the weight itself.
bool reads_frozen_panels(int64_t rows);

bool fuses_mlp_forward(const LayerShape& fc1, const LayerShape& fc2);
bool fuses_mlp_backward(const LayerShape& fc1, const LayerShape& fc2);
// Whether a narrow stack runs as one kernel.
bool fuses_stack(const StackProblem& p);

}  // namespace fastlane
