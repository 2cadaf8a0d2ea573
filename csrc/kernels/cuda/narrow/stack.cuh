// The kernels of a narrow stack. `Warp` is what a warp does together (warp.cuh).
#pragma once

#include "kernels/cuda/common/column_sums.cuh"
#include "kernels/cuda/narrow/layer_queue.cuh"

namespace fastlane::cuda {

// A lane's place in its block, and what its warp does with 16 rows.
template <class T, int kWidth, class Warp>
struct StackWarp {
  using S = Slice<T>;
  static constexpr int kSlices = kWidth / S::kCols, kTiles = S::kTiles, kStride = weight_stride(kWidth);
  static constexpr int kForwardWarps = forward_shape(sizeof(T)).warps;
  static constexpr int kBackwardWarps = backward_shape(kWidth, sizeof(T)).warps;
  using Rows = S[kSlices];
  // Without a branch between slices, one slice's activation overlaps with the next slice's product. Only these
  // kernels have registers for the overlap.
  static constexpr bool kOverlaps = sizeof(T) == 2 && kWidth <= 64;

  const NarrowStack& p;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  __device__ int col_of(int slice, int tile) const { return slice * S::kCols + tile * 8 + 2 * t; }
  // Calls f(slice, tile, column of its first element).
  template <class F>
  __device__ void each_tile(F f) const {
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) f(s, j, col_of(s, j));
  }
  template <class F>
  __device__ void each_pair(F f) const {
    each_tile([&](int s, int j, int col) { f(s, j, 0, col), f(s, j, 1, col); });
  }

  // A lane's two rows of a matrix.
  template <class E>
  struct Places {
    E* row[2];
    bool present[2];
    bool pairs;  // all columns are there, and both elements of a pair can be read or written at once

    __device__ Places(const StackWarp& w, int64_t row_tile, E* data, int64_t stride, int cols)
        : pairs(cols == kWidth && stride % 2 == 0 && reinterpret_cast<uintptr_t>(data) % (2 * sizeof(T)) == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = row_tile * kWarpRows + 8 * half + w.g;
        row[half] = data + at * stride, present[half] = at < w.p.rows;
      }
    }
  };
  __device__ void read(Rows& rows, int64_t row_tile, const void* data, int64_t stride, int cols) const {
    const Places<const T> from(*this, row_tile, static_cast<const T*>(data), stride, cols);
    if (from.pairs) {
      each_pair([&](int s, int j, int half, int col) {
        const auto* const at = reinterpret_cast<const typename S::Pair*>(from.row[half] + col);
        rows[s].set_pair(j, half, from.present[half] ? *at : typename S::Pair{});
      });
      return;
    }
    each_tile([&](int s, int j, int col) {
      float c[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool present = from.present[i / 2] && col + i % 2 < cols;
        c[i] = present ? widen(from.row[i / 2][col + i % 2]) : 0.0f;
      }
      rows[s].set(j, c);
    });
  }
  __device__ void write(const Rows& rows, int64_t row_tile, void* data, int64_t stride, int cols) const {
    const Places<T> to(*this, row_tile, static_cast<T*>(data), stride, cols);
    if (to.pairs) {
      each_pair([&](int s, int j, int half, int col) {
        if (to.present[half]) *reinterpret_cast<typename S::Pair*>(to.row[half] + col) = rows[s].pair(j, half);
      });
      return;
    }
    each_tile([&](int s, int j, int col) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (to.present[i / 2] && col + i % 2 < cols) to.row[i / 2][col + i % 2] = rounded<T>(rows[s].at(j, i));
    });
  }

  // Has rows brought into L2 that will be read soon: two lines of each row, which is the whole row if it begins on a
  // line.
  __device__ void prefetch(int64_t row_tile, const void* data, int64_t stride, int cols) const {
    constexpr int kLine = 128 / sizeof(T);
    const int lane = threadIdx.x % 32, col = lane % 2 * kLine;
    const int64_t row = row_tile * kWarpRows + lane / 2;
    if (row < p.rows && col < cols) Warp::prefetch(static_cast<const T*>(data) + row * stride + col);
  }

  // Adds rows · Wᵀ, or rows · W if kTransposed, to the sums of a slice of columns.
  template <bool kTransposed>
  __device__ void multiply_add(const Rows& rows, const T* weight, int slice, Sums<T> (&sums)[kTiles]) const {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int n = kTransposed ? s : slice, k = kTransposed ? slice : s;
      uint32_t b[kTiles][2];
      S::template read_b<kTransposed, Warp>(weight + n * S::kCols * kStride + k * S::kCols, kStride, b);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) sums[j].template multiply_add<Warp>(rows[s].r, b[j]);
    }
  }
  // Calls f(slice, its tiles' z) for each slice of a layer's product.
  template <class F>
  __device__ void each_z(const Rows& h, int layer, const SharedLayer<T>& shared, F f) const {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      Sums<T> sums[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const auto b = load<2>(shared.bias + col_of(s, j));
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j].start(i, b.v[i % 2]);
      }
      if (kOverlaps || s * S::kCols < p.layers[layer].out_features) multiply_add<false>(h, shared.weight, s, sums);
      f(s, sums);
    }
  }
  // Makes zero what lies beyond the columns: 0 · inf would be NaN.
  __device__ void keep_columns(Rows& rows, int cols) const {
    if (cols == kWidth) return;
    each_pair([&](int s, int j, int half, int col) { rows[s].keep(j, half, cols - col); });
  }

  // Replaces h, the layer's input, by the layer's output.
  __device__ void forward(Rows& h, int layer, const SharedLayer<T>& shared) const {
    const NarrowLayer& l = p.layers[layer];
    Rows next;
    const auto finish = [&](auto activation, int s, const Sums<T>(&z)[kTiles]) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[i] = activation.template value<T>(z[j][i]);
          if (l.adds_input) y[i] += h[s].at(j, i);
        }
        next[s].set(j, y);
      }
    };
    if constexpr (kOverlaps) {
      with_activation(p.activation, [&](auto activation) {
        each_z(h, layer, shared, [&](int s, const Sums<T>(&z)[kTiles]) { finish(activation, s, z); });
      });
    } else {
      each_z(h, layer, shared, [&](int s, const Sums<T>(&z)[kTiles]) {
        with_activation(p.activation, [&](auto activation) { finish(activation, s, z); });
      });
    }
