// The register tile: an R × (N·width) block of A B over some steps of k, with all accumulators in registers. An
// element meets the same multiply-adds in the same order, wherever its tile lies and whichever operand is called A.
// So results depend neither on how rows and columns are cut into tasks nor on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

template <class C>
struct TileShape {
  using V = typename VecOf<C>::type;
  static constexpr int rows = kTileRows;
  static constexpr int vecs = kTileVecs;
  static constexpr int cols = vecs * V::width;
  static constexpr int size = rows * cols;
};

// The most steps of a chain. A longer reduction is cut into chains, whose sums are added: the rounding error of a
// chain grows with its length, the error of the addition with the number of chains.
constexpr int64_t kChain = 64;
// The steps of a k block: the chains of one block are added up before the next block begins. The number is fixed, as
// kChain is, because it decides in which order an element's sums are added.
template <class P>
constexpr int64_t kBlockSteps = 8192 / static_cast<int64_t>(sizeof(typename P::Unit));

template <class C>
FASTLANE_INLINE void add_tile(C* sum, const C* tile) {
  using V = typename VecOf<C>::type;
  for (int i = 0; i < TileShape<C>::size; i += V::width) store(sum + i, load(sum + i) + load(tile + i));
}

// A block of the output. One call of finish completes one, and reads or writes this block of every matrix of the
// epilogue.
struct Region {
  int64_t row = 0, col = 0, rows = 0, cols = 0;
};

// The matrices of an epilogue that are worth fetching ahead.
struct FinishMatrices {
  ConstRowMajor read;
  RowMajor z, out;

  explicit FinishMatrices(const GemmProblem& p)
      : read(p.ends_in_gradient ? p.gradient.preactivation : p.epilogue.addend), z(p.epilogue.z), out(p.out()) {}
};

constexpr int64_t kLineBytes = 64;

// Rows of bytes to fetch ahead.
struct Stream {
  const char* data = nullptr;
  int64_t rows = 0, row_stride = 0, row_bytes = 0;

  // Every row is cut into `parts` parts; returns parts [begin, end).
  Stream part(int64_t begin, int64_t end, int64_t parts) const {
    const int64_t from = row_bytes * begin / parts;
    return {data + from, rows, row_stride, row_bytes * end / parts - from};
  }
};

// Fetches into L2 what later tiles will need, piece by piece between the chains of the tiles before them. Hardware
// prefetchers do not follow rows a page apart, and to fetch everything at once would stall.
template <class T>
class Prefetcher {
 public:
  Prefetcher() = default;
  // Fetches the region of the matrices, and `stream`, in `pieces` pieces.
  Prefetcher(const FinishMatrices& matrices, const Region& region, const Stream& stream, int64_t pieces)
      : matrices_(&matrices),
        region_(region),
        rows_(ceil_div(region.rows, pieces)),
        stream_(stream),
        bytes_(ceil_div(ceil_div(stream.row_bytes, pieces), kLineBytes) * kLineBytes) {}

  FASTLANE_INLINE void next_piece() {
    const int64_t end = std::min(stream_.row_bytes, byte_ + bytes_);
    for (; byte_ < end; byte_ += kLineBytes)
      for (int64_t row = 0; row < stream_.rows; ++row)
        __builtin_prefetch(stream_.data + row * stream_.row_stride + byte_, 0, 2);
    const int64_t row_end = std::min(region_.rows, row_ + rows_);
    for (; row_ < row_end; ++row_) {
      const int64_t row = region_.row + row_;
      fetch<1>(element<T>(matrices_->out, row, region_.col));
      if (matrices_->z.data) fetch<1>(element<T>(matrices_->z, row, region_.col));
      if (matrices_->read.data) fetch<0>(element<const T>(matrices_->read, row, region_.col));
    }
  }

 private:
  template <int kWrite>
  FASTLANE_INLINE void fetch(const T* first) const {
    const auto* const end = reinterpret_cast<const char*>(first + region_.cols);
    for (const char* line = reinterpret_cast<const char*>(first); line < end; line += kLineBytes)
      __builtin_prefetch(line, kWrite, 2);
  }

  const FinishMatrices* matrices_ = nullptr;
  Region region_;
  int64_t row_ = 0, rows_ = 0;
  Stream stream_;
  int64_t byte_ = 0, bytes_ = 0;
};

// tile = A panel · B panel, or tile += A panel · B panel if `adds`.
template <class P, class T>
__attribute__((noinline)) void multiply_tile(int64_t steps, const Panel& a_panel, const Panel& b_panel,
                                             typename P::C* tile, Prefetcher<T>& prefetcher, bool adds = false) {
  using S = TileShape<typename P::C>;
  using V = typename S::V;
  // One pointer serves three rows, as many as an x86 address reaches with one stride.
  constexpr int groups = (S::rows + 2) / 3;
  const int64_t row_stride = a_panel.strip_stride, a_step = a_panel.step_stride, b_step = b_panel.step_stride;
  const char* a[groups];
  for (int g = 0; g < groups; ++g) a[g] = a_panel.data + 3 * g * row_stride;
  const char* b = b_panel.data;
  do {
    prefetcher.next_piece();
    V acc[S::rows][S::vecs];
#pragma GCC unroll 16
    for (int i = 0; i < S::rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < S::vecs; ++j) acc[i][j] = V::set(0);

    for (int64_t step = std::min(kChain, steps); step > 0; --step) {
      V lanes[S::vecs];
#pragma GCC unroll 4
      for (int j = 0; j < S::vecs; ++j)
        lanes[j] = P::lanes(reinterpret_cast<const typename P::Unit*>(b) + j * V::width);
#pragma GCC unroll 16
      for (int i = 0; i < S::rows; ++i) {
        const auto ai = P::broadcast(a[i / 3] + i % 3 * row_stride);
#pragma GCC unroll 4
        for (int j = 0; j < S::vecs; ++j) acc[i][j] = P::multiply_add(ai, lanes[j], acc[i][j]);
      }
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) a[g] += a_step;
      b += b_step;
    }

#pragma GCC unroll 16
    for (int i = 0; i < S::rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < S::vecs; ++j) {
        typename P::C* out = tile + i * S::cols + j * V::width;
        store(out, adds ? load(out) + acc[i][j] : acc[i][j]);
      }
    adds = true;
    steps -= kChain;
  } while (steps > 0);
}

FASTLANE_END_TARGET
