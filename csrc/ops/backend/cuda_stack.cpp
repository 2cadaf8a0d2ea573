#include "ops/backend/cuda_stack.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/common/gpu.h"
#include "kernels/cuda/narrow/stack.h"
#include "ops/path.h"

namespace fastlane {
namespace {

at::TensorOptions options_of(DType dtype) {
  const at::ScalarType type = dtype == DType::bf16 ? at::kBFloat16 : dtype == DType::f16 ? at::kHalf : at::kFloat;
  return at::TensorOptions(at::kCUDA).dtype(type);
}

cuda::NarrowStack narrow_stack(const StackProblem& p) {
  cuda::NarrowStack s;
  s.rows = p.rows, s.count = static_cast<int32_t>(p.count), s.activation = p.activation;
  s.x = p.x, s.y = p.y, s.dy = p.dy, s.dx = p.dx;
  for (int64_t i = 0; i < p.count; ++i) {
    const StackLayer& from = p.layers[i];
    cuda::NarrowLayer& to = s.layers[i];
    to.weight = from.weight, to.bias = from.bias, to.kept = from.z.data, to.db = from.db;
    to.dweight = from.dweight, to.dweight_transposed = from.dweight_transposed;
    to.in_features = static_cast<int32_t>(from.in_features);
    to.out_features = static_cast<int32_t>(from.out_features);
    to.adds_input = from.adds_input;
  }
  return s;
}

// One tensor for the rows × out_features of every layer i with wanted(i). Calls place(i, address) for each.
template <class Wanted, class Place>
at::Tensor rows_of_layers(const StackProblem& p, Wanted wanted, Place place) {
  int64_t features = 0;
  for (int64_t i = 0; i < p.count; ++i)
    if (wanted(i)) features += p.layers[i].out_features;
  at::Tensor memory = at::empty({p.rows * features}, options_of(p.dtype));
  char* data = static_cast<char*>(memory.mutable_data_ptr());
  for (int64_t i = 0; i < p.count; ++i) {
    if (!wanted(i)) continue;
    place(i, data);
    data += p.rows * p.layers[i].out_features * element_size(p.dtype);
  }
  return memory;
}

}  // namespace

// Forward and backward both ask this and must get the same answer, since forward decides the content of z's memory.
// So the function reads nothing that a user can change between them.
bool cuda_is_one_kernel(const StackProblem& p) {
  return p.rows > 0 && forced_path() != Path::library && cuda::narrow_width(p) > 0 &&
         cuda::current_gpu().capability >= 80;
}

void cuda_stack_forward(const StackProblem& p) {
  cuda::narrow_forward(narrow_stack(p), cuda::narrow_width(p), p.dtype, c10::cuda::getCurrentCUDAStream());
}

void cuda_stack_backward(const StackProblem& p) {
  const int width = cuda::narrow_width(p);
  const cuda::Stream stream = c10::cuda::getCurrentCUDAStream();
  cuda::NarrowStack s = narrow_stack(p);
  at::Tensor kept;
  if (p.count > 1 && !s.layers[0].kept) {
    kept = rows_of_layers(
        p, [&](int64_t i) { return i + 1 < p.count; }, [&](int64_t i, void* data) { s.layers[i].kept = data; });
    cuda::narrow_forward(s, width, p.dtype, stream);
  }
  const at::Tensor dz = rows_of_layers(
      p, [&](int64_t i) { return p.layers[i].dweight.data != nullptr; },
      [&](int64_t i, void* data) { s.layers[i].dz = data; });
  bool any_db = false, any_dweight = false;
  s.first = s.count;
  for (int32_t i = s.count; i-- > 0;) {
    any_db |= s.layers[i].db != nullptr, any_dweight |= s.layers[i].dweight.data != nullptr;
    if (p.dx.data || s.layers[i].db || s.layers[i].dweight.data) s.first = p.dx.data ? 0 : i;
  }
  at::Tensor partial_db, partial_dw;
  const auto floats = [&](at::Tensor& memory, int64_t size) {
    memory = at::empty({size * p.count * width}, options_of(DType::f32));
    return static_cast<float*>(memory.mutable_data_ptr());
  };
  if (any_db) s.partial_db = floats(partial_db, cuda::narrow_partial_sums(p.rows, width, p.dtype));
  if (any_dweight) s.partial_dw = floats(partial_dw, cuda::WgradGeometry(p.rows, p.count).chunks * width);
  cuda::narrow_backward(s, width, p.dtype, stream);
}

}  // namespace fastlane
