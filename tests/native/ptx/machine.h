// Runs a PTX kernel on the host. Threads run one at a time in a random order. What is asynchronous on a GPU happens
// at once or as late as it may, by chance. So if a result depends on a missing barrier, two runs will differ.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>

#include "program.h"

namespace ptx {

struct Size3 {
  uint32_t x = 1, y = 1, z = 1;
};

// Work that a GPU does on its own. A commit closes a group, and a wait runs it.
struct Pending {
  using Work = std::vector<std::function<void()>>;
  Work open;
  std::deque<Work> groups;

  void commit();
  void wait(uint64_t groups_left);
  bool empty() const;
};

// Returns `work`, with errors that name the instruction that began the work.
std::function<void()> begun_at(const Instruction& i, std::function<void()> work);

struct Block;
struct Thread {
  uint64_t* registers = nullptr;
  Block* block = nullptr;
  uint32_t index = 0, next = 0;  // index in the block; number of the next instruction
  // Another thread sets a `parked` thread on its way. A thread that yields lets the others run.
  bool done = false, parked = false, yields = false;
  uint32_t cluster_phase = 0;  // the phase when it arrived at the cluster's barrier
  uint32_t proxy_fences = 0;  // how many fence.proxy.async it has passed
  uint64_t waited_at = ~uint64_t{0};  // the machine's number of events when it last waited in vain
  Pending stores;  // by TMA
  Pending copies;  // by cp.async

  uint32_t lane() const { return index % 32; }
};

// The last ordinary store to four bytes of shared memory. Its thread must pass a fence before TMA or wgmma may read
// them.
struct OrdinaryStore {
  Thread* by = nullptr;
  uint32_t proxy_fences = 0;  // that thread's count at the store
};

struct Block {
  uint32_t rank = 0;  // in its cluster
  uint32_t running = 0;  // threads
  bool stores_late = false;  // stores by TMA; for a whole block, since every lane of a warp gives the same order
  Size3 index;  // in the grid
  std::vector<uint8_t> shared;
  std::vector<OrdinaryStore> ordinary_stores;  // for each four bytes of `shared`
  std::vector<uint64_t> registers;
  std::vector<Thread> threads;
  std::vector<Thread*> waiting[16];  // at bar.sync
  std::vector<Pending> products;  // by wgmma, for each group of four warps
};

// The 8 bytes of an mbarrier in shared memory. The last bit of bytes_and_phase is the phase, the others count bytes
// still to come.
struct MBarrier {
  uint16_t expected, pending;
  int32_t bytes_and_phase;
};

// Global memory that a kernel may touch.
struct Range {
  const void* begin;
  size_t bytes;
  bool writable;
};

// An address of shared memory is the block's rank plus one, and in the last 24 bits the offset. Offsets start where
// they do on a GPU.
constexpr uint32_t kSharedBase = 1024, kOffsetBits = 24, kOffsetMask = (1u << kOffsetBits) - 1;

struct Machine {
  Machine(uint64_t seed, std::vector<Range> allowed) : random(seed), allowed(std::move(allowed)) {}

  // Throws std::runtime_error with the line of PTX at a deadlock, a stray access, or what the hardware would refuse.
  // `parameters` holds a pointer to each parameter.
  void launch(const Kernel& kernel, Size3 grid, Size3 cluster, Size3 block, size_t shared_bytes,
              const void* const* parameters);

  bool coin() { return random() % 2 == 0; }
  Block& block_of(uint32_t address);
  uint8_t* shared(uint32_t address, size_t bytes);
  void stored(Thread& t, uint32_t address, size_t bytes);
  // For TMA and wgmma, which see an ordinary store only after a fence of the storing thread.
  const uint8_t* shared_to_read_async(uint32_t address, size_t bytes);
  uint8_t* shared_to_write_async(uint32_t address, size_t bytes);
  void check_global(const void* address, size_t bytes, bool writes);
  void check_parameter(const void* address, size_t bytes) const;
  // Whether all threads that `mask` names in each warp, among `count` threads from `first` on, have come to t's
  // instruction. If they have, the other threads go on with t.
  bool gathered(Thread& t, uint32_t first, uint32_t count, uint32_t mask = ~0u);
  void arrive(MBarrier& barrier);
  void expect_bytes(MBarrier& barrier, int32_t bytes);
  void complete_bytes(MBarrier& barrier, int32_t bytes);

  std::mt19937_64 random;
  std::vector<Range> allowed;
  size_t latest = 0;  // the range of the latest access, since neighbours are asked for one after the other
  std::vector<Block> blocks;  // of the present cluster
  std::deque<std::function<void()>> loads;  // loads by TMA that are on their way
  Size3 grid, cluster, block;
  uint32_t threads = 0;  // in a block
  const void* const* parameters = nullptr;
  std::vector<uint32_t> parameter_bytes;
  uint32_t cluster_arrived = 0, cluster_phase = 0;
  uint64_t events = 0;  // how many events may have set a waiting thread on its way

 private:
  void start_cluster(const Kernel& kernel, Size3 first);
  void run_cluster(const Kernel& kernel);
  // Whether t computes: so many instructions were run, and t has not waited in vain since the last event.
  bool run(const Kernel& kernel, Thread& t, uint64_t instructions);
  void finish_a_load();
  void complete_phase(MBarrier& barrier);
};

}  // namespace ptx
