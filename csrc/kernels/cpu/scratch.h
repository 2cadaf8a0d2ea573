// Aligned work memory that a thread keeps between calls, so that packing does not pay page faults each time.
#pragma once

#include <cstddef>

namespace fastlane {

// In each thread one owner at a time borrows a slot.
enum class ScratchSlot {
  packed_a,
  packed_b,
  packed_b_panel,  // one panel, beside the whole of A
  unpacked_b,  // the caller's panels, written back
  task_sums,  // sums of a product that wait for the next step along k: a task's
  slab_sums,  // the whole product's, from one slab to the next
  block_sums,  // a block's, gathered from its passes
  run_sums,  // of the columns, for each run of rows
  column_sums,  // of the columns, for each chunk of rows
  weight_sums,  // dW's, for each chunk of rows
  dz,
  hidden,  // an MLP's
  stack_layout,
  stack_rows,
  stack_slopes,
  stack_gradients,
  count
};

// A larger buffer goes back to the system after its call, so that an idle thread holds a bounded amount of memory.
constexpr size_t kKeptScratchBytes = size_t{32} << 20;

class Scratch {
 public:
  // Throws std::bad_alloc. Contents are undefined.
  Scratch(ScratchSlot slot, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  ScratchSlot slot_;
  void* data_;
};

}  // namespace fastlane