#pragma unroll
    for (int s = 0; s < kSlices; ++s) h[s] = next[s];
    keep_columns(h, l.out_features);
  }

  // Sums over a warp's rows, for the lane's own column of every 32.
  using ColumnSums = float[kWidth / 32];

  __device__ void add_column_sums(const ColumnSums& sums, float* db, bool first_tile) const {
    float* const own = db + own_column(g, t);
#pragma unroll
    for (int i = 0; i < kWidth / 32; ++i) own[32 * i] = first_tile ? sums[i] : own[32 * i] + sums[i];
  }

  // Computes dz, and the sums of dz for db, from h and the gradient of the layer's output. Elements beyond the
  // matrix's rows and columns are masked: there an infinite weight times h = 0 is NaN.
  __device__ void backward_dz(const Rows& h, const Rows& dh, Rows& dz, int layer, const SharedLayer<T>& shared,
                              int64_t rows_left, ColumnSums& db) const {
    const int cols = p.layers[layer].out_features;
    const bool masked = sizeof(T) == 4 || cols < kWidth || rows_left < kWarpRows;
    float own_rows[8];
    each_z(h, layer, shared, [&](int s, const Sums<T>(&z)[kTiles]) {
      float grad[kTiles][4];
      with_activation(p.activation, [&](auto activation) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) grad[j][i] = dh[s].at(j, i) * activation.template slope<T>(z[j][i]);
      });
      if (masked) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (col_of(s, j) + i % 2 >= cols || g + i / 2 * 8 >= rows_left) grad[j][i] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        dz[s].set(j, grad[j]);
        const int tile = s * kTiles + j;
#pragma unroll
        for (int i = 0; i < 2; ++i) own_rows[2 * (tile % 4) + i] = grad[j][i] + grad[j][i + 2];
        if (tile % 4 == 3) db[tile / 4] = over_lanes<Warp>(own_rows, g);
      }
    });
  }
  // Replaces dh by the gradient of the layer's input.
  __device__ void backward_dh(const Rows& dz, Rows& dh, int layer, const SharedLayer<T>& shared) const {
    const NarrowLayer& l = p.layers[layer];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const S added = l.adds_input ? dh[s] : S{};
      Sums<T> sums[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j].start(i, added.at(j, i));
      if (kOverlaps || s * S::kCols < l.in_features) multiply_add<true>(dz, shared.weight, s, sums);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = sums[j][i];
        dh[s].set(j, c);
      }
    }
    keep_columns(dh, l.in_features);
  }
};

// The tiles of 16 rows that a block takes, one to a warp at a time.
struct BlockTiles {
  int64_t begin, end;

  __device__ explicit BlockTiles(const NarrowStack& p) {
    const int64_t tiles = (p.rows + kWarpRows - 1) / kWarpRows;
    begin = tiles * blockIdx.x / gridDim.x, end = tiles * (blockIdx.x + 1) / gridDim.x;
  }
  __device__ int64_t rounds(int warps) const { return (end - begin + warps - 1) / warps; }
};

