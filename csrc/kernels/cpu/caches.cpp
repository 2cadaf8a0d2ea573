#include "caches.h"

#include <algorithm>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__unix__)
#include <unistd.h>
#endif

namespace fastlane {
namespace {

#if defined(__APPLE__)
int64_t size_of(const char* level) {
  int64_t bytes = 0;
  size_t length = sizeof bytes;
  return sysctlbyname(level, &bytes, &length, nullptr, 0) == 0 ? bytes : 0;
}
Caches ask() { return {size_of("hw.l2cachesize"), size_of("hw.l3cachesize")}; }
#elif defined(_SC_LEVEL2_CACHE_SIZE)
Caches ask() { return {sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)}; }
#else
Caches ask() { return {0, 0}; }
#endif

Caches ask_with_defaults() {
  const Caches told = ask();
  Caches sizes;
  if (told.l2 > 0) sizes.l2 = told.l2;
  sizes.last = std::max(told.last > 0 ? told.last : sizes.last, sizes.l2);
  return sizes;
}

}  // namespace

const Caches& caches() {
  static const Caches sizes = ask_with_defaults();
  return sizes;
}

}  // namespace fastlane
