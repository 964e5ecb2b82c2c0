// Memory that starts on a cache line and holds nothing yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace tdro {

template <class Item>
class Buffer {
 public:
  explicit Buffer(int64_t items = 0) { reset(items); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void reset(int64_t items) {
    std::free(data_);
    data_ = nullptr;
    if (items == 0) return;
    data_ = static_cast<Item*>(std::aligned_alloc(64, (size_t(items) * sizeof(Item) + 63) / 64 * 64));
    if (!data_) throw std::bad_alloc();
  }
  Item* data() const { return data_; }
  Item& operator[](int64_t i) const { return data_[i]; }

 private:
  Item* data_ = nullptr;
};

}  // namespace tdro
