#include "scratch.h"

#include <array>
#include <new>

#include "huge_pages.h"

namespace fastlane {
namespace {

// A larger buffer goes back to the system after its call: memory held by an idle thread stays bounded.
constexpr size_t kKeepBytes = size_t{32} << 20;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  static std::align_val_t alignment(size_t bytes) { return std::align_val_t{bytes < kHugePage ? 64 : kHugePage}; }

  void reserve(size_t wanted) {
    release();
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
  if (b.bytes > kKeepBytes) b.release();
}

}  // namespace fastlane
