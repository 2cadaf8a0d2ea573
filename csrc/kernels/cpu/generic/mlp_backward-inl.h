// A narrow MLP's backward in one pass over the rows, like a narrow layer's (layer_backward-inl.h): dz and the hidden
// activations of a few rows are formed in L2 and used there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cpu/generic/block_product-inl.h"
#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/generic/epilogue-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/preactivation_grad-inl.h"
#include "kernels/cpu/generic/product-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/mlp.h"
#include "kernels/problem.h"

FASTLANE_BEGIN_TARGET

template <class T, class P>
class MlpBackward {
  using C = typename P::C;
  using Unit = typename P::Unit;

 public:
  // Whether the sums of both weights' gradients stay in L2 beside the weights, dz and the hidden activations.
  static bool suits(const MlpBackwardProblem& p, const Caches& caches) {
    constexpr int64_t kMaxFeatures = 1024;
    return p.in_features <= kMaxFeatures && p.hidden <= kMaxFeatures && p.out_features <= kMaxFeatures &&
           (p.in_features + p.out_features) * p.hidden * static_cast<int64_t>(sizeof(C)) <= caches.l2 / 4;
  }

  MlpBackward(const MlpBackwardProblem& problem, const Parallel& parallel)
      : p_(problem),
        parallel_(parallel),
        chunks_(problem.rows),
        fc1_weight_({static_cast<const T*>(p_.fc1_weight.data), p_.in_features, p_.fc1_weight.col_stride,
                     p_.fc1_weight.row_stride},
                    p_.hidden),
        fc2_weight_({static_cast<const T*>(p_.fc2_weight.data), p_.hidden, p_.fc2_weight.col_stride,
                     p_.fc2_weight.row_stride},
                    p_.out_features),
        fc1_grad_(p_.hidden, p_.in_features, p_.dfc1_weight, p_.dfc1_transposed),
        fc2_grad_(p_.out_features, p_.hidden, p_.dfc2_weight, p_.dfc2_transposed) {
    const int64_t elements = p_.rows * p_.hidden;
    const double multiply_adds =
        static_cast<double>(elements) * static_cast<double>(p_.in_features + p_.out_features);
    if (elements < kSerialElements && multiply_adds < kSerialMultiplyAdds) parallel_.threads = 1;
  }

  // False if a product dropped a value (product-inl.h).
  bool run() {
    const int64_t fc1_units = p_.dx.data ? fc1_weight_.units() : 0,
                  fc2_units = forms_dz(p_) ? fc2_weight_.units() : 0;
    const Scratch packed(ScratchSlot::packed_b, bytes_of<Unit>(fc1_units + fc2_units));
    fc1_weight_.keep_in(packed.as<Unit>());
    fc2_weight_.keep_in(packed.as<Unit>() + fc1_units);
    if (fc1_units) pack(fc1_weight_);
    if (fc2_units) pack(fc2_weight_);

    const int64_t weight_sums_each = fc1_grad_.sums() + fc2_grad_.sums();
    const int64_t fc1_columns = p_.dfc1_bias ? column_sums_size(p_.hidden) : 0;
    const int64_t columns_each = fc1_columns + (p_.dfc2_bias ? column_sums_size(p_.out_features) : 0);
    const Scratch weight_sums(ScratchSlot::weight_sums, bytes_of<C>(chunks_.count * weight_sums_each));
    const Scratch column_sums(ScratchSlot::column_sums, bytes_of<double>(chunks_.count * columns_each));
    C* const weights = weight_sums.as<C>();
    double* const columns = column_sums.as<double>();
    std::fill_n(columns, chunks_.count * columns_each, 0.0);
    parallel_.for_each(chunks_.count, [&](int64_t chunk) {
      double* const own = columns + chunk * columns_each;
      run_chunk(chunk, weights + chunk * weight_sums_each, p_.dfc1_bias ? own : nullptr,
                p_.dfc2_bias ? own + fc1_columns : nullptr);
    });
    if (p_.dfc1_bias)
      store_column_sums(columns, chunks_.count, columns_each, p_.hidden, static_cast<T*>(p_.dfc1_bias));
    if (p_.dfc2_bias)
      store_column_sums(columns + fc1_columns, chunks_.count, columns_each, p_.out_features,
                        static_cast<T*>(p_.dfc2_bias));
    store(fc1_grad_, weights, weight_sums_each);
    store(fc2_grad_, weights + fc1_grad_.sums(), weight_sums_each);
    return !dropped_.load();
  }

 private:
  // A block is whole tiles of every instruction set, and whole chains.
  static constexpr int64_t kBlockRows = 192;

  void pack(const SharedOperand<T, P>& weight) {
    parallel_.for_each(weight.panels(), [&](int64_t panel) {
      if (weight.pack(panel)) dropped_ = true;
    });
  }
  void store(const WeightGrad<T, P>& grad, C* sums, int64_t chunk_stride) {
    parallel_.for_each(grad.tiles(), [&](int64_t tile) { grad.store(sums, chunks_.count, chunk_stride, tile); });
  }

