// A stack's backward. A block of rows goes forward through all layers, which gives every layer's input and act′(z),
// and then backward; all of this lies in cache. Where the zs were kept, the way forward needs no product but the
// projections.
//
//   chunks of rows, one task each             sums of every dW and db of its own; added in order at the end
//     blocks of rows                          every h, every act′(z), one dz, two gradients of h
//       forward: act′(zᵢ), hᵢ₊₁ = act(zᵢ) + shortcut
//       backward: dz, db, dW += dzᵀ h, dh = dz W + the shortcut's gradient
//
// With a single chunk the blocks are the tasks. They keep every dz, and leave dW = dzᵀ h to one task for each layer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cpu/generic/activation-inl.h"
#include "kernels/cpu/generic/block_product-inl.h"
#include "kernels/cpu/generic/column_sums-inl.h"
#include "kernels/cpu/generic/epilogue-inl.h"
#include "kernels/cpu/generic/pack-inl.h"
#include "kernels/cpu/generic/preactivation_grad-inl.h"
#include "kernels/cpu/generic/product-inl.h"
#include "kernels/cpu/generic/stack_backward_plan-inl.h"
#include "kernels/cpu/generic/stack_forward-inl.h"
#include "kernels/cpu/generic/vec_common-inl.h"
#include "kernels/cpu/isa/target.h"
#include "kernels/cpu/isa/vec.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/problem.h"
#include "kernels/stack_reads.h"

FASTLANE_BEGIN_TARGET

template <class T, class P>
class StackBackward {
  using C = typename P::C;
  using Unit = typename P::Unit;
  using Plan = StackBackwardPlan<T, P>;
  using Grad = typename Plan::Grad;

 public:
  StackBackward(const StackProblem& problem, const Parallel& parallel)
      : p_(problem),
        parallel_(parallel),
        layout_(ScratchSlot::stack_layout, bytes_of<typename Plan::Layout>(p_.count + 1)),
        plan_(p_, layout_.template as<typename Plan::Layout>()),
        single_chunk_(p_.rows < 2 * RowChunks::kMinRows) {
    if (stack_multiply_adds(p_) < kSerialMultiplyAdds) parallel_.threads = 1;
  }

  // False if a product dropped a value (product-inl.h).
  bool run() {
    const Scratch packed(ScratchSlot::packed_b, bytes_of<Unit>(plan_.total().operands));
    plan_.keep_operands_in(packed.as<Unit>());
    parallel_.for_each(p_.count, [&](int64_t i) {
      if (plan_.pack(i)) dropped_ = true;
    });
    single_chunk_ ? run_single_chunk() : run_chunks();
    return !dropped_.load();
  }

 private:
  static constexpr int64_t kMaxSumsBytes = int64_t{32} << 20;
  // Whole tiles of every instruction set.
  static constexpr int64_t kRowsStep = 48, kMaxBlockRows = 192;
  // Rows of a block in a single chunk. Blocks are whole tiles of AVX-512; their number is even if there are rows
  // enough for two.
  static constexpr int64_t kSmallStep = 12, kSmallBlockRows = 48;

  // The work memory of some rows. Each layer's part lies after the parts of the layers before.
  struct Memory {
    int64_t row, rows;
    T* h;  // every layer's output, which the next layer reads; if concatenated, side by side after x
    C* slopes;  // act′(z)
    T* dz;  // every layer's in a single chunk, otherwise one layer's
    T* grads;  // in a single chunk: gradients of the outputs that a projection's gradient needs again
  };
  struct Block {
    const Memory* memory;
    int64_t row, rows;
    T* work;  // three blocks of the widest rows
    double* columns;
  };

  int64_t block_rows() const {
    const int64_t row_bytes = (plan_.total().h + 3 * plan_.widest()) * static_cast<int64_t>(sizeof(T)) +
                              slopes_size(plan_.total().outputs) * static_cast<int64_t>(sizeof(C));
    const int64_t in_l2 = parallel_.caches.l2 / 2 / std::max<int64_t>(1, row_bytes) / kRowsStep * kRowsStep;
    if (in_l2 >= 2 * kRowsStep) return std::min(kMaxBlockRows, in_l2);
    // The block is not in L2 either way, and more rows make longer sums of dW. The number of threads must not decide:
    // bits would depend on it.
    return kMaxBlockRows * row_bytes <= parallel_.caches.last / 2 ? kMaxBlockRows : kRowsStep;
  }
  bool has_slopes() const { return p_.activation != Activation::none; }
  int64_t slopes_size(int64_t outputs) const { return has_slopes() ? outputs : 0; }

