#include "ops/frozen.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops/checks/checks.h"
#include "ops/own_calls.h"
#include "ops/packed_weight.h"
#include "ops/policy.h"

namespace fastlane {
namespace {

// FNV-1a over words, four at a time. One changed bit always changes the hash of its word's chain.
uint64_t content_hash(const at::Tensor& weight) {
  constexpr uint64_t kPrime = 0x100000001b3, kOffset = 0xcbf29ce484222325;
  const OwnCalls own_calls;
  const at::Tensor values = weight.is_non_overlapping_and_dense() ? weight : weight.contiguous();
  const char* bytes = static_cast<const char*>(values.const_data_ptr());
  uint64_t chains[4] = {kOffset, kOffset + 1, kOffset + 2, kOffset + 3};
  auto left = static_cast<size_t>(values.nbytes());
  for (; left > 0;) {
    uint64_t words[4] = {};
    const size_t some = std::min(left, sizeof words);
    std::memcpy(words, bytes, some);
    for (int i = 0; i < 4; ++i) chains[i] = (chains[i] ^ words[i]) * kPrime;
    bytes += some, left -= some;
  }
  uint64_t hash = kOffset;
  for (const uint64_t chain : chains) hash = (hash ^ chain) * kPrime;
  return hash;
}

struct Entry {
  // While this reference lives, no other storage has this address.
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  uint32_t version;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  bool checks_content;
  uint64_t hash;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> packed;  // Python owns the copy

  bool lives() const { return !storage.expired() && !packed.expired(); }
  bool is_of(const at::Tensor& weight) const {
    return lives() && weight.storage().unsafeGetStorageImpl() == storage._unsafe_get_target() &&
           weight.sizes() == at::IntArrayRef(sizes) && weight.strides() == at::IntArrayRef(strides) &&
           weight.scalar_type() == dtype;
  }
  bool is_unchanged(const at::Tensor& weight) const {
    if (weight.is_inference() || weight._version() != version) return false;
    return !(checks_content || policy::is_strict()) || content_hash(weight) == hash;
  }
};

// By the address of the weight's first element.
std::unordered_map<const void*, Entry> entries;
std::shared_mutex entries_mutex;
std::atomic<bool> any{false};

bool may_be_frozen(const at::Tensor& weight) {
  return any.load(std::memory_order_acquire) && weight.device().is_cpu() && weight.has_storage() &&
         !is_stand_in(weight);
}

struct Found {
  Frozen state = Frozen::absent;
  at::Tensor copy;
};

Found find(const at::Tensor& weight) {
  if (!may_be_frozen(weight)) return {};
  const std::shared_lock lock(entries_mutex);
  const auto found = entries.find(weight.const_data_ptr());
  if (found == entries.end() || !found->second.is_of(weight)) return {};
  if (!found->second.is_unchanged(weight)) return {Frozen::changed, {}};
  auto packed = found->second.packed.lock();
  // Another thread may let go of the copy now.
  return packed ? Found{Frozen::used, at::Tensor(std::move(packed))} : Found{};
}

}  // namespace

at::Tensor freeze_weight(const at::Tensor& weight, bool checks_content) {
  at::Tensor packed = pack_weight(weight);
  TORCH_CHECK(!weight.is_inference(),
              "freeze: weight was made in inference mode, expected a tensor that counts its changes; make the model "
              "outside of torch.inference_mode()");
  Entry entry{weight.storage().getWeakStorageImpl(),
              static_cast<uint32_t>(weight._version()),
              weight.sizes().vec(),
              weight.strides().vec(),
              weight.scalar_type(),
              checks_content,
              content_hash(weight),
              c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(packed.getIntrusivePtr())};
  const std::unique_lock lock(entries_mutex);
  for (auto old = entries.begin(); old != entries.end();)
    old = old->second.lives() ? std::next(old) : entries.erase(old);
  entries.insert_or_assign(weight.const_data_ptr(), std::move(entry));
  any = true;
  return packed;
}

Frozen frozen_state(const at::Tensor& weight) { return find(weight).state; }

at::Tensor frozen_copy(const at::Tensor& weight) {
  Found found = find(weight);
  if (found.state == Frozen::changed) policy::leave_fused_path("a frozen weight has changed since freeze(model)");
  return std::move(found.copy);
}

}  // namespace fastlane