  void run_chunk(int64_t chunk, C* weight_sums, double* fc1_columns, double* fc2_columns) {
    const Scratch dz_scratch(ScratchSlot::dz, bytes_of<T>(kBlockRows * p_.hidden)),
        hidden_scratch(ScratchSlot::hidden, bytes_of<T>(kBlockRows * p_.hidden));
    T *const dz = dz_scratch.as<T>(), *const hidden = hidden_scratch.as<T>();
    C* const fc2_sums = weight_sums + fc1_grad_.sums();
    const int64_t begin = chunks_.begin(chunk), end = chunks_.end(chunk);
    if (begin == end) fc1_grad_.clear(weight_sums), fc2_grad_.clear(fc2_sums);
    for (int64_t row = begin; row < end; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, end - row);
      const bool first = row == begin;
      const T* const dy = element<const T>(p_.dy, row, 0);
      const Strips<T> dy_strips{dy, p_.out_features, 1, p_.dy.row_stride};
      if (drops_any<P>(dy_strips, 0, p_.out_features, 0, rows)) dropped_ = true;
      if (fc2_columns) sum_dy(row, rows, fc2_columns);
      if (p_.dfc2_weight.data) {
        activate(row, rows, hidden);
        add(fc2_grad_, dy_strips, {hidden, p_.hidden, 1, p_.hidden}, rows, first, fc2_sums);
      }
      if (!forms_dz(p_)) continue;
      form_dz(row, rows, dy, dz, fc1_columns);
      const Strips<T> dz_strips{dz, p_.hidden, 1, p_.hidden};
      if (drops_any<P>(dz_strips, 0, p_.hidden, 0, rows)) dropped_ = true;
      if (p_.dx.data) run_dgrad(row, rows, dz);
      if (p_.dfc1_weight.data) {
        const auto* x = static_cast<const T*>(p_.x.data) + row * p_.x.row_stride;
        add(fc1_grad_, dz_strips, {x, p_.in_features, p_.x.col_stride, p_.x.row_stride}, rows, first, weight_sums);
      }
    }
  }

  // Each feature is a strip; rows are the steps.
  void add(const WeightGrad<T, P>& grad, const Strips<T>& gradient, const Strips<T>& input, int64_t rows, bool first,
           C* sums) {
    if (drops_any<P>(input, 0, input.count, 0, rows)) dropped_ = true;
    grad.add(gradient, input, rows, first, sums);
  }

  void sum_dy(int64_t row, int64_t rows, double* columns) const {
    PreActivationGradProblem part;
    part.rows = rows, part.cols = p_.out_features, part.dtype = p_.dtype;
    part.dy = {element<const T>(p_.dy, row, 0), p_.dy.row_stride};
    form_preactivation_grad<T>(part, 0, rows, columns);
  }

  void activate(int64_t row, int64_t rows, T* hidden) const {
    Epilogue epilogue;
    epilogue.activation = p_.activation, epilogue.out = {hidden, p_.hidden};
    finish<T>(epilogue, {0, 0, rows, p_.hidden}, element<const T>(p_.z, row, 0), p_.z.row_stride);
  }

  void form_dz(int64_t row, int64_t rows, const T* dy, T* dz, double* columns) const {
    Epilogue dgrad;
    dgrad.out = {dz, p_.hidden};
    multiply_block(Strips<T>{dy, rows, p_.dy.row_stride, 1}, fc2_weight_, dgrad, 0);
    PreActivationGradProblem part;
    part.rows = rows, part.cols = p_.hidden, part.dtype = p_.dtype, part.activation = p_.activation;
    part.dy = {dz, p_.hidden}, part.dz = {dz, p_.hidden};
    part.z = {element<const T>(p_.z, row, 0), p_.z.row_stride};
    form_preactivation_grad<T>(part, 0, rows, columns);
  }

  void run_dgrad(int64_t row, int64_t rows, const T* dz) const {
    Epilogue dgrad;
    dgrad.addend = p_.shortcut_grad, dgrad.out = p_.dx;
    multiply_block(Strips<T>{dz, rows, p_.hidden, 1}, fc1_weight_, dgrad, row);
  }

  const MlpBackwardProblem& p_;
  Parallel parallel_;
  RowChunks chunks_;
  SharedOperand<T, P> fc1_weight_, fc2_weight_;
  WeightGrad<T, P> fc1_grad_, fc2_grad_;
  std::atomic<bool> dropped_{false};
};

template <class T>
bool run_mlp_backward(const MlpBackwardProblem& p, const Parallel& parallel) {
  if (!MlpBackward<T, product_t<T>>::suits(p, parallel.caches)) return false;
  exact_product<T>([&](auto product) { return MlpBackward<T, decltype(product)>(p, parallel).run(); });
  return true;
}

FASTLANE_END_TARGET
