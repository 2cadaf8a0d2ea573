// Loads and stores, and barriers.
#include <algorithm>

#include "instructions.h"

namespace ptx {
namespace {

enum class Space { global, shared, parameter };

template <Space space>
void* resolve(Machine& m, uint64_t address, size_t bytes, bool writes) {
  if constexpr (space == Space::shared) {
    return m.shared(static_cast<uint32_t>(address), bytes);
  } else {
    void* const place = reinterpret_cast<void*>(address);
    space == Space::global ? m.check_global(place, bytes, writes) : m.check_parameter(place, bytes);
    return place;
  }
}

// One register or a vector of them.
template <class V, Space space, bool stores>
bool access(Machine& m, Thread& t, const Instruction& i) {
  const Operand &values = i.operands[stores ? 1 : 0], &place = i.operands[stores ? 0 : 1];
  const size_t count = std::max<size_t>(1, values.parts.size());
  // The host may have put the next parameter right behind.
  const Operand& base = place.parts[0];
  if (base.kind == Operand::Kind::parameter && place.value + count * sizeof(V) > m.parameter_bytes[base.value])
    throw std::runtime_error("a read beyond the parameter");
  const uint64_t from = address(m, t, place);
  if (from % (count * sizeof(V)) != 0) throw std::runtime_error("a misaligned address");
  char* memory = static_cast<char*>(resolve<space>(m, from, count * sizeof(V), stores));
  if (space == Space::shared && stores) m.stored(t, static_cast<uint32_t>(from), count * sizeof(V));
  for (size_t n = 0; n < count; ++n, memory += sizeof(V)) {
    const Operand& each = values.parts.empty() ? values : values.parts[n];
    V value;
    if (stores) {
      value = read<V>(m, t, each);
      std::memcpy(memory, &value, sizeof value);
    } else {
      std::memcpy(&value, memory, sizeof value);
      write<V>(t, each, value);
    }
  }
  return true;
}
template <class V, Space space>
constexpr Handler load = access<V, space, false>;
template <class V, Space space>
constexpr Handler store = access<V, space, true>;

template <class V>
void add_accesses(Table& table, const std::string& type) {
  table["ld.param." + type] = load<V, Space::parameter>;
  table["ld.global." + type] = load<V, Space::global>;
  table["st.global." + type] = store<V, Space::global>;
  table["ld.shared." + type] = load<V, Space::shared>;
  table["st.shared." + type] = store<V, Space::shared>;
}

bool block_barrier(Machine& m, Thread& t, const Instruction& i) {
  const auto& o = i.operands;
  const uint32_t which = read<uint32_t>(m, t, o[0]);
  const uint32_t count = o.size() > 1 ? read<uint32_t>(m, t, o[1]) : m.threads;
  if (which >= 16) throw std::runtime_error("bar.sync: no such barrier");
  if (count == 0 || count % 32 != 0) throw std::runtime_error("bar.sync: a count that is no multiple of 32");
  auto& waiting = t.block->waiting[which];
  if (waiting.size() + 1 < count) {
    t.parked = true;
    waiting.push_back(&t);
    return false;
  }
  for (Thread* const other : waiting) {
    other->parked = false;
    ++other->next;
  }
  waiting.clear();
  ++m.events;
  return true;
}

bool cluster_arrive(Machine& m, Thread& t, const Instruction&) {
  t.cluster_phase = m.cluster_phase;
  if (++m.cluster_arrived < m.threads * m.blocks.size()) return true;
  m.cluster_arrived = 0;
  ++m.cluster_phase;
  ++m.events;
  return true;
}

MBarrier& mbarrier(Machine& m, Thread& t, const Operand& place) {
  return *reinterpret_cast<MBarrier*>(m.shared(shared_address(m, t, place), sizeof(MBarrier)));
}

// Operand 0 gets the state before, which nobody asks for.
bool arrive(Machine& m, Thread& t, const Instruction& i) {
  m.arrive(mbarrier(m, t, i.operands[1]));
  return true;
}
bool arrive_once(Machine& m, Thread& t, const Instruction& i) {
  if (i.operands.size() != 2) throw std::runtime_error("mbarrier.arrive: a count");
  return arrive(m, t, i);
}

bool try_wait(Machine& m, Thread& t, const Instruction& i) {
  const int32_t phase = mbarrier(m, t, i.operands[1]).bytes_and_phase & 1;
  const bool completed = phase != read<int32_t>(m, t, i.operands[2]);
  t.yields = !completed;
  write<uint64_t>(t, i.operands[0], completed);
  return true;
}

bool map_to_block(Machine& m, Thread& t, const Instruction& i) {
  const uint32_t rank = read<uint32_t>(m, t, i.operands[2]);
  if (rank >= m.blocks.size()) throw std::runtime_error("mapa: no such block");
  write<uint32_t>(t, i.operands[0], (read<uint32_t>(m, t, i.operands[1]) & kOffsetMask) | (rank + 1) << kOffsetBits);
  return true;
}

// Until the copy is waited for, its place is NaN.
bool copy_async(Machine& m, Thread& t, const Instruction& i) {
  constexpr size_t kBytes = 16;
  const uint32_t to = shared_address(m, t, i.operands[0]);
  const auto* const from = reinterpret_cast<const void*>(address(m, t, i.operands[1]));
  const bool present = read<uint32_t>(m, t, i.operands.at(3)) != 0;
  if (read<uint32_t>(m, t, i.operands[2]) != kBytes || (present && read<uint32_t>(m, t, i.operands[3]) != kBytes))
    throw std::runtime_error("cp.async: other than 16 bytes or none");
  if (to % kBytes != 0 || reinterpret_cast<uintptr_t>(from) % kBytes != 0)
    throw std::runtime_error("cp.async: a misaligned address");
  if (present) m.check_global(from, kBytes, false);
  std::memset(m.shared(to, kBytes), 0xff, kBytes);
  t.copies.open.push_back(begun_at(i, [&m, &t, to, from, present] {
    uint8_t* const place = m.shared(to, kBytes);
    present ? std::memcpy(place, from, kBytes) : std::memset(place, 0, kBytes);
    m.stored(t, to, kBytes);
  }));
  return true;
}

bool end_thread(Machine& m, Thread& t, const Instruction&) {
  if (!t.copies.empty()) throw std::runtime_error("a cp.async was not waited for");
  if (!t.stores.empty()) throw std::runtime_error("a TMA store may still read shared memory");
  if (!t.block->products[t.index / 128].empty()) throw std::runtime_error("a wgmma was not waited for");
  t.done = true;
  --t.block->running;
  ++m.events;
  return true;
}

}  // namespace

void add_memory(Table& table) {
  table["cp.async.cg.shared.global"] = copy_async;
  table["cp.async.commit_group"] = [](Machine&, Thread& t, const Instruction&) {
    t.copies.commit();
    return true;
  };
  table["cp.async.wait_group"] = [](Machine& m, Thread& t, const Instruction& i) {
    t.copies.wait(read<uint32_t>(m, t, i.operands[0]));
    return true;
  };
  table["prefetch.global.L2"] = [](Machine& m, Thread& t, const Instruction& i) {
    m.check_global(reinterpret_cast<const void*>(address(m, t, i.operands[0])), 1, false);
    return true;
  };
  table["ld.param.u8"] = load<uint8_t, Space::parameter>;
  for (const char* count : {"", "v2.", "v4."}) {
    const std::string vector = count;
    add_accesses<uint16_t>(table, vector + "u16");
    for (const char* type : {"u32", "s32", "f32"}) add_accesses<uint32_t>(table, vector + type);
    for (const char* type : {"u64", "f64"}) add_accesses<uint64_t>(table, vector + type);
  }
}

void add_synchronisation(Table& table) {
  const Handler nothing = [](Machine&, Thread&, const Instruction&) { return true; };
  // Threads run one at a time, so memory is in order except for what TMA and wgmma see.
  for (const char* opcode :
       {"fence.mbarrier_init.release.cluster", "setmaxnreg.dec.sync.aligned.u32", "setmaxnreg.inc.sync.aligned.u32"})
    table[opcode] = nothing;
  table["fence.proxy.async.shared::cta"] = [](Machine&, Thread& t, const Instruction&) {
    ++t.proxy_fences;
    return true;
  };
  table["ret"] = end_thread;
  table["bar.sync"] = block_barrier;
  table["barrier.cluster.arrive.relaxed.aligned"] = cluster_arrive;
  table["barrier.cluster.wait.aligned"] = [](Machine& m, Thread& t, const Instruction&) {
    return t.cluster_phase != m.cluster_phase;
  };
  table["mapa.shared::cluster.u32"] = map_to_block;
  table["mbarrier.init.shared::cta.b64"] = [](Machine& m, Thread& t, const Instruction& i) {
    const auto count = read<uint32_t>(m, t, i.operands[1]);
    if (count == 0 || count > 65535) throw std::runtime_error("mbarrier.init: count");
    mbarrier(m, t, i.operands[0]) = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
    return true;
  };
  table["mbarrier.try_wait.parity.shared::cta.b64"] = try_wait;
  table["mbarrier.arrive.shared::cluster.b64"] = table["mbarrier.arrive.shared::cta.b64"] = arrive_once;
  table["mbarrier.expect_tx.shared::cta.b64"] = [](Machine& m, Thread& t, const Instruction& i) {
    m.expect_bytes(mbarrier(m, t, i.operands[0]), read<int32_t>(m, t, i.operands[1]));
    return true;
  };
  table["mbarrier.arrive.expect_tx.shared::cta.b64"] = [](Machine& m, Thread& t, const Instruction& i) {
    m.expect_bytes(mbarrier(m, t, i.operands[1]), read<int32_t>(m, t, i.operands[2]));
    return arrive(m, t, i);
  };
}

}  // namespace ptx
