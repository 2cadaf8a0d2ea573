#include "kernels/cpu/caches.h"

#include <algorithm>
#include <cstdlib>
#include <locale>
#include <sstream>
#include <string>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__unix__)
#include <unistd.h>

#include <fstream>
#endif

namespace fastlane {
namespace {

#if defined(__APPLE__)
int64_t size_of(const char* level) {
  int64_t bytes = 0;
  size_t length = sizeof bytes;
  return sysctlbyname(level, &bytes, &length, nullptr, 0) == 0 ? bytes : 0;
}
Caches ask() { return {size_of("hw.l1dcachesize"), size_of("hw.l2cachesize"), size_of("hw.l3cachesize")}; }
#elif defined(_SC_LEVEL2_CACHE_SIZE)
// The size of this level's cache that Linux lists for the first core, such as "32768K".
int64_t listed_size(int level) {
  constexpr int kListed = 8;
  for (int i = 0; i < kListed; ++i) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    int listed_level = 0;
    int64_t size = 0;
    char unit = 0;
    if (!(std::ifstream(folder + "level") >> listed_level)) break;
    if (listed_level == level && std::ifstream(folder + "size") >> size >> unit && unit == 'K') return size << 10;
  }
  return 0;
}
// On some machines sysconf gives, for the last level, the sum of a socket's caches, but a core uses only one of them.
Caches ask() {
  const int64_t last = listed_size(3);
  return {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE),
          last > 0 ? last : sysconf(_SC_LEVEL3_CACHE_SIZE)};
}
#else
Caches ask() { return {0, 0, 0}; }
#endif

Caches ask_with_defaults() {
  const Caches told = ask();
  Caches sizes;
  if (told.l1 > 0) sizes.l1 = told.l1;
  if (told.l2 > 0) sizes.l2 = told.l2;
  sizes.last = std::max(told.last > 0 ? told.last : sizes.last, sizes.l2);
  return sizes;
}

}  // namespace

const Caches& caches() {
  static const Caches sizes = [] {
    const char* const text = std::getenv("FASTLANE_CACHES");
    const std::optional<Caches> given = parse_caches(text ? text : "");
    return given ? *given : ask_with_defaults();
  }();
  return sizes;
}

std::optional<Caches> parse_caches(const std::string& text) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  Caches sizes;
  char first = 0, second = 0;
  if (!(in >> sizes.l1 >> first >> sizes.l2 >> second >> sizes.last) || in.peek() != std::char_traits<char>::eof())
    return std::nullopt;
  const bool ordered = 0 < sizes.l1 && sizes.l1 <= sizes.l2 && sizes.l2 <= sizes.last;
  if (first != ',' || second != ',' || !ordered) return std::nullopt;
  return sizes;
}

}  // namespace fastlane