  // Cuts the rows into chunks, each with its own sums.
  void run_chunks() {
    const auto& total = plan_.total();
    const int64_t chunk_bytes =
        total.sums * static_cast<int64_t>(sizeof(C)) + total.columns * static_cast<int64_t>(sizeof(double));
    const RowChunks chunks(p_.rows,
                           std::min(RowChunks::kMaxChunks, kMaxSumsBytes / std::max<int64_t>(1, chunk_bytes)));
    const Scratch sums(ScratchSlot::weight_sums, bytes_of<C>(chunks.count * total.sums));
    const Scratch columns(ScratchSlot::column_sums, bytes_of<double>(chunks.count * total.columns));
    parallel_.for_each(chunks.count, [&](int64_t chunk) {
      run_chunk(chunks.begin(chunk), chunks.end(chunk), sums.as<C>() + chunk * total.sums,
                columns.as<double>() + chunk * total.columns);
    });
    parallel_.for_each(p_.count, [&](int64_t i) {
      C* own = sums.as<C>() + plan_.at(i).sums;
      for (const Grad& grad : {plan_.weight_grad(i), plan_.projection_grad(i)}) {
        for (int64_t tile = 0; tile < grad.tiles(); ++tile) grad.store(own, chunks.count, total.sums, tile);
        own += grad.sums();
      }
      store_columns(i, chunks.count, columns.as<double>());
    });
  }

  void run_chunk(int64_t begin, int64_t end, C* sums, double* columns) {
    const auto& total = plan_.total();
    std::fill_n(columns, total.columns, 0.0);
    const int64_t step = block_rows(), rows = std::min(step, end - begin);
    const Scratch work(ScratchSlot::stack_rows, bytes_of<T>(rows * (total.h + 4 * plan_.widest()))),
        slopes(ScratchSlot::stack_slopes, bytes_of<C>(rows * slopes_size(total.outputs)));
    for (int64_t row = begin; row < end; row += step) {
      Memory memory;
      memory.row = row, memory.rows = std::min(step, end - row);
      memory.h = work.as<T>(), memory.slopes = slopes.as<C>();
      memory.dz = memory.h + rows * total.h, memory.grads = nullptr;
      const Block block{&memory, row, memory.rows, memory.dz + rows * plan_.widest(), columns};
      run_forward(block);
      for (int64_t i = p_.count - 1; i >= plan_.first_needed(); --i) {
        form_gradients(block, i);
        add_weight_grads(block, i, row == begin, sums + plan_.at(i).sums);
        run_dgrad(block, i);
      }
    }
  }

  // Threads first share the rows: their way back keeps every dz. Then threads share the layers, each of whose dW is a
  // single product.
  void run_single_chunk() {
    const auto& total = plan_.total();
    const int64_t wanted = p_.rows < kSmallBlockRows ? 1 : ceil_div(p_.rows, 2 * kSmallBlockRows) * 2;
    const int64_t step = std::max<int64_t>(1, ceil_div(ceil_div(p_.rows, wanted), kSmallStep)) * kSmallStep;
    const int64_t blocks = ceil_div(p_.rows, step);
    const Scratch memory_of_rows(ScratchSlot::stack_rows,
                                 bytes_of<T>(p_.rows * (total.h + total.outputs + total.grads))),
        slopes(ScratchSlot::stack_slopes, bytes_of<C>(p_.rows * slopes_size(total.outputs))),
        columns(ScratchSlot::column_sums, bytes_of<double>(blocks * total.columns));
    Memory memory;
    memory.row = 0, memory.rows = p_.rows, memory.h = memory_of_rows.as<T>(), memory.slopes = slopes.as<C>();
    memory.dz = memory.h + p_.rows * total.h, memory.grads = memory.dz + p_.rows * total.outputs;
    parallel_.for_each(blocks, [&](int64_t index) {
      const int64_t row = index * step, rows = std::min(step, p_.rows - row);
      double* const own_columns = columns.as<double>() + index * total.columns;
      std::fill_n(own_columns, total.columns, 0.0);
      const Scratch work(ScratchSlot::stack_gradients, bytes_of<T>(rows * 3 * plan_.widest()));
      const Block block{&memory, row, rows, work.as<T>(), own_columns};
      run_forward(block);
      for (int64_t i = p_.count - 1; i >= plan_.first_needed(); --i) {
        form_gradients(block, i);
        run_dgrad(block, i);
      }
    });
    const Block all{&memory, 0, p_.rows, nullptr, nullptr};
    parallel_.for_each(p_.count, [&](int64_t i) {
      store_weight_grads(all, i);
      store_columns(i, blocks, columns.as<double>());
    });
  }

