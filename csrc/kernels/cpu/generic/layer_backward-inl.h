// A narrow layer's backward in one pass over the rows: dz of a few rows is formed in L2 and used there for db, dx
// and dW.
//
//   chunks of rows, one task each          sums of dW and db of its own; added in order at the end
//     blocks of kBlockRows rows            dz: in L2
//       dgrad tiles, wgrad tiles
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cpu/generic/block_product-inl.h"
#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/preactivation_grad-inl.h"
#include "kernels/cpu/generic/product-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

template <class T, class P>
class LayerBackward {
  using C = typename P::C;
  using Unit = typename P::Unit;

 public:
  // Whether the sums of dW stay in L2 beside dz and W.
  static bool suits(const LayerBackwardProblem& p, const Caches& caches) {
    constexpr int64_t kMaxFeatures = 1024;
    return p.in_features <= kMaxFeatures && p.out_features <= kMaxFeatures &&
           p.in_features * p.out_features * static_cast<int64_t>(sizeof(C)) <= caches.l2 / 4;
  }

  LayerBackward(const LayerBackwardProblem& problem, const Parallel& parallel)
      : p_(problem),
        parallel_(parallel),
        chunks_(problem.rows),
        weight_({static_cast<const T*>(p_.weight.data), p_.in_features, p_.weight.col_stride, p_.weight.row_stride},
                p_.out_features),
        weight_grad_(p_.out_features, p_.in_features, p_.dweight, p_.dweight_transposed) {
    const int64_t elements = p_.rows * p_.out_features;
    const double multiply_adds = static_cast<double>(elements) * static_cast<double>(p_.in_features);
    if (elements < kSerialElements && multiply_adds < kSerialMultiplyAdds) parallel_.threads = 1;
  }

  // False if a product dropped a value (product-inl.h).
  bool run() {
    const Scratch packed_weight(ScratchSlot::packed_b, bytes_of<Unit>(p_.dx.data ? weight_.units() : 0));
    weight_.keep_in(packed_weight.as<Unit>());
    if (p_.dx.data)
      parallel_.for_each(weight_.panels(), [&](int64_t panel) {
        if (weight_.pack(panel)) dropped_ = true;
      });

    const int64_t column_sums_each = p_.db ? column_sums_size(p_.out_features) : 0;
    const Scratch weight_sums(ScratchSlot::weight_sums, bytes_of<C>(chunks_.count * weight_grad_.sums()));
    const Scratch column_sums(ScratchSlot::column_sums, bytes_of<double>(chunks_.count * column_sums_each));
    parallel_.for_each(chunks_.count, [&](int64_t chunk) {
      run_chunk(chunk, weight_sums.as<C>() + chunk * weight_grad_.sums(),
                p_.db ? column_sums.as<double>() + chunk * column_sums_each : nullptr);
    });
    if (p_.db)
      store_column_sums(column_sums.as<double>(), chunks_.count, column_sums_each, p_.out_features,
                        static_cast<T*>(p_.db));
    parallel_.for_each(weight_grad_.tiles(), [&](int64_t tile) {
      weight_grad_.store(weight_sums.as<C>(), chunks_.count, weight_grad_.sums(), tile);
    });
    return !dropped_.load();
  }

 private:
  // A block is whole tiles of every instruction set, and whole chains.
  static constexpr int64_t kBlockRows = 192;

  void run_chunk(int64_t chunk, C* weight_sums, double* column_sums) {
    if (column_sums) std::fill_n(column_sums, column_sums_size(p_.out_features), 0.0);
    const Scratch dz_scratch(ScratchSlot::dz, bytes_of<T>(kBlockRows * p_.out_features));
    T* const dz = dz_scratch.as<T>();
    const int64_t begin = chunks_.begin(chunk), end = chunks_.end(chunk);
    if (begin == end) weight_grad_.clear(weight_sums);
    for (int64_t row = begin; row < end; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, end - row);
      form_dz(row, rows, dz, column_sums);
      const Strips<T> dz_strips{dz, p_.out_features, 1, p_.out_features}, x_strips = this->x_strips(row);
      if (drops_any<P>(dz_strips, 0, p_.out_features, 0, rows)) dropped_ = true;
      if (p_.dweight.data && drops_any<P>(x_strips, 0, p_.in_features, 0, rows)) dropped_ = true;
      if (p_.dx.data) run_dgrad(row, rows, dz);
      if (p_.dweight.data) weight_grad_.add(dz_strips, x_strips, rows, row == begin, weight_sums);
    }
  }

  void form_dz(int64_t row, int64_t rows, T* dz, double* column_sums) const {
    PreActivationGradProblem part;
    part.rows = rows, part.cols = p_.out_features, part.dtype = p_.dtype, part.activation = p_.activation;
    part.dy = {element<const T>(p_.dy, row, 0), p_.dy.row_stride};
    part.z = {element<const T>(p_.z, row, 0), p_.z.row_stride};
    if (p_.dx.data || p_.dweight.data) part.dz = {dz, p_.out_features};
    form_preactivation_grad<T>(part, 0, rows, column_sums);
  }

  void run_dgrad(int64_t row, int64_t rows, const T* dz) const {
    Epilogue dgrad;
    dgrad.addend = p_.shortcut_grad, dgrad.out = p_.dx;
    multiply_block(Strips<T>{dz, rows, p_.out_features, 1}, weight_, dgrad, row);
  }

  // Each feature is a strip; rows are the steps.
  Strips<T> x_strips(int64_t row) const {
    const auto* x = static_cast<const T*>(p_.x.data);
    return {x ? x + row * p_.x.row_stride : x, p_.in_features, p_.x.col_stride, p_.x.row_stride};
  }

  const LayerBackwardProblem& p_;
  Parallel parallel_;
  RowChunks chunks_;
  SharedOperand<T, P> weight_;
  WeightGrad<T, P> weight_grad_;
  std::atomic<bool> dropped_{false};
};

template <class T>
bool run_layer_backward(const LayerBackwardProblem& p, const Parallel& parallel) {
  if (!LayerBackward<T, product_t<T>>::suits(p, parallel.caches)) return false;
  exact_product<T>([&](auto product) { return LayerBackward<T, decltype(product)>(p, parallel).run(); });
  return true;
}

FASTLANE_END_TARGET
