// The arithmetic that CPU and CUDA share and that has no kernel table: the sharing of bits and the pool's window offsets.
#include <algorithm>

#include "activation/allocate_bits.h"
#include "activation/pool_indices.h"
#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::activation;

int64_t check_allocation(int64_t samples, int max_bits, int64_t budget) {
  Buffer<float> variance(4 * samples, Fence::heap), key(3 * samples, Fence::heap);
  fill(variance, samples % 2 ? Pattern::noise : Pattern::poisoned);
  for (int64_t n = 0; n < samples; ++n) upgrade_keys(variance.data() + 4 * n, max_bits, key.data() + 3 * n);
  Buffer<int64_t> order(3 * samples, Fence::heap);
  for (int64_t i = 0; i < 3 * samples; ++i) order[i] = i;
  std::stable_sort(order.data(), order.data() + 3 * samples, [&](int64_t a, int64_t b) { return key[a] > key[b]; });
  Buffer<uint8_t> level(samples, Fence::heap);
  for (int64_t n = 0; n < samples; ++n) level[n] = 0;
  take_upgrades(order.data(), 3 * samples, budget - samples, max_bits, level.data());
  int64_t used = 0;
  for (int64_t n = 0; n < samples; ++n) {
    if ((1 << level[n]) > max_bits) fail("allocate_bits: a sample got more than max_bits");
    used += 1 << level[n];
  }
  if (used > budget) fail("allocate_bits: over budget");
  return 1;
}

// Every window position of every output that lies inside the input comes back.
int64_t check_window(const PoolWindow& w) {
  int64_t count = 0;
  for (int64_t place = 0; place < w.plane(); ++place) {
    const int64_t row = place / w.output[2], column = place % w.output[2];
    for (int64_t i = 0; i < w.kernel[1]; ++i)
      for (int64_t j = 0; j < w.kernel[2]; ++j) {
        const int64_t y = row * w.stride[1] - w.padding[1] + i * w.dilation[1], x = column * w.stride[2] - w.padding[2] + j * w.dilation[2];
        if (y < 0 || x < 0 || y >= w.input[1] || x >= w.input[2]) continue;
        const int64_t index = y * w.input[2] + x;
        if (w.unpack(place, w.pack(place, index)) != index) fail("pool_indices: index " + std::to_string(index) + " does not come back");
        ++count;
      }
  }
  return count;
}

}  // namespace

int64_t check_host_arithmetic() {
  int64_t count = 0;
  for (int64_t samples : {1, 7, 129})
    for (int max_bits : {1, 2, 4, 8})
      for (int64_t bits : {1, 2, 3, 8}) count += check_allocation(samples, max_bits, samples * bits);
  count += check_window({{1, 7, 9}, {1, 3, 4}, {1, 3, 3}, {1, 2, 2}, {0, 0, 0}, {1, 1, 1}});
  count += check_window({{1, 8, 8}, {1, 5, 5}, {1, 2, 2}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}});
  count += check_window({{1, 20, 17}, {1, 3, 4}, {1, 16, 16}, {1, 4, 1}, {0, 4, 1}, {1, 1, 1}});
  count += check_window({{1, 1, 12}, {1, 1, 8}, {1, 1, 3}, {1, 1, 1}, {0, 0, 0}, {1, 1, 2}});
  return count;
}

}  // namespace sanitize
