// Advice to the system to back memory that is about to be written for the first time by huge pages.
#pragma once

#include <cstddef>

namespace fastlane {

constexpr size_t kHugePage = size_t{2} << 20;

// Touching fresh memory page by page costs up to 2 µs for each 4 KiB, more than computing what is stored there; in
// huge pages an eighth of that (25 MB: 12.7 ms and 1.5 ms). Only whole huge pages inside the range are meant, so no
// memory is used beyond it. A hint: does nothing where the system has none, or where the range is too small to gain.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace fastlane
