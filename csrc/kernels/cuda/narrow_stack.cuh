// The kernels of a narrow stack. `Warp` is what a warp does together (warp.cuh).
#pragma once

#include "device.cuh"
#include "narrow_stack.h"

namespace fastlane::cuda {

__device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
__device__ inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
__device__ uint32_t pair_of(T low, T high) {
  uint16_t halves[2];
  memcpy(&halves[0], &low, sizeof low);
  memcpy(&halves[1], &high, sizeof high);
  return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
}
template <class T>
__device__ T half_of(uint32_t pair, int which) {
  const auto half = static_cast<uint16_t>(pair >> (16 * which));
  T x;
  memcpy(static_cast<void*>(&x), &half, sizeof x);
  return x;
}

// 16 rows × kCols columns over a warp: an mma's A operand, and at the same time kTiles results of an mma, whose
// element i of a lane is row g + 8 (i / 2), column 2 t + i % 2. Operands of 4 bytes are taken along k in another
// order, which B follows.
template <class T>
struct Slice {
  static constexpr int kTiles = 2, kCols = 16;
  uint32_t r[4] = {0, 0, 0, 0};

  __device__ void set(int tile, const float (&c)[4]) {
    r[2 * tile] = pair_of(rounded<T>(c[0]), rounded<T>(c[1]));
    r[2 * tile + 1] = pair_of(rounded<T>(c[2]), rounded<T>(c[3]));
  }
  __device__ T at(int tile, int i) const { return half_of<T>(r[2 * tile + i / 2], i % 2); }
  // Of a product's B with eight columns from p on: b[k][n] is p[n · stride + k], or p[k · stride + n].
  static __device__ void b_rows(const T* p, int stride, int g, int t, uint32_t (&b)[2]) {
    p += g * stride + 2 * t;
    b[0] = pair_of(p[0], p[1]), b[1] = pair_of(p[8], p[9]);
  }
  static __device__ void b_columns(const T* p, int stride, int g, int t, uint32_t (&b)[2]) {
    p += 2 * t * stride + g;
    b[0] = pair_of(p[0], p[stride]), b[1] = pair_of(p[8 * stride], p[9 * stride]);
  }
};
template <>
struct Slice<float> {
  static constexpr int kTiles = 1, kCols = 8;
  uint32_t r[4] = {0, 0, 0, 0};

  __device__ void set(int, const float (&c)[4]) {
    for (int i = 0; i < 4; ++i) r[register_of(i)] = bits_of(c[i]);
  }
  __device__ float at(int, int i) const { return float_of(r[register_of(i)]); }
  static __device__ void b_rows(const float* p, int stride, int g, int t, uint32_t (&b)[2]) {
    p += g * stride + 2 * t;
    b[0] = bits_of(p[0]), b[1] = bits_of(p[1]);
  }
  static __device__ void b_columns(const float* p, int stride, int g, int t, uint32_t (&b)[2]) {
    p += 2 * t * stride + g;
    b[0] = bits_of(p[0]), b[1] = bits_of(p[stride]);
  }

 private:
  static __device__ int register_of(int i) { return i % 2 * 2 + i / 2; }
};

// The result of a chain of mmas.
template <class T>
struct Sums {
  float main[4] = {0, 0, 0, 0};

  template <class Warp>
  __device__ void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp::multiply(T{}, main, a, b);
  }
  __device__ float operator[](int i) const { return main[i]; }
};

// The 10 bits of a significand that TF32 keeps, rounded so that what is left has either sign, and that rest. Of what
// is not finite neither.
template <int N>
__device__ void split(const uint32_t (&x)[N], uint32_t (&high)[N], uint32_t (&low)[N]) {
  constexpr uint32_t kExponent = 0x7f800000u, kKept = 0xffffe000u;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t rounded = (x[i] + 0x1000u) & kKept;
    const bool overflows = (rounded & kExponent) == kExponent, finite = (x[i] & kExponent) != kExponent;
    high[i] = finite ? (overflows ? x[i] & kKept : rounded) : 0u;
    low[i] = finite ? bits_of(float_of(x[i]) - float_of(high[i])) : 0u;
  }
}
// fp32 as three products of TF32; the fourth, of both rests, is below the rounding of a sum. The small ones have a
// sum of their own, since tensor cores round sums toward zero. Infinities take part in the main product alone: times
// a rest of 0 they are NaN.
template <>
struct Sums<float> {
  float main[4] = {0, 0, 0, 0}, rest[4] = {0, 0, 0, 0};

