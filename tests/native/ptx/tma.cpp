// Copies boxes of a tensor between global and shared memory.
#include "instructions.h"
#include "tensor_map.h"

namespace ptx {
namespace {

struct Box {
  TensorMap map;
  int64_t at[5] = {};
  uint32_t rank, offset;  // the block, and the place in its shared memory

  Box(Machine& m, Thread& t, const Operand& tensor, const Operand& place)
      : rank(m.block_of(shared_address(m, t, place)).rank), offset(shared_address(m, t, place) & kOffsetMask) {
    std::memcpy(&map, reinterpret_cast<const void*>(bits(m, t, tensor.parts[0])), sizeof map);
    const auto& coordinates = tensor.parts[1].parts;
    if (map.mark != TensorMap::kMark || coordinates.size() != map.rank) throw std::runtime_error("TMA: tensor map");
    for (size_t d = 0; d < coordinates.size(); ++d) at[d] = read<int32_t>(m, t, coordinates[d]);
    // TMA asks for an alignment of 128 bytes. The swizzle follows the address and repeats after this many bytes, as
    // the readers expect.
    if (offset % (128u << map.swizzle_bits) != 0)
      throw std::runtime_error("TMA: shared memory at " + std::to_string(offset) + " does not suit the swizzle");
  }

  uint32_t elements() const {
    uint32_t count = 1;
    for (int d = 0; d < map.rank; ++d) count *= map.box[d];
    return count;
  }
  uint32_t bytes() const { return elements() * map.element_bytes; }

  // Calls f(offset in shared memory, address); the address is null beside the tensor.
  template <class F>
  void for_each_element(F f) const {
    uint32_t inside[5] = {};
    for (uint32_t e = 0; e < elements(); ++e) {
      uint8_t* place = map.base;
      for (int d = 0; d < map.rank && place; ++d) {
        const int64_t c = at[d] + inside[d];
        const bool beside = c < 0 || static_cast<uint64_t>(c) >= map.sizes[d];
        place =
            beside ? nullptr : place + static_cast<uint64_t>(c) * (d == 0 ? map.element_bytes : map.strides[d - 1]);
      }
      f(swizzled(offset + e * map.element_bytes, map.swizzle_bits), place);
      for (int d = 0; d < map.rank && ++inside[d] == map.box[d]; ++d) inside[d] = 0;
    }
  }
};

template <bool multicast>
bool load(Machine& m, Thread& t, const Instruction& i) {
  const auto& o = i.operands;
  const Box box(m, t, o[1], o[0]);
  const uint32_t barrier = shared_address(m, t, o[2]) & kOffsetMask;
  const uint32_t to_blocks = multicast ? read<uint16_t>(m, t, o[3]) : 1u << box.rank;
  for (Block& block : m.blocks) {
    if (!(to_blocks >> block.rank & 1)) continue;
    const uint32_t base = (block.rank + 1) << kOffsetBits;
    const auto arrive = [&m, box, base, barrier] {
      box.for_each_element([&](uint32_t offset, const uint8_t* from) {
        uint8_t* const to = m.shared_to_write_async(base + offset, box.map.element_bytes);
        if (from) m.check_global(from, box.map.element_bytes, false);
        from ? std::memcpy(to, from, box.map.element_bytes) : std::memset(to, 0, box.map.element_bytes);
      });
      auto* const state = reinterpret_cast<MBarrier*>(m.shared(base + barrier, sizeof(MBarrier)));
      m.complete_bytes(*state, static_cast<int32_t>(box.bytes()));
    };
    if (m.coin()) {
      m.loads.push_back(begun_at(i, arrive));
    } else {
      arrive();
    }
  }
  ++m.events;
  return true;
}

bool store(Machine& m, Thread& t, const Instruction& i) {
  const Box box(m, t, i.operands[0], i.operands[1]);
  const uint32_t base = (box.rank + 1) << kOffsetBits;
  const auto leave = [&m, box, base] {
    box.for_each_element([&](uint32_t offset, uint8_t* to) {
      if (!to) return;
      m.check_global(to, box.map.element_bytes, true);
      std::memcpy(to, m.shared_to_read_async(base + offset, box.map.element_bytes), box.map.element_bytes);
    });
  };
  if (t.block->stores_late) {
    t.stores.open.push_back(begun_at(i, leave));
  } else {
    leave();
  }
  ++m.events;
  return true;
}

}  // namespace

void add_tma(Table& table) {
  const std::string load_opcode = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes";
  table[load_opcode + ".L2::cache_hint"] = load<false>;
  table[load_opcode + ".multicast::cluster.L2::cache_hint"] = load<true>;
  table["cp.async.bulk.tensor.3d.global.shared::cta.bulk_group"] = store;
  table["cp.async.bulk.commit_group"] = [](Machine&, Thread& t, const Instruction&) {
    t.stores.commit();
    return true;
  };
  table["cp.async.bulk.wait_group.read"] = [](Machine&, Thread& t, const Instruction& i) {
    t.stores.wait(i.operands[0].value);
    return true;
  };
  table["prefetch.tensormap"] = [](Machine&, Thread&, const Instruction&) { return true; };
}

}  // namespace ptx
