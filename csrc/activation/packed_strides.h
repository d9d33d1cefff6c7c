// The memory order in which a tensor is packed.
#pragma once

#include <c10/util/ArrayRef.h>

#include <vector>

namespace quantize::activation {

// The strides that the packed tensor decodes to: x's own where its memory is dense and the samples outermost in it (contiguous,
// channels_last, any permutation within a sample), else contiguous ones.
template <typename T>
std::vector<T> packed_strides(c10::ArrayRef<T> sizes, c10::ArrayRef<T> strides) {
  const auto n = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> order;  // dimensions that matter, innermost first; insertion sort, there are few
  for (int64_t d = n - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    auto place = order.begin();
    while (place != order.end() && strides[*place] <= strides[d] && !(strides[*place] == strides[d] && *place < d)) ++place;
    order.insert(place, d);
  }
  T expected = 1;
  bool dense = order.empty() || sizes[0] == 1 || order.back() == 0;
  for (const int64_t d : order) {
    dense = dense && strides[d] == expected;
    expected = expected * sizes[d];
  }
  if (dense) return strides.vec();
  std::vector<T> contiguous(n, T(1));
  for (int64_t d = n - 2; d >= 0; --d) contiguous[d] = contiguous[d + 1] * (sizes[d + 1] > 1 ? sizes[d + 1] : T(1));
  return contiguous;
}

}  // namespace quantize::activation
