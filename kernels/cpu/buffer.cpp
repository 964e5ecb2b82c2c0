#include "buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace tdro {
namespace {

constexpr size_t KEPT_BYTES = 8 << 20, MAPPED_BYTES = 1 << 20, PAGE = 4096, LARGE_PAGE = 2 << 20;

struct Kept {
  void* memory;
  size_t bytes;
};

struct Store {
  std::mutex mutex;
  std::vector<Kept> kept;
  size_t bytes = 0;
};

Store& store() {
  static Store* only = new Store;  // never destroyed: threads may end after it would be
  return *only;
}

}  // namespace

void prefer_large_pages(void* memory, size_t bytes) {
  const size_t start = (reinterpret_cast<size_t>(memory) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  const size_t end = (reinterpret_cast<size_t>(memory) + bytes) / LARGE_PAGE * LARGE_PAGE;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a hint: it may fail
}

namespace {

// Large memory comes from the system and goes back to it: the allocator would keep what no later call can use.
void* from_system(size_t bytes) {
  if (bytes < MAPPED_BYTES) return std::aligned_alloc(64, bytes);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  prefer_large_pages(memory, bytes);
  return memory;
}

void to_system(void* memory, size_t bytes) {
  if (bytes < MAPPED_BYTES)
    std::free(memory);
  else
    munmap(memory, bytes);
}

}  // namespace

void* acquire(size_t bytes, size_t* held) {
  const size_t wanted = (bytes + PAGE - 1) / PAGE * PAGE;
  {
    Store& from = store();
    const std::lock_guard<std::mutex> lock(from.mutex);
    size_t best = from.kept.size();
    for (size_t i = 0; i < from.kept.size(); ++i)
      if (from.kept[i].bytes >= wanted && from.kept[i].bytes <= 2 * wanted &&
          (best == from.kept.size() || from.kept[i].bytes < from.kept[best].bytes))
        best = i;
    if (best < from.kept.size()) {
      const Kept found = from.kept[best];
      from.kept.erase(from.kept.begin() + best);
      from.bytes -= found.bytes;
      *held = found.bytes;
      return found.memory;
    }
    for (size_t i = from.kept.size(); i-- > 0;)  // large memory of a call of another shape: it goes
      if (from.kept[i].bytes >= MAPPED_BYTES) {
        to_system(from.kept[i].memory, from.kept[i].bytes);
        from.bytes -= from.kept[i].bytes;
        from.kept.erase(from.kept.begin() + i);
      }
  }
  void* memory = from_system(wanted);
  if (!memory) throw std::bad_alloc();
  *held = wanted;
  return memory;
}

void release(void* memory, size_t held) {
  {
    Store& to = store();
    const std::lock_guard<std::mutex> lock(to.mutex);
    if (to.bytes + held <= KEPT_BYTES) {
      to.kept.push_back({memory, held});
      to.bytes += held;
      return;
    }
  }
  to_system(memory, held);
}

}  // namespace tdro
