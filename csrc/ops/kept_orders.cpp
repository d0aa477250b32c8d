#include "ops/kept_orders.h"

#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <mutex>
#include <unordered_map>
#include <utility>

namespace scalegmn {
namespace {

struct Order {
  std::vector<int64_t> key;
  const void* stream;
  at::Tensor rows;
};

struct Orders {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;  // keeps the address, not the numbers
  int64_t version;
  std::vector<Order> orders;
};

std::mutex mutex;

// Never destroyed: a device may be gone before static objects are.
std::unordered_map<const c10::StorageImpl*, Orders>& kept() {
  static auto* all = new std::unordered_map<const c10::StorageImpl*, Orders>;
  return *all;
}

}  // namespace

at::Tensor kept_order(const at::Tensor& index, std::vector<int64_t> key, const void* stream, bool capturing,
                      c10::function_ref<at::Tensor()> make) {
  if (index.is_inference()) return make();  // has no version: writing to it would go unseen
  const auto storage = index.storage().getWeakStorageImpl();
  const c10::StorageImpl* place = index.storage().unsafeGetStorageImpl();
  const int64_t version = index._version();
  key.insert(key.end(), {index.storage_offset(), index.numel(), int64_t(index.scalar_type())});
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = kept().find(place);
    if (found != kept().end() && found->second.version == version) {
      for (const Order& order : found->second.orders) {
        if (order.key == key && (capturing || order.stream == stream)) return order.rows;
      }
    }
  }
  const at::Tensor rows = make();
  if (capturing) return rows;
  const std::lock_guard<std::mutex> lock(mutex);
  std::erase_if(kept(), [](const auto& item) { return item.second.storage.expired(); });
  Orders& orders = kept().try_emplace(place, Orders{storage, version, {}}).first->second;
  if (orders.version != version) orders = {storage, version, {}};
  orders.orders.push_back({std::move(key), stream, rows});
  return rows;
}

}  // namespace scalegmn
