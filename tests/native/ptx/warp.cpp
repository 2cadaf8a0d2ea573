// What the 32 threads of a warp do together.
#include <bit>

#include "instructions.h"

namespace ptx {
namespace {

uint32_t first_of_warp(const Thread& t) { return t.index - t.lane(); }

template <bool butterfly>
bool shuffle(Machine& m, Thread& t, const Instruction& i) {
  const auto& o = i.operands;
  const bool has_predicate = o.size() == 6;
  const size_t value = has_predicate ? 2 : 1;
  const uint32_t mask = read<uint32_t>(m, t, o[value + 3]);
  if (!m.gathered(t, first_of_warp(t), 32, mask)) return false;
  Thread* const lanes = t.block->threads.data() + first_of_warp(t);
  uint32_t values[32] = {};
  for (uint32_t lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) values[lane] = read<uint32_t>(m, lanes[lane], o[value]);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint32_t b = read<uint32_t>(m, lanes[lane], o[value + 1]);
    if (read<uint32_t>(m, lanes[lane], o[value + 2]) != 31) throw std::runtime_error("shfl: part of a warp");
    const uint32_t source = (butterfly ? lane ^ b : b) & 31;
    if (!(mask >> source & 1)) throw std::runtime_error("shfl: from a lane that takes no part");
    write<uint32_t>(lanes[lane], o[0], values[source]);
    if (has_predicate) write<uint64_t>(lanes[lane], o[1], 1);
  }
  return true;
}

bool elect(Machine& m, Thread& t, const Instruction& i) {
  const auto& o = i.operands;
  const uint32_t mask = read<uint32_t>(m, t, o[2]);
  if (!m.gathered(t, first_of_warp(t), 32, mask)) return false;
  const auto leader = static_cast<uint32_t>(std::countr_zero(mask));
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& each = t.block->threads[first_of_warp(t) + lane];
    write<uint32_t>(each, o[0], leader);
    write<uint64_t>(each, o[1], lane == leader);
  }
  return true;
}

// ldmatrix and stmatrix: lanes 8 q to 8 q + 7 name the rows of matrix q, of which lane l has elements 2 (l % 4) and
// the next one of row l / 4 or, transposed, of column l / 4.
template <bool stores, bool transposed = false>
bool matrices(Machine& m, Thread& t, const Instruction& i) {
  if (!m.gathered(t, first_of_warp(t), 32)) return false;
  const Operand &values = i.operands[stores ? 1 : 0], &place = i.operands[stores ? 0 : 1];
  Thread* const lanes = t.block->threads.data() + first_of_warp(t);
  for (uint32_t q = 0; q < values.parts.size(); ++q)
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const auto row = [&](uint32_t r) { return m.shared(shared_address(m, lanes[q * 8 + r], place), 16); };
      uint8_t* const pair = row(lane / 4) + lane % 4 * 4;
      uint32_t value;
      if (transposed) {
        uint16_t halves[2];
        for (uint32_t i = 0; i < 2; ++i)
          std::memcpy(&halves[i], row(lane % 4 * 2 + i) + lane / 4 * 2, sizeof halves[i]);
        write<uint32_t>(lanes[lane], values.parts[q], halves[0] | static_cast<uint32_t>(halves[1]) << 16);
        continue;
      }
      if (stores) {
        value = read<uint32_t>(m, lanes[lane], values.parts[q]);
        std::memcpy(pair, &value, sizeof value);
        m.stored(lanes[lane], shared_address(m, lanes[q * 8 + lane / 4], place) + lane % 4 * 4, sizeof value);
      } else {
        std::memcpy(&value, pair, sizeof value);
        write<uint32_t>(lanes[lane], values.parts[q], value);
      }
    }
  return true;
}

}  // namespace

void add_warp(Table& table) {
  table["shfl.sync.idx.b32"] = shuffle<false>;
  table["shfl.sync.bfly.b32"] = shuffle<true>;
  table["elect.sync"] = elect;
  table["ldmatrix.sync.aligned.x4.m8n8.shared.b16"] = matrices<false>;
  table["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = matrices<false>;
  table["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = matrices<false, true>;
  table["stmatrix.sync.aligned.x4.m8n8.shared.b16"] = matrices<true>;
}

}  // namespace ptx
