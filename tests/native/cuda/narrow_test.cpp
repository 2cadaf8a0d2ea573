// Runs the kernels of a narrow stack on the host, against the same formulas in double.
#include "warp.h"
// The kernels' headers come after the headers that they run on.
#include "examples.h"
#include "kernels/cuda/narrow/stack.cuh"
#include "kernels/cuda/narrow/wgrad.cuh"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

// Launches the kernels as narrow/stack.cu does, with fewer blocks than tiles.
template <class T, int kWidth>
void run_backward(Example<T>& e, unsigned blocks) {
  const auto warps = static_cast<unsigned>(backward_shape(kWidth, sizeof(T)).warps);
  const auto layers = static_cast<unsigned>(e.stack.count);
  e.make_partial_sums(blocks * warps, kWidth);
  run_grid(dim3(blocks), dim3(warps * 32), narrow_backward_kernel<T, kWidth, HostWarp>, e.stack);
  const WgradGeometry g(e.rows, e.stack.count);
  const auto chunks = static_cast<unsigned>(g.chunks);
  run_grid(dim3(chunks, layers), dim3(kWgradWarps * 32), narrow_wgrad_kernel<T, kWidth, HostWarp>, e.stack,
           g.chunk_rows);
  run_grid(dim3(kWidth / kSumCols + kWidth * kWidth / kBlockThreads, layers), dim3(kSumCols, kSumRows),
           narrow_sum_kernel<T>, e.stack, kWidth, int64_t{blocks} * warps, g.chunks);
}
template <class T, int kWidth>
void run_forward(Example<T>& e, unsigned blocks) {
  const auto warps = static_cast<unsigned>(forward_shape(sizeof(T)).warps);
  run_grid(dim3(blocks), dim3(warps * 32), narrow_forward_kernel<T, kWidth, HostWarp>, e.stack);
}
template <class T, int kWidth>
void test(std::vector<int64_t> sizes, int64_t rows, Activation activation, bool transposed, unsigned blocks,
          int64_t gap = 1) {
  Example<T> e(std::move(sizes), rows, activation, transposed, gap);
  run_forward<T, kWidth>(e, blocks);
  e.check_forward();
  run_backward<T, kWidth>(e, blocks);
  e.check_backward();
  // Runs again without what only the first layer needs.
  if (e.stack.count == 1) return;
  e.dz[0] = Matrix<T>(rows, e.sizes[1]);
  const std::vector<T> before = e.dz[1].memory;
  for (T& value : e.dz[1].memory) value = rounded<T>(NAN);
  e.stack.first = 1, e.stack.dx = {}, e.stack.layers[0].db = nullptr, e.stack.layers[0].dz = e.dz[0].row(0);
  run_backward<T, kWidth>(e, blocks);
  for (const T value : e.dz[0].memory) CHECK(std::isnan(static_cast<float>(value)));
  CHECK(std::memcmp(before.data(), e.dz[1].memory.data(), before.size() * sizeof(T)) == 0);
}

// An infinite input stays infinite: what lies beyond a layer's columns must not make it NaN.
template <class T>
void test_infinity() {
  Example<T> e({5, 5, 5, 3}, 4, Activation::gelu, false);
  for (Matrix<T>& w : e.weights)
    for (int64_t n = 0; n < w.rows; ++n)
      for (int64_t k = 0; k < w.cols; ++k) w.row(n)[k] = rounded<T>(0.5f);
  e.x.row(2)[1] = rounded<T>(INFINITY);
  run_forward<T, 32>(e, 1);
  for (int64_t n = 0; n < 3; ++n) CHECK(std::isinf(e.y(2, n)) && std::isfinite(e.y(1, n)));
  run_backward<T, 32>(e, 1);
  for (int64_t k = 0; k < 5; ++k) CHECK(std::isfinite(e.dx(2, k)));

  Example<T> infinite({1, 1}, 1, Activation::gelu, false);
  infinite.weights[0].row(0)[0] = rounded<T>(INFINITY), infinite.x.row(0)[0] = rounded<T>(1.0f);
  run_backward<T, 32>(infinite, 1);
  CHECK(infinite.db[0](0, 0) == infinite.dy(0, 0) && infinite.dw[0](0, 0) == infinite.dy(0, 0));
}

