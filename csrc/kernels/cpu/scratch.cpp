#include "kernels/cpu/scratch.h"

#include <array>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastlane {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Work memory is kept and read again and again. Huge pages save page faults once, and TLB entries always.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  static std::align_val_t alignment(size_t bytes) { return std::align_val_t{bytes < kHugePage ? 64 : kHugePage}; }

  void reserve(size_t wanted) {
    release();
    if (wanted >= kHugePage / 4) wanted = (wanted + kHugePage - 1) / kHugePage * kHugePage;
    data = ::operator new(wanted, alignment(wanted));
    bytes = wanted;
    prefer_huge_pages(data, bytes);
  }
  void release() {
    ::operator delete(data, alignment(bytes));
    data = nullptr;
    bytes = 0;
  }
  ~Buffer() { release(); }
};

Buffer& buffer(ScratchSlot slot) {
  thread_local std::array<Buffer, static_cast<size_t>(ScratchSlot::count)> buffers;
  return buffers[static_cast<size_t>(slot)];
}

}  // namespace

Scratch::Scratch(ScratchSlot slot, size_t bytes) : slot_(slot) {
  Buffer& b = buffer(slot);
  if (b.bytes < bytes) b.reserve(bytes);
  data_ = b.data;
}

Scratch::~Scratch() {
  Buffer& b = buffer(slot_);
  if (b.bytes > kKeptScratchBytes) b.release();
}

}  // namespace fastlane
