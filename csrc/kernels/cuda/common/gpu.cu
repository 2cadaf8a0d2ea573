#include "kernels/cuda/common/gpu.h"

#include "kernels/cuda/common/launch.cuh"

namespace fastlane::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute", __FILE__, __LINE__);
  return value;
}

}  // namespace

Gpu current_gpu() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice", __FILE__, __LINE__);
  return {attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
              attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device)};
}

}  // namespace fastlane::cuda
