// How many blocks a looping kernel gets.
#pragma once

#include <algorithm>
#include <cstdint>

namespace quantize {

// Blocks for `items` of work, `per_block` at once. Kernels loop over what is left, so a few waves of blocks are enough: a warp's
// preparations serve several items, and the last wave's gaps stay small.
inline int64_t grid_size(int processors, int blocks_per_processor, int64_t items, int64_t per_block) {
  constexpr int64_t waves = 4;
  return std::clamp<int64_t>((items + per_block - 1) / per_block, 1, waves * blocks_per_processor * processors);
}

}  // namespace quantize
