// Which path a call takes: one fused product, or the library's product and one fused pass over it.
#pragma once

#include <cstdint>
#include <optional>

#include "../kernels/layer.h"

namespace fastlane {

// `hopper` is the fused product of a CUDA GPU of capability 9.0; `fused` are this library's own kernels.
enum class Path : uint8_t { fused, library, hopper };
constexpr int kPaths = 3;
constexpr const char* kPathNames[kPaths] = {"fused", "library", "hopper"};

// The path of several products: the library's, if any of them is.
class CommonPath {
 public:
  void add(Path path) {
    if (!path_ || path == Path::library) path_ = path;
  }
  Path path() const { return path_.value_or(Path::fused); }

 private:
  std::optional<Path> path_;
};

// What FASTLANE_PATH says; read once. Throws c10::ValueError if that is neither fused nor library.
std::optional<Path> forced_path();

Path cpu_forward_path(const LayerShape& shape);
Path cpu_backward_path(const LayerShape& shape);

}  // namespace fastlane
