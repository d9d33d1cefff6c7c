// Memory that threads keep between calls: small layers take microseconds, and the allocator's would be a good part of them.
#pragma once

#include <cstdint>
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
  static_assert(sizeof(T) == 1);
  return p + -reinterpret_cast<uintptr_t>(p) % 64;
}

}  // namespace quantize::packed
