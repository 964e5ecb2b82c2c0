// Memory that starts on a cache line and holds nothing yet.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tdro {

// Tells the system that large memory, not yet touched, may lie on large pages: fewer of them have to be made and found.
void prefer_large_pages(void* memory, size_t bytes);

// Memory that was given back is kept for the next call, up to a few megabytes: fresh pages cost more than small products.
void* acquire(size_t bytes, size_t* held);
void release(void* memory, size_t held);

template <class Item>
class Buffer {
 public:
  explicit Buffer(int64_t items = 0) { reset(items); }
  Buffer(Buffer&& other) noexcept : data_(other.data_), held_(other.held_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { reset(0); }

  void reset(int64_t items) {
    if (data_) release(data_, held_);
    data_ = items ? static_cast<Item*>(acquire(size_t(items) * sizeof(Item), &held_)) : nullptr;
  }
  Item* data() const { return data_; }
  Item& operator[](int64_t i) const { return data_[i]; }

 private:
  Item* data_ = nullptr;
  size_t held_ = 0;  // bytes
};

}  // namespace tdro
