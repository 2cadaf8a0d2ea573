#include "runtime.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <utility>

#include "tensor_map.h"

namespace ptx {
namespace {

// Filled by the initialisers of the objects that nvcc compiled.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of_functions;
  return of_functions;
}
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> by_name;
  return by_name;
}

uint8_t bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32: return 4;
    default: return 0;
  }
}

// cuTensorMapEncodeTiled, with the limits of the driver API's manual.
CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  const auto refuse = [](const char* what) {
    std::printf("cuTensorMapEncodeTiled: %s\n", what);
    return CUDA_ERROR_INVALID_VALUE;
  };
  TensorMap map{};
  map.mark = TensorMap::kMark;
  map.element_bytes = bytes_of(type);
  if (map.element_bytes == 0) return refuse("a data type that no kernel here should have");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return refuse("a mode that no kernel here should have");
  if (rank < 1 || rank > 5) return refuse("rank");
  if (reinterpret_cast<uintptr_t>(out) % 64 != 0) return refuse("alignment of the tensor map");
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return refuse("alignment of the tensor");
  map.base = static_cast<uint8_t*>(base);
  map.rank = static_cast<uint8_t>(rank);
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (sizes[d] == 0 || sizes[d] > cuuint64_t{1} << 32) return refuse("size");
    if (box[d] == 0 || box[d] > 256 || element_strides[d] != 1) return refuse("box");
    map.sizes[d] = sizes[d], map.box[d] = static_cast<uint16_t>(box[d]);
    if (d == 0) continue;
    if (strides[d - 1] % 16 != 0 || strides[d - 1] >= cuuint64_t{1} << 40) return refuse("stride");
    map.strides[d - 1] = strides[d - 1];
  }
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: map.swizzle_bits = 0; break;
    case CU_TENSOR_MAP_SWIZZLE_32B: map.swizzle_bits = 1; break;
    case CU_TENSOR_MAP_SWIZZLE_64B: map.swizzle_bits = 2; break;
    case CU_TENSOR_MAP_SWIZZLE_128B: map.swizzle_bits = 3; break;
    default: return refuse("swizzle");
  }
  const cuuint32_t row = box[0] * map.element_bytes;
  if (row % 16 != 0 || (map.swizzle_bits > 0 && row != 16u << map.swizzle_bits)) return refuse("row of the box");
  std::memset(static_cast<void*>(out), 0, sizeof *out);
  std::memcpy(static_cast<void*>(out), &map, sizeof map);
  return CUDA_SUCCESS;
}

// The shared memory that a GPU of capability 9.0 gives a block, and gives a kernel that did not ask for more.
constexpr size_t kMostSharedBytes = size_t{227} << 10, kSharedBytesUnasked = size_t{48} << 10;
std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> of_functions;
  return of_functions;
}

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes = 0;
};
// The configuration of the launch by <<<>>> that is under way.
Configuration pushed;

Size3 size_of(dim3 d) { return {d.x, d.y, d.z}; }

cudaError_t launch(const void* function, const Configuration& c, Size3 cluster, void** arguments) {
  const auto found = kernels().find(names()[function]);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  const auto limit = shared_limits().find(function);
  if (c.shared_bytes > (limit == shared_limits().end() ? kSharedBytesUnasked : limit->second))
    return cudaErrorInvalidValue;
  const unsigned threads = c.block.x * c.block.y * c.block.z, blocks_of_cluster = cluster.x * cluster.y * cluster.z;
  if (c.grid.x == 0 || c.grid.y - 1 >= 65535 || c.grid.z - 1 >= 65535 || threads - 1 >= 1024 ||
      blocks_of_cluster - 1 >= 8)
    return cudaErrorInvalidConfiguration;
  ++runtime().launches;
  runtime().kernels.insert(found->first);
  static Machine machine(0, {});  // keeps its memory
  machine.random.seed(runtime().seed++), machine.allowed = runtime().allowed;
  machine.launch(found->second, size_of(c.grid), cluster, size_of(c.block), c.shared_bytes, arguments);
  return cudaSuccess;
}

// The error that cudaGetLastError returns.
cudaError_t latest_error = cudaSuccess;
cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) latest_error = error;
  return error;
}

}  // namespace

Runtime& runtime() {
  static Runtime only;
  return only;
}

size_t load(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::map<std::string, Kernel> of_file = parse({std::istreambuf_iterator<char>(file), {}});
  const size_t count = of_file.size();
  kernels().merge(of_file);
  return count;
}

}  // namespace ptx

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  ptx::names()[function] = name;
}

// What <<<>>> becomes.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st*) {
  ptx::pushed = {grid, block, shared_bytes};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void*) {
  *grid = ptx::pushed.grid, *block = ptx::pushed.block, *shared_bytes = ptx::pushed.shared_bytes;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t) {
  return ptx::noted(ptx::launch(kernel, {grid, block, shared_bytes}, {}, arguments));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  ptx::Size3 cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
  }
  return ptx::noted(
      ptx::launch(function, {config->gridDim, config->blockDim, config->dynamicSmemBytes}, cluster, arguments));
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const auto bytes = static_cast<size_t>(value);
  if (bytes > ptx::kMostSharedBytes) return ptx::noted(cudaErrorInvalidValue);
  ptx::shared_limits()[function] = bytes;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNotSupported; }
cudaError_t cudaGetLastError() { return std::exchange(ptx::latest_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "an error of tests/native/ptx"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::string(symbol) != "cuTensorMapEncodeTiled") return cudaErrorSymbolNotFound;
  *function = reinterpret_cast<void*>(ptx::encode);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