StackProblem problem(std::vector<StackLayer>& layers, const std::vector<int64_t>& sizes, DType dtype) {
  layers.resize(sizes.size() - 1);
  for (size_t i = 0; i < layers.size(); ++i) layers[i].in_features = sizes[i], layers[i].out_features = sizes[i + 1];
  StackProblem p;
  p.dtype = dtype, p.layers = layers.data(), p.count = static_cast<int64_t>(layers.size());
  return p;
}
int width(const std::vector<int64_t>& sizes, DType dtype = DType::bf16) {
  std::vector<StackLayer> layers;
  return narrow_width(problem(layers, sizes, dtype));
}

void test_plan() {
  CHECK(width({3, 3, 1}) == 32 && width({16, 32}) == 32 && width({25, 43, 54}) == 64 && width({64, 65}) == 128);
  CHECK(width({128, 129}) == 0 && width({64, 65}, DType::f32) == 0 && width({64, 64}, DType::f32) == 64);
  CHECK(width({64, 64}, DType::f64) == 0 && width({8, 0, 8}) == 0);
  CHECK(width(std::vector<int64_t>(129, 64)) == 64 && width(std::vector<int64_t>(130, 64)) == 0);
  std::vector<StackLayer> layers;
  StackProblem p = problem(layers, {8, 8}, DType::bf16);
  p.concat = true;
  CHECK(narrow_width(p) == 0);
  p.concat = false, layers[0].projection.data = &p;
  CHECK(narrow_width(p) == 0);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    for (const int w : {32, 64, 128}) {
      const int64_t element = element_size(dtype);
      for (int64_t layers = 1; layers <= kMaxStackLayers; ++layers)
        CHECK(narrow_shared_bytes(layers, w, dtype) <= kWeightBytes);
      if (w < 128 || element == 2) CHECK(layers_at_once(w, element) >= 2);
    }
  CHECK(sizeof(NarrowStack) + 64 <= 32764);  // the most bytes of parameters since CUDA 12.1
  for (const int64_t layers : {1, 8, 128})
    for (const int64_t rows : {1, 256, 257, 1 << 17, 1 << 30}) {
      const WgradGeometry g(rows, layers);
      CHECK(g.chunk_rows % kWgradRows == 0 && g.chunks * g.chunk_rows >= rows &&
            (g.chunks - 1) * g.chunk_rows < rows);
      CHECK(g.chunk_rows <= 1 << 15 && (g.chunks <= std::max<int64_t>(1, 512 / layers) || g.chunk_rows == 1 << 15));
    }
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    CHECK(narrow_wgrad_shared_bytes(dtype == DType::f32 ? 64 : 128, dtype) <= kWeightBytes);
  const int64_t huge = (int64_t{1} << 40) + 1;
  const StackShape shape{8, 2};
  CHECK(narrow_blocks(huge, shape) == 264 && narrow_blocks(1, shape) == 1 && narrow_blocks(129, shape) == 3);
  CHECK(narrow_partial_sums(1, 128, DType::bf16) == 12 && narrow_partial_sums(huge, 64, DType::f32) == 132 * 12);
}

}  // namespace

int main() {
  test_plan();
  test_infinity<__nv_bfloat16>();
  test_infinity<float>();
  test<__nv_bfloat16, 32>({3, 3, 3, 3, 3, 1}, 1, Activation::gelu, false, 1);
  test<__nv_bfloat16, 64>({25, 25, 43, 43, 54, 54}, 70, Activation::gelu, true, 1);
  test<__nv_bfloat16, 64>(std::vector<int64_t>(13, 64), 300, Activation::gelu_tanh, false, 2);
  test<__nv_bfloat16, 128>({100, 128, 128, 128, 7}, 140, Activation::gelu, false, 2);
  test<__nv_bfloat16, 128>({128, 128, 128, 128}, 230, Activation::gelu, false, 1, /*gap=*/0);
  // Aligned rows with NaN between them, whose columns are a multiple of a 16-byte copy, and not.
  test<__nv_bfloat16, 128>({96, 96, 120}, 70, Activation::gelu, false, 1, /*gap=*/8);
  test<__nv_bfloat16, 128>({100, 100, 100}, 70, Activation::gelu, false, 1, /*gap=*/4);
  test<__nv_bfloat16, 64>({64, 64, 64}, 70, Activation::gelu, false, 1, /*gap=*/0);
  test<__half, 32>({16, 16, 16}, 400, Activation::none, false, 3);
  test<float, 32>({17, 32, 32, 5}, 130, Activation::gelu, false, 1);
  test<float, 64>({64, 64, 64, 64, 64, 64, 64, 33}, 129, Activation::gelu_tanh, true, 2);
  return failures != 0;
}
