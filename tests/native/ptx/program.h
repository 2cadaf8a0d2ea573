// Turns PTX text into instructions that a Machine runs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

struct Operand {
  enum class Kind : uint8_t { none, reg, immediate, special, shared_symbol, parameter, vector, address };
  Kind kind = Kind::none;
  // A register's or parameter's number, an immediate's bits, an address's offset, or the beginning of a shared
  // symbol.
  uint64_t value = 0;
  std::string name;  // of a special register
  std::vector<Operand> parts;  // a vector's parts; an address's base and, for a tensor, its coordinates
};

struct Machine;
struct Thread;
struct Instruction;
// If false, the thread has to wait, and executes the same instruction again.
using Handler = bool (*)(Machine&, Thread&, const Instruction&);

struct Instruction {
  Handler execute = nullptr;
  std::string opcode;
  std::vector<Operand> operands;
  int guard = -1;  // a register's number
  bool guard_negated = false, branches = false;
  uint32_t target = 0;
  int line = 0;
};

struct Kernel {
  std::vector<Instruction> code;
  uint32_t registers = 0;
  std::vector<uint32_t> parameter_bytes;
  uint32_t shared_bytes = 0;  // without what the launch gives, which lies behind
};

// Where the launch's shared memory begins.
uint32_t dynamic_shared_offset(const Kernel& kernel);

// The kernels of a file, by name. Throws std::runtime_error at anything unknown, such as an opcode.
std::map<std::string, Kernel> parse(const std::string& text);

}  // namespace ptx
