// CUDA kernels on the host: a block's threads take turns at random, and blocks come one after the other. A thread
// goes on until it waits for others. This is slow, and blind to what only a GPU does. But the code is the kernels'
// own: indices, edges, sums, roundings, the use of shared memory.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

// Blocks do not run at the same time, so a block's memory may be the program's.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

// The kernels read these; pass_on sets them for the thread that goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

struct Turns {
  static constexpr size_t kStackBytes = 256 << 10;

  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint3 thread_index, block_index;
  };

  std::vector<Thread> threads;
  std::vector<Thread*> ready;  // those that wait for nobody, without the present one
  Thread* present = nullptr;
  ucontext_t all_done;
  std::function<void()> work;
  std::mt19937 random{1};
  unsigned grids = 0;  // how many have begun
  size_t finished = 0;  // threads of the present grid

  // Lets a thread that is ready go on, in place of the present one.
  void pass_on() {
    if (ready.empty()) {
      std::printf("deadlock: every thread waits for others\n");
      std::fflush(stdout);
      std::_Exit(1);  // exit would free the stack that this runs on
    }
    Thread* const before = present;
    before->block_index = blockIdx;
    std::swap(ready[random() % ready.size()], ready.back());
    present = ready.back(), ready.pop_back();
    if (present != before) swapcontext(&before->context, &present->context);
    // `before` has its turn again.
    present = before, threadIdx = before->thread_index, blockIdx = before->block_index;
  }

  static void run_thread();
  void run();
};
inline Turns turns;

inline void Turns::run_thread() {
  threadIdx = turns.present->thread_index;
  turns.work();
  if (++turns.finished == turns.threads.size()) setcontext(&turns.all_done);
  turns.pass_on();  // and never comes back
}

// Runs `work` in each of `threads`.
inline void Turns::run() {
  ++grids, finished = 0;
  for (Thread& t : threads) {
    t.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, run_thread, 0);
    ready.push_back(&t);
  }
  present = ready.back(), ready.pop_back();
  swapcontext(&all_done, &present->context);
}

// Where `count` threads wait for each other, again and again.
class Meeting {
 public:
  explicit Meeting(size_t count) : count_(count) {}

  void arrive_and_wait() {
    if (waiting_.size() + 1 < count_) {
      waiting_.push_back(turns.present);
    } else {
      turns.ready.insert(turns.ready.end(), waiting_.begin(), waiting_.end());
      turns.ready.push_back(turns.present);
      waiting_.clear();
    }
    turns.pass_on();
  }

 private:
  size_t count_;
  std::vector<Turns::Thread*> waiting_;
};

inline Meeting* meeting_of_block = nullptr;
inline void __syncthreads() { meeting_of_block->arrive_and_wait(); }

template <class Kernel, class... Arguments>
void run_grid(dim3 grid, dim3 block, Kernel kernel, const Arguments&... arguments) {
  blockDim = block, gridDim = grid;
  Meeting meeting(size_t{block.x} * block.y);
  meeting_of_block = &meeting;
  turns.threads.resize(size_t{block.x} * block.y);
  for (unsigned n = 0; n < turns.threads.size(); ++n) turns.threads[n].thread_index = {n % block.x, n / block.x, 0};
  turns.work = [&] {
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, 0};
        kernel(arguments...);
        __syncthreads();
      }
  };
  turns.run();
}
