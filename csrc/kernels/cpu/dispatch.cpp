#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fastlane {
namespace {

struct Candidate {
  const char* name;
  const KernelTable* (*table)();
  bool (*cpu_supports)();
};

bool always() { return true; }

#if defined(__x86_64__)
// The compiler's own CPUID test also asks XGETBV whether the operating system saves the registers.
bool cpu_has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool cpu_has_avx512() {
  __builtin_cpu_init();
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool cpu_has_avx512_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_bf16() { return false; }
#endif

// Best first.
constexpr Candidate kCandidates[] = {
    {"avx512_bf16", avx512_bf16_kernels, cpu_has_avx512_bf16},
    {"avx512", avx512_kernels, cpu_has_avx512},
    {"avx2", avx2_kernels, cpu_has_avx2},
    {"scalar", scalar_kernels, always},
};

bool usable(const Candidate& c) { return c.table() != nullptr && c.cpu_supports(); }

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const KernelTable& choose() {
  const char* forced = std::getenv("FASTLANE_CPU_ISA");
  const bool automatic = forced == nullptr || *forced == '\0';
  for (const Candidate& c : kCandidates) {
    if (usable(c) && (automatic || std::string(forced) == c.name)) return *c.table();
  }
  throw std::runtime_error("FASTLANE_CPU_ISA: got '" + std::string(forced) + "', expected one of " +
                           joined(supported_isas()) + " on this machine; unset it to let fastlane_ext choose");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : kCandidates)
    if (c.table() != nullptr) names.emplace_back(c.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : kCandidates)
    if (usable(c)) names.emplace_back(c.name);
  return names;
}

}  // namespace fastlane
