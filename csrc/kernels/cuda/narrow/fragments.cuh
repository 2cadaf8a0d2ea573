// The operands and results of a warp's mmas, as its lanes hold them. With lane = 4 g + t: element i of a result is
// row g + 8 (i / 2), column 2 t + i % 2.
#pragma once

#include "kernels/cuda/common/device.cuh"
#include "kernels/cuda/narrow/stack.h"

namespace fastlane::cuda {

// The bits of a float, or of two values of 16 bits.
template <class T>
__device__ uint32_t bits_of(T x) {
  uint32_t bits;
  static_assert(sizeof x == sizeof bits);
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
__device__ inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A layer's input.
__device__ inline const void* layer_input(const NarrowStack& p, int layer) {
  return layer == 0 ? p.x.data : p.layers[layer - 1].kept;
}
__device__ inline int64_t layer_input_stride(const NarrowStack& p, int layer) {
  return layer == 0 ? p.x.row_stride : p.layers[layer].in_features;
}

// Begins to copy a matrix into shared memory, as kRows × kWidth with rows kStride apart. Elements beyond `rows` and
// `cols` become zero. Copies of 16 bytes are still on their way on return, in the thread's open group of copies. All
// kThreads threads of the block have to call this.
template <int kRows, int kWidth, int kStride, int kThreads, class Warp, class T>
__device__ void begin_to_shared(T* to, const T* from, int64_t rows, int cols, int64_t row_stride,
                                int64_t col_stride) {
  constexpr int kVector = kAccessBytes / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(from) % kAccessBytes == 0 && row_stride % kVector == 0;
  if (aligned && col_stride == 1 && cols % kVector == 0) {
    // A thread stays in its column.
    static_assert(kThreads * kVector % kWidth == 0);
    constexpr int kStep = kThreads * kVector / kWidth;
    const int col = threadIdx.x * kVector % kWidth, first = threadIdx.x * kVector / kWidth;
    const int present = col >= cols ? 0 : rows < kRows ? static_cast<int>(rows) : kRows;
    from += first * row_stride + col, to += first * kStride + col;
#pragma unroll
    for (int i = 0; i * kStep < kRows; ++i, from += kStep * row_stride, to += kStep * kStride)
      if (kRows % kStep == 0 || first + i * kStep < kRows) Warp::copy_async(to, from, first + i * kStep < present);
    return;
  }
  for (int at = threadIdx.x; at < kRows * kWidth; at += kThreads) {
    const int row = at / kWidth, col = at % kWidth;
    const bool present = row < rows && col < cols;
    to[row * kStride + col] = present ? from[row * row_stride + col * col_stride] : rounded<T>(0.0f);
  }
}

// Two values of 16 bits in a register, the first in its lower half.
template <class T>
struct Halves;
template <>
struct Halves<__nv_bfloat16> {
  static __device__ uint32_t rounded(float first, float second) {
    return bits_of(__floats2bfloat162_rn(first, second));
  }
  static __device__ float widened(uint32_t both, int which) {
    return float_of(which == 0 ? both << 16 : both & 0xffff0000u);
  }
};
template <>
struct Halves<__half> {
  static __device__ uint32_t rounded(float first, float second) { return bits_of(__floats2half2_rn(first, second)); }
  static __device__ float widened(uint32_t both, int which) {
    __half2 halves;
    memcpy(static_cast<void*>(&halves), &both, sizeof halves);
    return which == 0 ? __low2float(halves) : __high2float(halves);
  }
};

// 16 rows × kCols columns spread over a warp: an mma's A operand, and at the same time kTiles results of an mma. A
// pair is two neighbours in a row of a tile of 8 columns, in the upper 8 rows (half 0) or the lower 8 rows (half 1).
template <class T>
struct Slice {
  static constexpr int kTiles = 2, kCols = 16;
  using Pair = uint32_t;
  uint32_t r[4] = {0, 0, 0, 0};

  __device__ Pair pair(int tile, int half) const { return r[2 * tile + half]; }
  __device__ void set_pair(int tile, int half, Pair pair) { r[2 * tile + half] = pair; }
  __device__ void set(int tile, const float (&c)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) r[2 * tile + half] = Halves<T>::rounded(c[2 * half], c[2 * half + 1]);
  }
  __device__ float at(int tile, int i) const { return Halves<T>::widened(r[2 * tile + i / 2], i % 2); }
  // Makes 0 what a pair has beyond the matrix, where `columns_left` columns are left from the pair's first column on.
  __device__ void keep(int tile, int half, int columns_left) {
    r[2 * tile + half] &= columns_left > 1 ? 0xffffffffu : columns_left == 1 ? 0x0000ffffu : 0u;
  }

  // Reads the B operands of kTiles products over 16 steps along k, from W at p: b[k][n] is W[n][k], or W[k][n] if
  // kTransposed.
  template <bool kTransposed, class Warp>
  static __device__ void read_b(const T* p, int stride, uint32_t (&b)[kTiles][2]) {
    const int lane = threadIdx.x % 32, row_block = kTransposed ? lane / 8 % 2 : lane / 16;
    const int col_block = kTransposed ? lane / 16 : lane / 8 % 2;
    uint32_t blocks[4];
    Warp::template load_matrices<kTransposed>(p + (row_block * 8 + lane % 8) * stride + col_block * 8, blocks);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = blocks[i];
  }
  // Reads the A operand from a matrix at p: 16 of the matrix's columns are A's rows, 16 of its rows are the steps
  // along k.
  template <class Warp>
  static __device__ void read_a(const T* p, int stride, uint32_t (&a)[4]) {
    const int lane = threadIdx.x % 32;
    Warp::template load_matrices<true>(p + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8, a);
  }
};

// Operands of 4 bytes take the steps along k in another order, and B follows this order.
template <>
struct Slice<float> {
  static constexpr int kTiles = 1, kCols = 8;
  struct alignas(8) Pair {
    uint32_t first, second;
  };
  uint32_t r[4] = {0, 0, 0, 0};

