#include "scratch.h"

#include <array>
#include <new>

namespace fastlane {
namespace {

constexpr std::align_val_t kAlignment{64};
// A larger buffer goes back to the system after its call: memory held by an idle thread stays bounded.
constexpr size_t kKeepBytes = size_t{32} << 20;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  void release() {
    ::operator delete(data, kAlignment);
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
  if (b.bytes < bytes) {
    b.release();
    b.data = ::operator new(bytes, kAlignment);
    b.bytes = bytes;
  }
  data_ = b.data;
}

Scratch::~Scratch() {
  Buffer& b = buffer(slot_);
  if (b.bytes > kKeepBytes) b.release();
}

}  // namespace fastlane