template <class T, int kWidth, class Warp>
__global__ void __launch_bounds__(forward_shape(sizeof(T)).warps * 32, forward_shape(sizeof(T)).blocks_at_once)
    narrow_forward_kernel(const __grid_constant__ NarrowStack p) {
  if constexpr (Warp::kMultiplies) {
    using W = StackWarp<T, kWidth, Warp>;
    constexpr int kWarps = W::kForwardWarps;
    const W warp{p};
    const BlockTiles tiles(p);
    const int in_features = p.layers[0].in_features;
    LayerQueue<T, kWidth, kWarps * 32, Warp> layers(p, 0, 1, p.count, tiles.rounds(kWarps));
    for (int64_t first = tiles.begin; first < tiles.end; first += kWarps) {
      const int64_t tile = first + warp.warp;
      typename W::Rows h;
      if (tile < tiles.end) warp.read(h, tile, p.x.data, p.x.row_stride, in_features);
      if (tile + kWarps < tiles.end) warp.prefetch(tile + kWarps, p.x.data, p.x.row_stride, in_features);
      for (int layer = 0; layer < p.count; ++layer) {
        const SharedLayer<T> shared = layers.next();
        if (tile >= tiles.end) continue;
        warp.forward(h, layer, shared);
        const NarrowLayer& l = p.layers[layer];
        if (l.kept && layer + 1 < p.count) warp.write(h, tile, l.kept, l.out_features, l.out_features);
      }
      if (p.y.data && tile < tiles.end)
        warp.write(h, tile, p.y.data, p.y.row_stride, p.layers[p.count - 1].out_features);
    }
  }
}

template <class T, int kWidth, class Warp>
__global__ void __launch_bounds__(backward_shape(kWidth, sizeof(T)).warps * 32,
                                  backward_shape(kWidth, sizeof(T)).blocks_at_once)
    narrow_backward_kernel(const __grid_constant__ NarrowStack p) {
  if constexpr (Warp::kMultiplies) {
    using W = StackWarp<T, kWidth, Warp>;
    constexpr int kWarps = W::kBackwardWarps;
    const W warp{p};
    const BlockTiles tiles(p);
    const int last = p.count - 1;
    float* const partial_db =
        p.partial_db ? p.partial_db + (int64_t{blockIdx.x} * kWarps + warp.warp) * p.count * kWidth : nullptr;
    LayerQueue<T, kWidth, kWarps * 32, Warp> layers(p, last, -1, p.count - p.first, tiles.rounds(kWarps));
    for (int64_t first = tiles.begin; first < tiles.end; first += kWarps) {
      const int64_t tile = first + warp.warp;
      const bool present = tile < tiles.end;
      typename W::Rows dh;
      if (present) warp.read(dh, tile, p.dy.data, p.dy.row_stride, p.layers[last].out_features);
      // Where a multiprocessor holds one block, all warps wait for rows at once. The other shapes have no registers
      // for a prefetch.
      if (const int64_t next = tile + kWarps; kWidth == 128 && next < tiles.end) {
        warp.prefetch(next, p.dy.data, p.dy.row_stride, p.layers[last].out_features);
        warp.prefetch(next, layer_input(p, last), layer_input_stride(p, last), p.layers[last].in_features);
      }
      for (int layer = last; layer >= p.first; --layer) {
        const NarrowLayer& l = p.layers[layer];
        const SharedLayer<T> shared = layers.next();
        typename W::ColumnSums db = {};
        if (present) {
          typename W::Rows h, dz;
          warp.read(h, tile, layer_input(p, layer), layer_input_stride(p, layer), l.in_features);
          if (const int next = layer - 1; layer > p.first)
            warp.prefetch(tile, layer_input(p, next), layer_input_stride(p, next), p.layers[next].in_features);
          warp.backward_dz(h, dh, dz, layer, shared, p.rows - tile * kWarpRows, db);
          if (l.dz) warp.write(dz, tile, l.dz, l.out_features, l.out_features);
          if (layer > p.first || p.dx.data) warp.backward_dh(dz, dh, layer, shared);
        }
        // A warp without rows writes sums too, since narrow_sum_kernel adds every warp's sums.
        if (l.db && partial_db && (present || first == tiles.begin))
          warp.add_column_sums(db, partial_db + int64_t{layer} * kWidth, first == tiles.begin);
      }
      if (present && p.dx.data) warp.write(dh, tile, p.dx.data, p.dx.row_stride, p.layers[0].in_features);
    }
  }
}

}  // namespace fastlane::cuda