  template <class Warp>
  __device__ void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    split(a, a_high, a_low);
    split(b, b_high, b_low);
    Warp::multiply(float{}, rest, a_low, b_high);
    Warp::multiply(float{}, rest, a_high, b_low);
    keep_infinities(a, a_high);
    keep_infinities(b, b_high);
    Warp::multiply(float{}, main, a_high, b_high);
  }
  __device__ float operator[](int i) const { return main[i] + rest[i]; }

 private:
  template <int N>
  static __device__ void keep_infinities(const uint32_t (&x)[N], uint32_t (&high)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if ((x[i] & 0x7f800000u) == 0x7f800000u) high[i] = x[i];
  }
};

template <class T>
__device__ float activated(Activation activation, float z) {
  return activation == Activation::gelu        ? ExactGelu::value<T>(z)
         : activation == Activation::gelu_tanh ? TanhGelu::value<T>(z)
                                               : z;
}
template <class T>
__device__ float slope_of(Activation activation, float z) {
  return activation == Activation::gelu        ? ExactGelu::slope<T>(z)
         : activation == Activation::gelu_tanh ? TanhGelu::slope<T>(z)
                                               : 1.0f;
}

// What a lane knows of its place.
template <class T, int kWidth, class Warp>
struct StackWarp {
  using S = Slice<T>;
  static constexpr int kSlices = kWidth / S::kCols, kStride = weight_stride(kWidth);
  static constexpr int kLayersAtOnce = layers_at_once(kWidth, sizeof(T));
  using Rows = S[kSlices];

  const NarrowStack& p;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  __device__ int col_of(int slice, int tile, int i) const { return slice * S::kCols + tile * 8 + 2 * t + i % 2; }

