// Stands in for the CUDA runtime: host code that nvcc compiled links against it, and its launches run on a Machine.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

struct Runtime {
  uint64_t seed = 0;  // of the next launch
  std::vector<Range> allowed;  // the memory that kernels may touch
  int launches = 0;
  std::set<std::string> kernels;  // that were launched
};
Runtime& runtime();

// Makes the kernels of a PTX file known, and says how many there are.
size_t load(const std::string& path);

}  // namespace ptx
