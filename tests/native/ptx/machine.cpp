#include "machine.h"

#include <algorithm>
#include <numeric>

namespace ptx {
namespace {

constexpr uint64_t kPoison = 0x7fff7fff7fff7fff;  // NaN as f16, bf16, f32 and f64

std::string where(const Kernel& kernel, const Thread& t) {
  const Instruction& i = kernel.code[t.next];
  return "block " + std::to_string(t.block->rank) + ", thread " + std::to_string(t.index) + ", PTX line " +
         std::to_string(i.line) + ", " + i.opcode;
}

void run_all(const Pending::Work& work) {
  for (const auto& each : work) each();
}

}  // namespace

std::function<void()> begun_at(const Instruction& i, std::function<void()> work) {
  return [line = i.line, work = std::move(work)] {
    try {
      work();
    } catch (const std::exception& error) {
      throw std::runtime_error("begun on PTX line " + std::to_string(line) + ": " + error.what());
    }
  };
}

void Pending::commit() {
  groups.push_back(std::move(open));
  open.clear();
}
void Pending::wait(uint64_t groups_left) {
  for (; groups.size() > groups_left; groups.pop_front()) run_all(groups.front());
}
bool Pending::empty() const {
  return open.empty() && std::all_of(groups.begin(), groups.end(), [](const Work& work) { return work.empty(); });
}

Block& Machine::block_of(uint32_t address) {
  const uint32_t rank = (address >> kOffsetBits) - 1;
  if (rank >= blocks.size()) throw std::runtime_error("shared memory of no block of the cluster");
  Block& block = blocks[rank];
  if (block.running == 0) throw std::runtime_error("shared memory of a block that has ended");
  return block;
}

uint8_t* Machine::shared(uint32_t address, size_t bytes) {
  Block& block = block_of(address);
  const uint32_t offset = address & kOffsetMask;
  if (offset < kSharedBase || offset + bytes > block.shared.size() || offset % std::min<size_t>(bytes, 16) != 0)
    throw std::runtime_error("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(offset));
  return block.shared.data() + offset;
}

void Machine::stored(Thread& t, uint32_t address, size_t bytes) {
  OrdinaryStore* const first = &block_of(address).ordinary_stores[(address & kOffsetMask) / 4];
  for (size_t n = 0; n < (bytes + 3) / 4; ++n) first[n] = {&t, t.proxy_fences};
}
const uint8_t* Machine::shared_to_read_async(uint32_t address, size_t bytes) {
  const uint8_t* const memory = shared(address, bytes);
  const OrdinaryStore* const first = &block_of(address).ordinary_stores[(address & kOffsetMask) / 4];
  for (size_t n = 0; n < (bytes + 3) / 4; ++n)
    if (first[n].by && first[n].by->proxy_fences == first[n].proxy_fences)
      throw std::runtime_error("shared memory at " + std::to_string(address & kOffsetMask) + ": stored by thread " +
                               std::to_string(first[n].by->index) + " without a fence.proxy.async since");
  return memory;
}
uint8_t* Machine::shared_to_write_async(uint32_t address, size_t bytes) {
  uint8_t* const memory = shared(address, bytes);
  OrdinaryStore* const first = &block_of(address).ordinary_stores[(address & kOffsetMask) / 4];
  for (size_t n = 0; n < (bytes + 3) / 4; ++n) first[n] = {};
  return memory;
}

void Machine::check_global(const void* address, size_t bytes, bool writes) {
  const auto* const begin = static_cast<const char*>(address);
  const auto covers = [&](const Range& range) {
    const auto* const from = static_cast<const char*>(range.begin);
    return begin >= from && begin + bytes <= from + range.bytes && (range.writable || !writes);
  };
  if (latest < allowed.size() && covers(allowed[latest])) return;
  // Mostly the last range that begins no later; where ranges overlap, perhaps another one.
  const auto begins_later = [](const void* place, const Range& range) { return std::less<>()(place, range.begin); };
  const auto behind = std::upper_bound(allowed.begin(), allowed.end(), address, begins_later);
  auto found = behind == allowed.begin() ? allowed.end() : behind - 1;
  if (found == allowed.end() || !covers(*found)) found = std::find_if(allowed.begin(), allowed.end(), covers);
  if (found == allowed.end()) throw std::runtime_error(writes ? "stray write" : "stray read");
  latest = static_cast<size_t>(found - allowed.begin());
}

void Machine::check_parameter(const void* address, size_t bytes) const {
  const auto* const begin = static_cast<const char*>(address);
  for (size_t n = 0; n < parameter_bytes.size(); ++n) {
    const auto* const from = static_cast<const char*>(parameters[n]);
    if (begin >= from && begin + bytes <= from + parameter_bytes[n]) return;
  }
  throw std::runtime_error("a read beyond the parameter");
}

bool Machine::gathered(Thread& t, uint32_t first, uint32_t count, uint32_t mask) {
  if (!(mask >> t.lane() & 1)) throw std::runtime_error("a lane that is not in its mask");
  t.parked = true;
  Thread* const group = t.block->threads.data() + first;
  const auto takes_part = [&](uint32_t i) { return (mask >> i % 32 & 1) != 0; };
  for (uint32_t i = 0; i < count; ++i)
    if (takes_part(i) && !(group[i].parked && group[i].next == t.next)) return false;
  for (uint32_t i = 0; i < count; ++i) {
    if (!takes_part(i)) continue;
    group[i].parked = false;
    if (&group[i] != &t) ++group[i].next;
  }
  ++events;
  return true;
}

void Machine::complete_phase(MBarrier& barrier) {
  // Bytes that come before they are announced count below zero.
  if (barrier.pending != 0 || barrier.bytes_and_phase >> 1 != 0) return;
  barrier.bytes_and_phase ^= 1;
  barrier.pending = barrier.expected;
  ++events;
}
void Machine::arrive(MBarrier& barrier) {
  if (barrier.pending == 0) throw std::runtime_error("mbarrier: more arrivals than its count");
  --barrier.pending;
  complete_phase(barrier);
}
void Machine::expect_bytes(MBarrier& barrier, int32_t bytes) { barrier.bytes_and_phase += 2 * bytes; }
void Machine::complete_bytes(MBarrier& barrier, int32_t bytes) {
  barrier.bytes_and_phase -= 2 * bytes;
  complete_phase(barrier);
}

void Machine::launch(const Kernel& kernel, Size3 grid_, Size3 cluster_, Size3 block_, size_t shared_bytes,
                     const void* const* parameters_) {
  grid = grid_, cluster = cluster_, block = block_, parameters = parameters_;
  parameter_bytes = kernel.parameter_bytes;
  loads.clear();
  latest = 0;
  const auto begins_before = [](const Range& a, const Range& b) { return std::less<>()(a.begin, b.begin); };
  std::stable_sort(allowed.begin(), allowed.end(), begins_before);
  threads = block.x * block.y;
  if (grid.x % cluster.x != 0 || cluster.y != 1 || cluster.z != 1 || block.z != 1 || threads % 32 != 0)
    throw std::runtime_error("launch: grid, cluster and block do not fit");
  blocks.resize(cluster.x);
  for (Block& each : blocks) {
    // Never smaller: a kernel has tens of megabytes of registers, and a launch may be one of hundreds.
    each.registers.resize(std::max(each.registers.size(), size_t{kernel.registers} * threads));
    each.shared.resize(kSharedBase + dynamic_shared_offset(kernel) + shared_bytes);
  }
  for (uint32_t z = 0; z < grid.z; ++z)
    for (uint32_t y = 0; y < grid.y; ++y)
      for (uint32_t x = 0; x < grid.x; x += cluster.x) {
        start_cluster(kernel, {x, y, z});
        run_cluster(kernel);
      }
}

void Machine::start_cluster(const Kernel& kernel, Size3 first) {
  cluster_arrived = cluster_phase = 0;
  uint32_t rank = 0;
  for (Block& each : blocks) {
    each.stores_late = coin();
    each.running = threads;
    each.rank = rank, each.index = {first.x + rank, first.y, first.z};
    ++rank;
    std::fill_n(each.registers.begin(), size_t{kernel.registers} * threads, kPoison);
    std::fill(each.shared.begin(), each.shared.end(), uint8_t{0xff});
    each.ordinary_stores.assign((each.shared.size() + 3) / 4, {});
    each.products.assign((threads + 127) / 128, {});
    for (auto& waiting : each.waiting) waiting.clear();
    each.threads.assign(threads, {});
    for (uint32_t i = 0; i < threads; ++i) {
      Thread& t = each.threads[i];
      t.block = &each, t.index = i, t.registers = each.registers.data() + size_t{kernel.registers} * i;
    }
  }
}

bool Machine::run(const Kernel& kernel, Thread& t, uint64_t instructions) {
  t.yields = false;
  for (; instructions > 0 && !t.done && !t.parked && !t.yields; --instructions) {
    const Instruction& i = kernel.code[t.next];
    const bool skipped = i.guard >= 0 && ((t.registers[i.guard] & 1) != 0) == i.guard_negated;
    if (!skipped && i.branches) {
      t.next = i.target;
      continue;
    }
    try {
      const bool goes_on = skipped || i.execute(*this, t, i);
      if (!goes_on || t.yields) t.waited_at = events;
      if (!goes_on) return false;
    } catch (const std::exception& error) {
      throw std::runtime_error(where(kernel, t) + ": " + error.what());
    }
    ++t.next;
  }
  return instructions == 0 && !t.done && !t.parked && t.waited_at != events;
}

void Machine::finish_a_load() {
  const auto chosen = loads.begin() + static_cast<ptrdiff_t>(random() % loads.size());
  const auto load = std::move(*chosen);
  loads.erase(chosen);
  load();
  ++events;
}

void Machine::run_cluster(const Kernel& kernel) {
  struct Warp {
    Thread* lanes;
    uint64_t sleeps;  // rounds, while others run ahead
  };
  std::vector<Warp> warps;
  // One block may begin late.
  const Block* const late = blocks.size() > 1 ? &blocks[random() % blocks.size()] : nullptr;
  for (Block& each : blocks)
    for (uint32_t i = 0; i < threads; i += 32) warps.push_back({&each.threads[i], &each == late ? 10u : 0u});
  uint32_t order[32];
  std::iota(std::begin(order), std::end(order), 0u);
  // Without an event, no warp falls asleep any more; then all have been awake for long before patience ends.
  constexpr int kSleepless = 100, kPatience = 300;
  for (int rounds_without_event = 0;;) {
    const uint64_t before = events;
    bool all_done = true, some_compute = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (Warp& warp : warps) {
      if (std::all_of(warp.lanes, warp.lanes + 32, [](const Thread& t) { return t.done; })) continue;
      all_done = false;
      if (warp.sleeps > 0) {
        --warp.sleeps;
        continue;
      }
      if (rounds_without_event < kSleepless && random() % 16 == 0) warp.sleeps = random() % 100;
      std::shuffle(std::begin(order), std::end(order), random);
      const uint64_t instructions = 1 + random() % 3000;
      for (const uint32_t lane : order)
        if (!warp.lanes[lane].done && run(kernel, warp.lanes[lane], instructions)) some_compute = true;
      if (!loads.empty() && random() % 8 == 0) finish_a_load();
    }
    if (all_done) break;
    rounds_without_event = events == before && !some_compute ? rounds_without_event + 1 : 0;
    if (rounds_without_event > 2 && !loads.empty()) finish_a_load();
    if (rounds_without_event < kPatience) continue;
    std::string report = "deadlock";
    for (const Warp& warp : warps) {
      const auto waiting = std::find_if(warp.lanes, warp.lanes + 32, [](const Thread& t) { return !t.done; });
      if (waiting != warp.lanes + 32) report += "\n  " + where(kernel, *waiting);
    }
    throw std::runtime_error(report);
  }
  if (!loads.empty()) throw std::runtime_error("a TMA load arrives after its cluster has ended");
}

}  // namespace ptx
