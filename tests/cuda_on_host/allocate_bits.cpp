// allocate_bits and allocation_curve: keys and walks of the CUDA kernels, few samples and many, against the specification's functions.
#include "activation/allocate_bits.cuh"

#include <numeric>

#include "harness.h"

namespace cuda_on_host {

using namespace quantize::activation;

namespace {

// More budgets than a launch takes. Costs are whole numbers: their sums know no order.
int64_t check_curve(const std::vector<int64_t>& order, int64_t samples, int max_bits) {
  std::vector<int64_t> budgets{0, samples};
  while (budgets.size() < AllocateTraits::budgets + 3) budgets.push_back(samples + samples * int64_t(budgets.size()) / 3);
  std::vector<float> cost(4 * samples), want;
  for (size_t i = 0; i < cost.size(); ++i) cost[i] = float(quantize::hash32(uint32_t(i)) % 1000);
  for (const int64_t budget : budgets) {
    std::vector<uint8_t> level(samples);
    take_upgrades(order.data(), 3 * samples, budget - samples, max_bits, level.data());
    double sum = 0;
    for (int64_t n = 0; n < samples && budget > 0; ++n) sum += cost[4 * n + level[n]];
    want.push_back(float(sum));
  }
  const Buffer<float> curve(budgets.size(), 0);
  simt::Launcher launch(1);
  launch_curve(order.data(), cost.data(), samples, budgets, max_bits, curve.data(), launch);
  expect_same(curve.data(), want, "allocation_curve: " + std::to_string(samples) + " samples");
  return 1;
}

}  // namespace

int64_t check_allocate_bits() {
  int64_t count = 0;
  for (int64_t samples : {1, 5, 300, AllocateTraits::shared_samples, AllocateTraits::shared_samples + 1})
    for (int max_bits : {1, 2, 4, 8})
      for (int64_t budget : {samples, 2 * samples + 1, 3 * samples, 8 * samples}) {
        std::vector<float> variance(4 * samples);
        for (int64_t i = 0; i < 4 * samples; ++i)
          variance[i] = std::fabs(pattern_value(Pattern::noise, i)) * std::ldexp(1.f, int(-2 * (i % 4)));
        std::vector<float> want(3 * samples), keys(3 * samples);
        for (int64_t n = 0; n < samples; ++n) upgrade_keys(&variance[4 * n], max_bits, &want[3 * n]);
        simt::Launcher launch(1);
        launch(upgrade_keys_kernel, dim3(2), AllocateTraits::threads, variance.data(), samples, max_bits, keys.data());
        expect_same(keys.data(), want, "allocate_bits: keys");
        std::vector<int64_t> order(3 * samples);
        std::iota(order.begin(), order.end(), int64_t(0));
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
        std::vector<uint8_t> level(samples);
        take_upgrades(order.data(), 3 * samples, budget - samples, max_bits, level.data());
        for (uint8_t& l : level) l = uint8_t(1 << l);
        const Buffer<uint8_t> bits(samples, 0);
        launch(take_upgrades_kernel, dim3(1), AllocateTraits::threads, order.data(), samples, budget - samples, max_bits, bits.data());
        expect_same(bits.data(), level, "allocate_bits: " + std::to_string(samples) + " samples");
        ++count;
        if (budget == samples) count += check_curve(order, samples, max_bits);
      }
  return count;
}

}  // namespace cuda_on_host