  // Calls f(slice, tile, i, element, present) for each of this lane's elements of a matrix.
  template <class E, class F>
  __device__ void each_element(int64_t row_tile, E* data, int64_t stride, int cols, F f) const {
    const int64_t row = row_tile * kStackRows + warp * kWarpRows + g;
    E* const upper = data + row * stride + 2 * t;
    E* const lower = upper + 8 * stride;
    const int own_cols = cols - 2 * t;
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int col = s * S::kCols + j * 8 + i % 2;
          f(s, j, i, (i < 2 ? upper : lower) + col, col < own_cols && row + i / 2 * 8 < p.rows);
        }
  }
  __device__ void read(Rows& rows, int64_t row_tile, const void* data, int64_t stride, int cols) const {
    float c[4];
    each_element(row_tile, static_cast<const T*>(data), stride, cols,
                 [&](int s, int j, int i, const T* element, bool present) {
                   c[i] = present ? widen(*element) : 0.0f;
                   if (i == 3) rows[s].set(j, c);
                 });
  }
  __device__ void write(const Rows& rows, int64_t row_tile, void* data, int64_t stride, int cols) const {
    each_element(row_tile, static_cast<T*>(data), stride, cols, [&](int s, int j, int i, T* element, bool present) {
      if (present) *element = rows[s].at(j, i);
    });
  }

  // In shared memory: the weights of some layers, zero beyond their sizes, then their biases.
  __device__ T* weight(int layer) const {
    return reinterpret_cast<T*>(Warp::shared_memory()) + layer % kLayersAtOnce * kWidth * kStride;
  }
  __device__ float* bias(int layer) const {
    return reinterpret_cast<float*>(weight(0) +
                                    (p.count < kLayersAtOnce ? p.count : kLayersAtOnce) * kWidth * kStride) +
           layer % kLayersAtOnce * kWidth;
  }
  // Every thread of the block has to come here.
  __device__ void load_layers(int first) const {
    __syncthreads();
    const int end = p.count < first + kLayersAtOnce ? p.count : first + kLayersAtOnce;
    for (int layer = first; layer < end; ++layer) {
      const NarrowLayer& l = p.layers[layer];
      const T* const from = static_cast<const T*>(l.weight.data);
      T* const to = weight(layer);
      for (int at = threadIdx.x; at < kWidth * kWidth; at += kStackWarps * 32) {
        const int n = at / kWidth, k = at % kWidth;
        const bool present = n < l.out_features && k < l.in_features;
        to[n * kStride + k] = present ? from[n * l.weight.row_stride + k * l.weight.col_stride] : rounded<T>(0.0f);
      }
      for (int n = threadIdx.x; n < kWidth; n += kStackWarps * 32)
        bias(layer)[n] = l.bias && n < l.out_features ? widen(static_cast<const T*>(l.bias)[n]) : 0.0f;
    }
    __syncthreads();
  }

  // z of eight columns.
  __device__ void product(const Rows& h, int layer, int first_col, float (&z)[4]) const {
    const float* const b = bias(layer) + first_col + 2 * t;
    Sums<T> sums;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      uint32_t w[2];
      S::b_rows(weight(layer) + first_col * kStride + s * S::kCols, kStride, g, t, w);
      sums.template multiply_add<Warp>(h[s].r, w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] = sums[i] + b[i % 2];
  }
  // dh += dz W, of eight columns.
  __device__ void dgrad(const Rows& dz, int layer, int first_col, float (&dh)[4]) const {
    Sums<T> sums;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      uint32_t w[2];
      S::b_columns(weight(layer) + s * S::kCols * kStride + first_col, kStride, g, t, w);
      sums.template multiply_add<Warp>(dz[s].r, w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) dh[i] += sums[i];
  }

  // Calls f(slice, tile, z) for each result tile of this layer's product.
  template <class F>
  __device__ void each_z(const Rows& h, int layer, F f) const {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      if (s * S::kCols >= p.layers[layer].out_features) continue;
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        float z[4];
        product(h, layer, s * S::kCols + j * 8, z);
        f(s, j, z);
      }
    }
  }

  // h of the next layer. What lies beyond its columns is zero: 0 · inf would be NaN.
  __device__ void forward(Rows& h, int layer) const {
    const NarrowLayer& l = p.layers[layer];
    Rows next;
    each_z(h, layer, [&](int s, int j, const float (&z)[4]) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i] = activated<T>(p.activation, z[i]) + (l.adds_input ? widen(h[s].at(j, i)) : 0.0f);
        if (col_of(s, j, i) >= l.out_features) y[i] = 0.0f;
      }
      next[s].set(j, y);
    });
#pragma unroll
    for (int s = 0; s < kSlices; ++s) h[s] = next[s];
  }

  // dz from h and the gradient of the layer's output; the sums of its columns are added to this warp's. Rows beyond
  // the last are masked too: there an infinite weight times h = 0 is NaN.
  __device__ void backward_dz(const Rows& h, const Rows& dh, Rows& dz, int layer, int64_t row_tile, float* db,
                              bool first_tile) const {
    const NarrowLayer& l = p.layers[layer];
    const int64_t rows_left = p.rows - row_tile * kStackRows - warp * kWarpRows - g;
    each_z(h, layer, [&](int s, int j, const float (&z)[4]) {
      float grad[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        grad[i] = col_of(s, j, i) < l.out_features && i / 2 * 8 < rows_left
                      ? widen(dh[s].at(j, i)) * slope_of<T>(p.activation, z[i])
                      : 0.0f;
      dz[s].set(j, grad);
      if (!db) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = Warp::sum_over_rows(grad[i] + grad[i + 2]);
        float* const to = db + col_of(s, j, i);
        if (g == 0) *to = first_tile ? sum : *to + sum;
      }
    });
  }
  // The gradient of the layer's input, in place.
  __device__ void backward_dh(const Rows& dz, Rows& dh, int layer) const {
    const NarrowLayer& l = p.layers[layer];
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        float c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = l.adds_input ? widen(dh[s].at(j, i)) : 0.0f;
        if (s * S::kCols < l.in_features) dgrad(dz, layer, s * S::kCols + j * 8, c);
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = col_of(s, j, i) < l.in_features ? c[i] : 0.0f;
        dh[s].set(j, c);
      }
  }
};

