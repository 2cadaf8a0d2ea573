#include "instructions.h"

#include <cmath>

namespace ptx {

Handler handler_of(const std::string& opcode) {
  static const Table table = [] {
    Table all;
    for (const auto add : {add_arithmetic, add_memory, add_synchronisation, add_warp, add_tma, add_tensor_cores})
      add(all);
    return all;
  }();
  const auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

namespace {

uint64_t special(const Machine& m, const Thread& t, const std::string& name) {
  const Block& block = *t.block;
  if (name == "%tid.x") return t.index % m.block.x;
  if (name == "%tid.y") return t.index / m.block.x;
  if (name == "%ntid.x") return m.block.x;
  if (name == "%ntid.y") return m.block.y;
  if (name == "%ctaid.x") return block.index.x;
  if (name == "%ctaid.y") return block.index.y;
  if (name == "%ctaid.z") return block.index.z;
  if (name == "%nctaid.x") return m.grid.x;
  if (name == "%nctaid.y") return m.grid.y;
  if (name == "%nctaid.z") return m.grid.z;
  if (name == "%cluster_ctarank" || name == "%cluster_ctaid.x") return block.rank;
  if (name == "%cluster_ctaid.y" || name == "%cluster_ctaid.z") return 0;
  throw std::runtime_error("special register " + name);
}

}  // namespace

uint64_t bits_of_no_register(const Machine& m, const Thread& t, const Operand& operand) {
  switch (operand.kind) {
    case Operand::Kind::immediate: return operand.value;
    case Operand::Kind::special: return special(m, t, operand.name);
    case Operand::Kind::parameter: return reinterpret_cast<uint64_t>(m.parameters[operand.value]);
    case Operand::Kind::shared_symbol: return ((t.block->rank + 1) << kOffsetBits) + kSharedBase + operand.value;
    default: throw std::runtime_error("an operand without a value");
  }
}

float from_bf16(uint16_t stored) {
  const uint32_t all = static_cast<uint32_t>(stored) << 16;
  float value;
  std::memcpy(&value, &all, sizeof value);
  return value;
}
float from_f16(uint16_t stored) {
  _Float16 value;
  std::memcpy(&value, &stored, sizeof value);
  return static_cast<float>(value);
}
uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t all;
  std::memcpy(&all, &value, sizeof all);
  return static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16);
}
uint16_t to_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t stored;
  std::memcpy(&stored, &rounded, sizeof stored);
  return stored;
}

}  // namespace ptx