  __device__ Pair pair(int, int half) const { return {r[half], r[half + 2]}; }
  __device__ void set_pair(int, int half, Pair pair) { r[half] = pair.first, r[half + 2] = pair.second; }
  __device__ void set(int, const float (&c)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i / 2 + i % 2 * 2] = bits_of(c[i]);
  }
  __device__ float at(int, int i) const { return float_of(r[i / 2 + i % 2 * 2]); }
  __device__ void keep(int, int half, int columns_left) {
    if (columns_left < 1) r[half] = 0;
    if (columns_left < 2) r[half + 2] = 0;
  }

  template <bool kTransposed, class Warp>
  static __device__ void read_b(const float* p, int stride, uint32_t (&b)[kTiles][2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    p += kTransposed ? 2 * t * stride + g : g * stride + 2 * t;
    b[0][0] = bits_of(p[0]), b[0][1] = bits_of(p[kTransposed ? stride : 1]);
  }
  template <class Warp>
  static __device__ void read_a(const float* p, int stride, uint32_t (&a)[4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    p += 2 * t * stride + g;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = bits_of(p[i / 2 * stride + i % 2 * 8]);
  }
};

// The result of a chain of mmas, which starts from a given value.
template <class T>
struct Sums {
  float main[4];

  __device__ void start(int i, float value) { main[i] = value; }
  __device__ void round() {}
  template <class Warp>
  __device__ void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Warp::multiply(T{}, main, a, b);
  }
  __device__ float operator[](int i) const { return main[i]; }
};

// Splits x into `high`, with the 10 bits of a significand that TF32 keeps, and the rest `low`. `high` is rounded, so
// that the rest may have either sign. If x is not finite, both are 0.
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
// A product in fp32 as three products of TF32. The fourth, of both rests, is below the rounding of a sum. The small
// products have a sum of their own, since tensor cores round sums toward zero. Infinities take part in the main
// product alone: an infinity times a rest of 0 is NaN.
template <>
struct Sums<float> {
  float first[4], main[4] = {0, 0, 0, 0}, rest[4] = {0, 0, 0, 0};

  __device__ void start(int i, float value) { first[i] = value; }
  // Ends a chain, whose sums were all rounded toward zero.
  __device__ void round() {
#pragma unroll
    for (int i = 0; i < 4; ++i) first[i] += main[i] + rest[i], main[i] = rest[i] = 0;
  }
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
  __device__ float operator[](int i) const { return first[i] + (main[i] + rest[i]); }

 private:
  template <int N>
  static __device__ void keep_infinities(const uint32_t (&x)[N], uint32_t (&high)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if ((x[i] & 0x7f800000u) == 0x7f800000u) high[i] = x[i];
  }
};

}  // namespace fastlane::cuda
