// A whole narrow stack as one kernel forward and one kernel backward, on the tensor cores of sm_80 and newer; dW and
// db take two more (wgrad.cuh). A warp takes 16 rows through all layers. Activations stay in the warp's registers
// between layers, since the accumulators of one product lie as the operand of the next. Weights wait in shared
// memory. If not all fit, they pass through it while the layers before them are computed.
//
// Forward keeps each layer's output for backward, and no z. Backward computes z again: on tensor cores a product
// should cost less than the GELU that would restore an output from z. Nothing here was measured.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/common/geometry.h"

namespace fastlane::cuda {

constexpr int64_t kMaxStackLayers = 128;  // so that all fit into a kernel's parameters
constexpr int kWarpRows = 16;
// With this much, three blocks fit on a Hopper's multiprocessor, and one where shared memory is least, 99 KiB.
constexpr int64_t kWeightBytes = int64_t{75} << 10;
// The multiprocessors of the larger GPUs. A constant, because the number decides in which order db is summed.
constexpr int64_t kMultiprocessors = 132;

// Warps of a block, and blocks that a multiprocessor's registers hold at once. Weights that pass through shared
// memory serve a whole block. So one block has all warps where weights are largest and rows come from memory in every
// layer too.
struct StackShape {
  int warps, blocks_at_once;
};
constexpr StackShape forward_shape(int64_t element) { return element == 4 ? StackShape{4, 3} : StackShape{8, 2}; }
constexpr StackShape backward_shape(int width, int64_t element) {
  return element == 4 ? StackShape{4, 3} : width == 128 ? StackShape{12, 1} : StackShape{8, 2};
}

struct NarrowLayer {
  ConstMatrix weight;  // out_features × in_features
  const void* bias = nullptr;
  void* kept = nullptr;  // rows × out_features: this layer's output
  void* dz = nullptr;  // rows × out_features
  void* db = nullptr;
  RowMajor dweight;  // out_features × in_features, or transposed
  int32_t in_features = 0, out_features = 0;
  bool adds_input = false, dweight_transposed = false;
};

// Matrices of rows are rows × features, with unit column stride. Absent operands have a null data pointer.
struct NarrowStack {
  int64_t rows = 0;
  int32_t count = 0;
  int32_t first = 0;  // the layer at which backward ends
  Activation activation = Activation::none;
  ConstRowMajor x, dy;
  RowMajor y, dx;
  float* partial_db = nullptr;  // narrow_partial_sums × count × width
  float* partial_dw = nullptr;  // chunks of WgradGeometry × count × width × width
  NarrowLayer layers[kMaxStackLayers];
};

// The columns that the kernel for these sizes computes with, or 0 if there is none. A thread holds its part of three
// matrices of a warp's rows (in backward h, dh and dz), which for 128 columns of 4 bytes would not fit its registers.
inline int narrow_width(const StackProblem& p) {
  if (p.concat || p.count > kMaxStackLayers || p.dtype == DType::f64) return 0;
  int64_t widest = 1;
  for (int64_t i = 0; i < p.count; ++i) {
    const StackLayer& layer = p.layers[i];
    if (layer.projection.data || layer.in_features == 0 || layer.out_features == 0) return 0;
    widest = std::max({widest, layer.in_features, layer.out_features});
  }
  if (widest > (p.dtype == DType::f32 ? 64 : 128)) return 0;
  return widest <= 32 ? 32 : widest <= 64 ? 64 : 128;
}

// Eight elements more than the columns keep a warp's reads of a weight in different banks. When W is read by columns
// in fp32, two lanes share a bank.
constexpr int weight_stride(int width) { return width + 8; }
constexpr int64_t layer_bytes(int width, int64_t element) {
  return width * weight_stride(width) * element + width * int64_t{sizeof(float)};
}
// Layers whose weights lie in shared memory at the same time.
constexpr int layers_at_once(int width, int64_t element) {
  return static_cast<int>(std::max<int64_t>(1, kWeightBytes / layer_bytes(width, element)));
}
// The bytes that `layers` layers take in shared memory, as far as they lie there at the same time.
inline int64_t narrow_shared_bytes(int64_t layers, int width, DType dtype) {
  const int64_t element = element_size(dtype);
  return std::min<int64_t>(layers, layers_at_once(width, element)) * layer_bytes(width, element);
}

// A block has a range of tiles of kWarpRows rows. Its warps take the tiles in turn.
inline int64_t narrow_blocks(int64_t rows, StackShape shape) {
  constexpr int64_t kLeastTiles = 4;  // few rows are faster on many multiprocessors than in full blocks
  return std::min(kMultiprocessors * shape.blocks_at_once, ceil_div(rows, kLeastTiles * kWarpRows));
}
// Each warp sums the db of its rows.
inline int64_t narrow_partial_sums(int64_t rows, int width, DType dtype) {
  const StackShape shape = backward_shape(width, element_size(dtype));
  return narrow_blocks(rows, shape) * shape.warps;
}

// A block of wgrad multiplies kWgradRows rows at a time, while the next rows come into shared memory. It sums
// chunk_rows rows, a number that the problem alone decides. There are about 512 blocks if there are rows enough, and
// more where a chunk would be too long for tensor cores' sums, which are rounded toward zero at every step.
constexpr int kWgradWarps = 4, kWgradRows = 64;
struct WgradGeometry {
  int64_t chunk_rows, chunks;

  WgradGeometry(int64_t rows, int64_t layers) {
    constexpr int64_t kMinRows = 4 * kWgradRows, kMaxRows = 1 << 15, kWantedBlocks = 512;
    const int64_t wanted_chunks = std::max<int64_t>(1, kWantedBlocks / layers);
    const int64_t wanted_rows = ceil_div(ceil_div(rows, wanted_chunks), kWgradRows) * kWgradRows;
    chunk_rows = std::clamp(wanted_rows, kMinRows, kMaxRows);
    chunks = ceil_div(rows, chunk_rows);
  }
};
// The elements of one stage: kWgradRows rows of dz and of h.
constexpr int wgrad_stage(int width) { return 2 * kWgradRows * weight_stride(width); }
inline int64_t narrow_wgrad_shared_bytes(int width, DType dtype) {
  return 2 * wgrad_stage(width) * element_size(dtype);
}

// Runs a stack of at least one row on the given stream of the current device. A failed launch throws
// std::runtime_error with its file and line.
void narrow_forward(const NarrowStack& stack, int width, DType dtype, Stream stream);
// Computes every dz and dx, then every dweight and db, for which there is a place. A layer with a dweight has a dz.
void narrow_backward(const NarrowStack& stack, int width, DType dtype, Stream stream);

}  // namespace fastlane::cuda
