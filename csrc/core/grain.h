// How many items at::parallel_for gives a thread at least.
#pragma once

#include <algorithm>
#include <cstdint>

namespace quantize {

// Items of `each` elements that have about `elements` together: fewer are not worth a thread.
inline int64_t grain_of(int64_t elements, int64_t each) { return std::max<int64_t>(1, elements / std::max<int64_t>(1, each)); }

}  // namespace quantize
