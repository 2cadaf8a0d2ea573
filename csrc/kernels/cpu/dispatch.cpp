#include "kernels/cpu/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastlane {
namespace {

struct Candidate {
  const char* name;
  const KernelTable* (*table)();
  bool (*cpu_supports)();
};

bool always() { return true; }

#if defined(__x86_64__)
// Older clangs do not know f16c by name.
bool cpu_has_f16c() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
// The compiler's own CPUID test also asks XGETBV whether the operating system saves the registers.
bool cpu_has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
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
    {"neon", neon_kernels, always},
    {"scalar", scalar_kernels, always},
};

bool usable(const Candidate& c) { return c.table() != nullptr && c.cpu_supports(); }

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

IsaChoice choose_isa(const std::string& asked, const std::vector<std::string>& supported) {
  if (asked.empty()) {
    for (const std::string& isa : supported)
      if (isa != "scalar") return {isa, "the best set that this CPU runs"};
    return {kNoIsa, "no vector kernels for this CPU; torch's own operators are faster than the scalar set"};
  }
  if (asked == kNoIsa || std::find(supported.begin(), supported.end(), asked) != supported.end())
    return {asked, "FASTLANE_CPU_ISA asks for it"};
  throw std::runtime_error("FASTLANE_CPU_ISA: got '" + asked + "', expected one of " + joined(supported) + ", " +
                           kNoIsa + " on this machine; unset it to let fastlane_ext choose");
}

const IsaChoice& chosen_isa() {
  static const IsaChoice chosen = [] {
    const char* asked = std::getenv("FASTLANE_CPU_ISA");
    return choose_isa(asked ? asked : "", supported_isas());
  }();
  return chosen;
}

const KernelTable& kernels() {
  static const KernelTable& chosen = *kernels_of(chosen_isa().isa == kNoIsa ? "scalar" : chosen_isa().isa);
  return chosen;
}

const KernelTable* kernels_of(const std::string& isa) {
  for (const Candidate& c : kCandidates)
    if (isa == c.name && usable(c)) return c.table();
  return nullptr;
}

bool core_is_zen3_to_zen5() {
#if defined(__x86_64__)
  unsigned int eax = 0, vendor[3] = {}, unused = 0;
  if (!__get_cpuid(0, &eax, &vendor[0], &vendor[2], &vendor[1])) return false;
  if (std::memcmp(vendor, "AuthenticAMD", sizeof vendor) != 0) return false;
  if (!__get_cpuid(1, &eax, &unused, &unused, &unused)) return false;
  const unsigned int family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  const unsigned int model = (eax >> 4 & 0xf) | (eax >> 12 & 0xf0);
  // Zen 6 has the other models of family 1Ah. The ranges are those of Linux, arch/x86/kernel/cpu/amd.c.
  const bool is_zen5 = model < 0x30 || (model >= 0x40 && model < 0x50) || (model >= 0x60 && model < 0x80);
  return family == 0x19 || (family == 0x1a && is_zen5);
#else
  return false;
#endif
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