  // The input of layer i.
  ConstRowMajor input(const Block& block, int64_t i) const {
    if (i == 0) return p_.x.data ? ConstRowMajor{element<const T>(p_.x, block.row, 0), p_.x.row_stride} : p_.x;
    const Memory& m = *block.memory;
    if (p_.concat) return {m.h + (block.row - m.row) * plan_.total().h, plan_.total().h};
    const int64_t features = plan_.layer(i - 1).out_features;
    return {m.h + m.rows * plan_.at(i - 1).h + (block.row - m.row) * features, features};
  }
  RowMajor slope(const Block& block, int64_t i) const {
    if (!has_slopes()) return {};
    const Memory& m = *block.memory;
    const int64_t features = plan_.layer(i).out_features;
    return {m.slopes + m.rows * plan_.at(i).outputs + (block.row - m.row) * features, features};
  }
  RowMajor dz(const Block& block, int64_t i) const {
    const Memory& m = *block.memory;
    const int64_t features = plan_.layer(i).out_features;
    return {m.dz + (single_chunk_ ? m.rows * plan_.at(i).outputs : 0) + (block.row - m.row) * features, features};
  }
  // The gradient of layer i's output; for i = −1, the gradient of the network's input.
  RowMajor output_grad(const Block& block, int64_t i) const {
    if (i < 0) return {element<T>(p_.dx, block.row, 0), p_.dx.row_stride};
    if (i + 1 == p_.count) return {const_cast<T*>(element<const T>(p_.dy, block.row, 0)), p_.dy.row_stride};
    const Memory& m = *block.memory;
    const int64_t features = plan_.layer(i + 1).in_features;
    if (single_chunk_ && plan_.layer(i).dprojection.data)
      return {m.grads + m.rows * plan_.at(i).grads + (block.row - m.row) * features, features};
    return {block.work + (1 + i % 2) * block.rows * plan_.widest(), features};
  }

  // Forms the layers' inputs and act′(z) that the way back reads. In fp32 and fp64 the bits are forward's, except for
  // projections and absent zs where rows are so few that forward took inner products.
  void run_forward(const Block& block) {
    const Memory& m = *block.memory;
    if (p_.concat && plan_.reads(0).input) {
      const RowMajor h{m.h + (block.row - m.row) * plan_.total().h, plan_.total().h};
      copy_rows<T>(input(block, 0), h, block.rows, plan_.layer(0).in_features);
    }
    for (int64_t i = 0; i < p_.count; ++i) {
      const StackLayerReads& reads = plan_.reads(i);
      if (!reads.z()) continue;
      const StackLayer& l = plan_.layer(i);
      const ConstRowMajor h = input(block, i), next = input(block, i + 1);
      const Strips<T> h_strips = along_rows(h, block.rows);
      const bool projects = reads.output && l.projection.data;
      if (projects || reads.forms_z) look(along_features(h, l.in_features), block.rows);
      Epilogue e;
      e.activation = p_.activation;
      if (projects) {
        Epilogue projected;
        projected.bias = l.projection_bias, projected.out = {block.work, l.out_features};
        multiply_block(h_strips, plan_.operands(i).projection_forward, projected, 0);
        e.addend = {block.work, l.out_features};
      } else if (reads.output && l.adds_input) {
        e.addend = h;
      }
      if (reads.slope) e.slope = slope(block, i);
      e.out = {const_cast<T*>(element<const T>(next, 0, p_.concat ? l.in_features : 0)), next.row_stride};
      if (!reads.forms_z) {
        finish<T>(e, {0, 0, block.rows, l.out_features}, element<const T>(l.z, block.row, 0), l.z.row_stride);
        continue;
      }
      e.bias = l.bias;
      multiply_block(h_strips, plan_.operands(i).weight_forward, e, 0);
    }
  }

  Strips<T> along_rows(const ConstRowMajor& m, int64_t rows) const {
    return {static_cast<const T*>(m.data), rows, m.row_stride, 1};
  }
  Strips<T> along_features(const ConstRowMajor& m, int64_t features) const {
    return {static_cast<const T*>(m.data), features, 1, m.row_stride};
  }
  static ConstRowMajor read_only(const RowMajor& m) { return {m.data, m.row_stride}; }

