// What each opcode does. Semantics: the PTX ISA manual, 9.0.
#pragma once

#include <string>
#include <type_traits>
#include <unordered_map>

#include "machine.h"

namespace ptx {

using Table = std::unordered_map<std::string, Handler>;
void add_arithmetic(Table& table);
void add_memory(Table& table);
void add_synchronisation(Table& table);
void add_warp(Table& table);
void add_tma(Table& table);
void add_tensor_cores(Table& table);

// Null if there is none.
Handler handler_of(const std::string& opcode);

uint64_t bits_of_no_register(const Machine& m, const Thread& t, const Operand& operand);
inline uint64_t bits(const Machine& m, const Thread& t, const Operand& operand) {
  return operand.kind == Operand::Kind::reg ? t.registers[operand.value] : bits_of_no_register(m, t, operand);
}

template <class V>
V read(const Machine& m, const Thread& t, const Operand& operand) {
  const uint64_t all = bits(m, t, operand);
  V value;
  std::memcpy(&value, &all, sizeof value);
  return value;
}

template <class V>
void write(Thread& t, const Operand& operand, std::type_identity_t<V> value) {
  if (operand.kind == Operand::Kind::none) return;
  uint64_t all = 0;
  std::memcpy(&all, &value, sizeof value);
  t.registers[operand.value] = all;
}

inline uint64_t address(const Machine& m, const Thread& t, const Operand& operand) {
  return bits(m, t, operand.parts[0]) + operand.value;
}
inline uint32_t shared_address(const Machine& m, const Thread& t, const Operand& operand) {
  return static_cast<uint32_t>(address(m, t, operand));
}

// CUTLASS's Swizzle<swizzle_bits, 4, 3> of an address in bytes.
inline uint32_t swizzled(uint32_t address, int swizzle_bits) {
  return address ^ (address >> 7 & ((1u << swizzle_bits) - 1)) << 4;
}

float from_bf16(uint16_t stored);
float from_f16(uint16_t stored);
uint16_t to_bf16(float value);
uint16_t to_f16(float value);

}  // namespace ptx
