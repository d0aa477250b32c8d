#include "ops/pool.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace scalegmn {
namespace {

constexpr size_t small_page = size_t(1) << 12, huge_page = size_t(1) << 21;

// Large blocks are mapped by themselves, on huge pages but for what follows the last whole one. Freed into malloc's heap
// they would make it keep smaller ones there, too, in pieces.
bool is_mapped(size_t bytes) {
#ifdef __linux__
  return bytes >= huge_page;
#else
  return false;
#endif
}

void* allocate(size_t bytes) {
#ifdef __linux__
  if (is_mapped(bytes)) {
    void* mapped = mmap(nullptr, bytes + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* first = static_cast<char*>(mapped);
    const size_t before = (huge_page - reinterpret_cast<uintptr_t>(first) % huge_page) % huge_page;
    if (before > 0) munmap(first, before);
    munmap(first + before + bytes, huge_page - before);
    madvise(first + before, bytes, MADV_HUGEPAGE);
    return first + before;
  }
#endif
  return std::aligned_alloc(small_page, bytes);
}

void release(void* block, size_t bytes) {
#ifdef __linux__
  if (is_mapped(bytes)) {
    munmap(block, bytes);
    return;
  }
#endif
  std::free(block);
}

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> idle;
  size_t idle_bytes = 0;
  size_t most_idle = 0;

  Pool() {
    const char* megabytes = std::getenv("SCALEGMN_FAST_POOL_MB");
    most_idle = (megabytes != nullptr ? std::strtoull(megabytes, nullptr, 10) : 512) << 20;
  }

  // At least `bytes`; sets it to what was given.
  void* take(size_t& bytes) {
    bytes = (bytes + small_page - 1) / small_page * small_page;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto found = idle.lower_bound(bytes);
      if (found != idle.end() && found->first / 4 * 3 <= bytes) {
        void* block = found->second;
        bytes = found->first;
        idle_bytes -= bytes;
        idle.erase(found);
        return block;
      }
    }
    void* block = allocate(bytes);
    if (block == nullptr) throw std::bad_alloc();
    return block;
  }

  void give(void* block, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    idle.emplace(bytes, block);
    idle_bytes += bytes;
    while (idle_bytes > most_idle) {
      const auto largest = std::prev(idle.end());
      idle_bytes -= largest->first;
      release(largest->second, largest->first);
      idle.erase(largest);
    }
  }
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive every static object
  return *instance;
}

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  size_t bytes = c10::elementSize(dtype) * size_t(c10::multiply_integers(sizes));
  const at::Context& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (bytes < size_t(pool_smallest) || filled || pool().most_idle == 0) return at::empty(sizes, dtype);
  void* block = pool().take(bytes);
  return at::from_blob(block, sizes, [bytes](void* data) { pool().give(data, bytes); }, at::TensorOptions(dtype));
}

at::Tensor pooled_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  return pooled_empty(sizes, c10::typeMetaToScalarType(options.dtype()));
}

at::Tensor pooled_cast(const at::Tensor& tensor, at::ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  at::Tensor cast = pooled_empty(tensor.sizes(), dtype);
  return cast.copy_(tensor);
}

}  // namespace scalegmn
