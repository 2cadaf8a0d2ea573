#include "cuda_stack.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "../kernels/cuda/gpu.h"
#include "../kernels/cuda/narrow_stack.h"
#include "layer_calls.h"
#include "path.h"

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
    to.in_features = static_cast<int32_t>(from.in_features);
    to.out_features = static_cast<int32_t>(from.out_features);
    to.adds_input = from.adds_input;
  }
  return s;
}

// One tensor for the rows × out_features of the layers for which `wanted` holds; `place` hears where each begins.
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

at::Tensor matrix_at(const void* data, int64_t rows, int64_t cols, int64_t row_stride, DType dtype) {
  return at::for_blob(const_cast<void*>(data), {rows, cols})
      .strides({row_stride, 1})
      .options(options_of(dtype))
      .target_device(at::Device(at::kCUDA, c10::cuda::current_device()))
      .make_tensor();
}

void wgrad(const StackProblem& p, const cuda::NarrowStack& s, int64_t i) {
  const StackLayer& l = p.layers[i];
  const at::Tensor dz = matrix_at(s.layers[i].dz, p.rows, l.out_features, l.out_features, p.dtype);
  const at::Tensor h = i == 0 ? matrix_at(p.x.data, p.rows, l.in_features, p.x.row_stride, p.dtype)
                              : matrix_at(s.layers[i - 1].kept, p.rows, l.in_features, l.in_features, p.dtype);
  const int64_t rows = l.dweight_transposed ? l.in_features : l.out_features;
  const int64_t cols = l.dweight_transposed ? l.out_features : l.in_features;
  at::Tensor dweight = matrix_at(l.dweight.data, rows, cols, l.dweight.row_stride, p.dtype);
  if (l.dweight_transposed) {
    at::mm_out(dweight, h.t(), dz);
  } else {
    at::mm_out(dweight, dz.t(), h);
  }
}

}  // namespace

// Whether forward and backward agree must not follow from what a user may change in between.
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
  bool any_db = false;
  s.first = s.count;
  for (int32_t i = s.count; i-- > 0;) {
    any_db |= s.layers[i].db != nullptr;
    if (p.dx.data || s.layers[i].db || p.layers[i].dweight.data) s.first = p.dx.data ? 0 : i;
  }
  at::Tensor partial_db;
  if (any_db) {
    partial_db = at::empty({cuda::narrow_partial_sums(p.rows) * p.count * width}, options_of(DType::f32));
    s.partial_db = static_cast<float*>(partial_db.mutable_data_ptr());
  }
  cuda::narrow_backward(s, width, p.dtype, stream);
  const OwnCalls own_calls;
  for (int64_t i = s.first; i < p.count; ++i)
    if (p.layers[i].dweight.data) wgrad(p, s, i);
}

}  // namespace fastlane
