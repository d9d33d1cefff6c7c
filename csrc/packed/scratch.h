// Memory that threads keep between calls: small layers take microseconds, and the allocator's would be a good part of them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace quantize::packed {

template <typename Scratch>
Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

template <typename T>
T* at_least(std::vector<T>& v, int64_t size) {
  if (int64_t(v.size()) < size) v.resize(size);
  return v.data();
}

// The first place from p on where a vector or a tile's row begins; at most 63 bytes further.
template <typename T>
T* aligned(T* p) {
  return p + -reinterpret_cast<uintptr_t>(p) % 64 / sizeof(T);
}

// An array for a call: the thread's own where that is small. What large batches take goes with the call.
template <typename T>
class CallArray {
 public:
  static constexpr int64_t most_kept = int64_t(4) << 20;  // bytes

  CallArray() = default;
  CallArray(std::vector<T>& kept, int64_t size) {
    if (size * int64_t(sizeof(T)) <= most_kept)
      data_ = at_least(kept, size);
    else
      own_.reset(data_ = new T[size]);
  }
  T* data() const { return data_; }

 private:
  std::unique_ptr<T[]> own_;
  T* data_ = nullptr;
};

}  // namespace quantize::packed