  // The gradient of the output of layer i's activation.
  ConstRowMajor activated_grad(const Block& block, int64_t i) const {
    const RowMajor grad = output_grad(block, i);
    return {element<const T>(grad, 0, p_.concat ? plan_.layer(i).in_features : 0), grad.row_stride};
  }

  // dz and the biases' gradients.
  void form_gradients(const Block& block, int64_t i) const {
    const StackLayer& l = plan_.layer(i);
    double* columns = block.columns + plan_.at(i).columns;
    PreActivationGradProblem part;
    part.rows = block.rows, part.cols = l.out_features;
    part.dy = activated_grad(block, i), part.z = read_only(slope(block, i)), part.dz = dz(block, i);
    if (has_slopes()) {
      PreActivationGrad<T, GivenSlope, C>(part).compute_rows(0, block.rows, l.db ? columns : nullptr);
    } else {
      form_preactivation_grad<T>(part, 0, block.rows, l.db ? columns : nullptr);
    }
    if (!l.dprojection_bias) return;
    if (l.db) columns += column_sums_size(l.out_features);
    part.dy = read_only(output_grad(block, i)), part.dz = {};
    form_preactivation_grad<T>(part, 0, block.rows, columns);
  }

  void run_dgrad(const Block& block, int64_t i) {
    if (!plan_.reads(i).dh) return;
    const StackLayer& l = plan_.layer(i);
    const auto o = plan_.operands(i);
    const ConstRowMajor grad = read_only(output_grad(block, i)), dz = read_only(this->dz(block, i));
    look(along_features(dz, l.out_features), block.rows);
    Epilogue e;
    e.out = output_grad(block, i - 1);
    if (l.projection.data) {
      look(along_features(grad, l.out_features), block.rows);
      multiply_block(along_rows(grad, block.rows), o.projection, e, 0);
      e.addend = read_only(e.out);
    } else if (l.adds_input || p_.concat) {
      e.addend = grad;
    }
    multiply_block(along_rows(dz, block.rows), o.weight, e, 0);
  }

  // Calls f with each gradient that is needed and its two operands.
  template <class F>
  void for_each_weight_grad(const Block& block, int64_t i, F f) {
    const StackLayer& l = plan_.layer(i);
    const Grad of_weight = plan_.weight_grad(i), of_projection = plan_.projection_grad(i);
    if (!of_weight.needed() && !of_projection.needed()) return;
    const Strips<T> h = along_features(input(block, i), l.in_features);
    look(h, block.rows);
    const auto call = [&](const Grad& grad, const RowMajor& of_output) {
      if (!grad.needed()) return;
      const Strips<T> output_strips = along_features(read_only(of_output), l.out_features);
      look(output_strips, block.rows);
      f(grad, output_strips, h);
    };
    call(of_weight, dz(block, i));
    call(of_projection, output_grad(block, i));
  }
  void add_weight_grads(const Block& block, int64_t i, bool first, C* sums) {
    for_each_weight_grad(block, i, [&](const Grad& grad, const Strips<T>& of_output, const Strips<T>& h) {
      grad.add(of_output, h, block.rows, first, sums);
      sums += grad.sums();
    });
  }
  void store_weight_grads(const Block& block, int64_t i) {
    for_each_weight_grad(block, i, [&](const Grad& grad, const Strips<T>& of_output, const Strips<T>& h) {
      grad.store_product(of_output, h, block.rows);
    });
  }

  void look(const Strips<T>& s, int64_t rows) {
    if (drops_any<P>(s, 0, s.count, 0, rows)) dropped_ = true;
  }

  void store_columns(int64_t i, int64_t parts, double* columns) const {
    const StackLayer& l = plan_.layer(i);
    columns += plan_.at(i).columns;
    for (void* db : {l.db, l.dprojection_bias}) {
      if (!db) continue;
      store_column_sums(columns, parts, plan_.total().columns, l.out_features, static_cast<T*>(db));
      columns += column_sums_size(l.out_features);
    }
  }

  const StackProblem& p_;
  Parallel parallel_;
  Scratch layout_;
  Plan plan_;
  bool single_chunk_;
  std::atomic<bool> dropped_{false};
};

template <class T>
void run_stack_backward(const StackProblem& p, const Parallel& parallel) {
  exact_product<T>([&](auto product) { return StackBackward<T, decltype(product)>(p, parallel).run(); });
}

FASTLANE_END_TARGET
