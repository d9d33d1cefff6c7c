// Sharing a budget of bits among samples: the arithmetic that CPU and CUDA have in common.
//
// A sample starts at 1 bit and can be upgraded to 2, 4 and 8. An upgrade's key is the variance it removes per bit it costs; where a later
// upgrade removes more per bit than the one before it, both get the key of doing them together (the lower convex hull), so taking
// upgrades in the order of their keys is the greedy solution of the multiple-choice knapsack, off by less than one upgrade.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/host_device.h"

namespace quantize::activation {

struct UpgradeTraits {
  static constexpr int count = 3;  // 1 -> 2 -> 4 -> 8
};

QUANTIZE_HOST_DEVICE int upgrade_cost(int upgrade) { return 1 << upgrade; }

// variance: at 1, 2, 4, 8 bits. Impossible upgrades (beyond max_bits) get the key -1, below every real one.
QUANTIZE_HOST_DEVICE void upgrade_keys(const float variance[4], int max_bits, float key[3]) {
  float gain[3], cost[3];
  int first[3], blocks = 0;
  for (int k = 0; k < UpgradeTraits::count; ++k) {
    const float difference = variance[k] - variance[k + 1];
    gain[blocks] = difference > 0.f ? difference : 0.f;  // NaN counts as nothing to gain
    cost[blocks] = float(upgrade_cost(k));
    first[blocks++] = k;
    while (blocks > 1 && gain[blocks - 1] * cost[blocks - 2] > gain[blocks - 2] * cost[blocks - 1] && (2 << k) <= max_bits) {
      gain[blocks - 2] += gain[blocks - 1], cost[blocks - 2] += cost[blocks - 1];
      --blocks;
    }
  }
  for (int b = 0; b < blocks; ++b)
    for (int k = first[b]; k < (b + 1 < blocks ? first[b + 1] : UpgradeTraits::count); ++k)
      key[k] = (2 << k) <= max_bits ? gain[b] / cost[b] : -1.f;
}

// order: the 3N upgrades (3*sample + k) by falling key, ties in their own order. level: N counters, 0 at the start.
template <typename Index, typename Level>
QUANTIZE_HOST_DEVICE void take_upgrades(const Index* order, int64_t upgrades, int64_t bits_left, int max_bits, Level* level) {
  for (int64_t i = 0; i < upgrades && bits_left > 0; ++i) {
    const int64_t sample = order[i] / UpgradeTraits::count;
    const int k = int(order[i] % UpgradeTraits::count);
    if (level[sample] == k && upgrade_cost(k) <= bits_left && (2 << k) <= max_bits) {
      bits_left -= upgrade_cost(k);
      level[sample] = Level(k + 1);
    }
  }
}

// Bits of all samples together at an average; 0 where no sample may have as many.
inline int64_t curve_budget(double average, int64_t samples, int64_t max_bits) {
  return average > double(max_bits) ? 0 : int64_t(std::nearbyint(average * double(samples)));
}

}  // namespace quantize::activation
