// Runs a few lines of PTX on a Machine. `%in` and `%out` hold the addresses of words of 64 bits.
#pragma once

#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/check.h"
#include "ptx/machine.h"

namespace ptx::test {

using Words = std::vector<uint64_t>;

struct Lines {
  std::string text;
  Words in;
  size_t out_words = 1;
  uint32_t threads = 32, blocks = 1;
  bool one_cluster = false;  // of all blocks
  size_t shared_bytes = 0;
  uint64_t seed = 1;
  std::vector<Range> memory = {};  // beside `in` and `out`

  // Runs the lines and returns the words at `%out`, which are zeros before.
  Words run() const {
    const std::string kernel =
        ".extern .shared .align 16 .b8 memory[];\n.visible .entry k(.param .u64 k_param_0, .param .u64 "
        "k_param_1)\n{\n"
        ".reg .b64 %in; .reg .b64 %out; .reg .b64 %r<200>; .reg .pred %p<8>;\n"
        "ld.param.u64 %in, [k_param_0]; ld.param.u64 %out, [k_param_1];\n" +
        text + "\nret;\n}\n";
    Words out(out_words);
    const void *const in_address = in.data(), *const out_address = out.data();
    const void* const parameters[] = {&in_address, &out_address};
    std::vector<Range> allowed = memory;
    allowed.push_back({in.data(), in.size() * 8, false});
    allowed.push_back({out.data(), out.size() * 8, true});
    Machine machine(seed, allowed);
    const Size3 cluster{one_cluster ? blocks : 1, 1, 1};
    machine.launch(parse(kernel).at("k"), {blocks, 1, 1}, cluster, {threads, 1, 1}, shared_bytes, parameters);
    return out;
  }

  // The message of the error that must come, or "no error".
  std::string error() const {
    try {
      run();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "no error";
  }
};

inline bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// These lines apply an opcode to operands, each given as bits, and store the result at `%out`.
inline Lines lines_of(const std::string& opcode, const Words& operands) {
  std::string load, call = opcode + " %r9";
  for (size_t n = 0; n < operands.size(); ++n) {
    const std::string name = "%r" + std::to_string(n);
    load += "ld.global.u64 " + name + ", [%in+" + std::to_string(8 * n) + "];\n";
    call += ", " + name;
  }
  // Only the upper half of a word that holds 32 bits would tell of a result too wide.
  return {load + call + ";\nst.global.u64 [%out], %r9;", operands};
}
inline uint64_t result_of(const std::string& opcode, const Words& operands) {
  return lines_of(opcode, operands).run()[0];
}

inline uint64_t f32(float value) { return std::bit_cast<uint32_t>(value); }
inline uint64_t f64(double value) { return std::bit_cast<uint64_t>(value); }
inline uint64_t s32(int32_t value) { return static_cast<uint32_t>(value); }
inline float as_f32(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }

// %r70 = the thread's number in its block, %r71 = %out + 8 · that number
inline const std::string kEachThread =
    "mov.u32 %r70, %tid.x; mul.wide.u32 %r71, %r70, 8; add.s64 %r71, %out, %r71;\n";

void arithmetic();
void memory();
void barriers();
void warps();
void tma();
void tensor_cores();
void programs();

}  // namespace ptx::test