template <class T, int kWidth, class Warp>
__global__ void __launch_bounds__(kStackWarps * 32, kStackBlocksAtOnce)
    narrow_forward_kernel(const __grid_constant__ NarrowStack p) {
  using W = StackWarp<T, kWidth, Warp>;
  const W warp{p};
  const int64_t tiles = (p.rows + kStackRows - 1) / kStackRows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    typename W::Rows h;
    warp.read(h, tile, p.x.data, p.x.row_stride, p.layers[0].in_features);
    for (int layer = 0; layer < p.count; ++layer) {
      // If all weights fit at once they are loaded once.
      if (layer % W::kLayersAtOnce == 0 && (p.count > W::kLayersAtOnce || tile == blockIdx.x))
        warp.load_layers(layer);
      warp.forward(h, layer);
      const NarrowLayer& l = p.layers[layer];
      if (l.kept && layer + 1 < p.count) warp.write(h, tile, l.kept, l.out_features, l.out_features);
    }
    if (p.y.data) warp.write(h, tile, p.y.data, p.y.row_stride, p.layers[p.count - 1].out_features);
  }
}

template <class T, int kWidth, class Warp>
__global__ void __launch_bounds__(kStackWarps * 32, kStackBlocksAtOnce)
    narrow_backward_kernel(const __grid_constant__ NarrowStack p) {
  using W = StackWarp<T, kWidth, Warp>;
  const W warp{p};
  const int64_t tiles = (p.rows + kStackRows - 1) / kStackRows;
  const int last = p.count - 1;
  float* const partial_db =
      p.partial_db ? p.partial_db + (int64_t{blockIdx.x} * kStackWarps + warp.warp) * p.count * kWidth : nullptr;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    typename W::Rows dh;
    warp.read(dh, tile, p.dy.data, p.dy.row_stride, p.layers[last].out_features);
    for (int layer = last; layer >= p.first; --layer) {
      const NarrowLayer& l = p.layers[layer];
      const bool first_use = layer == last || (layer + 1) % W::kLayersAtOnce == 0;
      if (first_use && (p.count > W::kLayersAtOnce || tile == blockIdx.x))
        warp.load_layers(layer - layer % W::kLayersAtOnce);
      typename W::Rows h, dz;
      if (layer == 0) {
        warp.read(h, tile, p.x.data, p.x.row_stride, l.in_features);
      } else {
        warp.read(h, tile, p.layers[layer - 1].kept, l.in_features, l.in_features);
      }
      float* const db = l.db && partial_db ? partial_db + int64_t{layer} * kWidth : nullptr;
      warp.backward_dz(h, dh, dz, layer, tile, db, tile == blockIdx.x);
      if (l.dz) warp.write(dz, tile, l.dz, l.out_features, l.out_features);
      if (layer > p.first || p.dx.data) warp.backward_dh(dz, dh, layer);
    }
    if (p.dx.data) warp.write(dh, tile, p.dx.data, p.dx.row_stride, p.layers[0].in_features);
  }
}

// db of layer blockIdx.x: each thread adds every eighth warp's sum of its column, then the first adds the eight.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    narrow_bias_grad_kernel(const __grid_constant__ NarrowStack p, int width, int64_t partials) {
  __shared__ double sums[kSumRows][kSumCols];
  const NarrowLayer& l = p.layers[blockIdx.x];
  if (!l.db) return;
  for (int first_col = 0; first_col < l.out_features; first_col += kSumCols) {
    const int col = first_col + threadIdx.x;
    double sum = 0;
    if (col < l.out_features)
      for (int64_t i = threadIdx.y; i < partials; i += kSumRows)
        sum += p.partial_db[(i * p.count + blockIdx.x) * width + col];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && col < l.out_features) {
      for (int y = 1; y < kSumRows; ++y) sum += sums[y][threadIdx.x];
      static_cast<T*>(l.db)[col] = rounded<T>(static_cast<float>(sum));
    }
    __syncthreads();
  }
}

}  // namespace fastlane::cuda
