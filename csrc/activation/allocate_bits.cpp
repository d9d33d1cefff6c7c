// allocate_bits and allocation_curve: CPU and Meta.
#include "allocate_bits.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "allocate_bits_call.h"

namespace quantize::activation {
namespace {

using at::Tensor;

// Upgrades by falling key.
std::vector<int64_t> sorted_upgrades(const float* variance, int64_t samples, int max_bits) {
  std::vector<float> keys(UpgradeTraits::count * samples);
  for (int64_t n = 0; n < samples; ++n) upgrade_keys(variance + 4 * n, max_bits, &keys[3 * n]);
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  return order;
}

Tensor allocate_bits_cpu(const Tensor& input, int64_t bit_budget, int64_t max_bits) {
  check_allocate(input, bit_budget, max_bits);
  const int64_t samples = input.size(0);
  const Tensor variance = input.contiguous();
  const auto order = sorted_upgrades(variance.const_data_ptr<float>(), samples, int(max_bits));
  Tensor bits = at::empty({samples}, variance.options().dtype(at::kByte));
  auto* level = bits.data_ptr<uint8_t>();
  std::fill(level, level + samples, uint8_t(0));
  take_upgrades(order.data(), int64_t(order.size()), bit_budget - samples, int(max_bits), level);
  for (int64_t n = 0; n < samples; ++n) level[n] = uint8_t(1 << level[n]);
  return bits;
}

Tensor allocation_curve_cpu(const Tensor& input, const Tensor& input_cost, at::ArrayRef<double> averages, int64_t max_bits) {
  check_curve(input, input_cost, max_bits);
  const int64_t samples = input.size(0);
  const Tensor variance = input.contiguous(), cost = input_cost.contiguous();
  const auto order = sorted_upgrades(variance.const_data_ptr<float>(), samples, int(max_bits));
  Tensor curve = at::empty({int64_t(averages.size())}, variance.options());
  std::vector<uint8_t> level(samples);
  for (size_t i = 0; i < averages.size(); ++i) {
    const int64_t budget = curve_budget(averages[i], samples, max_bits);
    std::fill(level.begin(), level.end(), uint8_t(0));
    if (budget > 0) take_upgrades(order.data(), int64_t(order.size()), budget - samples, int(max_bits), level.data());
    double total = 0;
    for (int64_t n = 0; n < samples && budget > 0; ++n) total += double(cost.const_data_ptr<float>()[4 * n + level[n]]);
    curve.data_ptr<float>()[i] = float(total);
  }
  return curve;
}

Tensor allocate_bits_meta(const Tensor& variance, int64_t, int64_t) {
  return at::empty_symint({variance.sym_size(0)}, variance.options().dtype(at::kByte));
}

Tensor allocation_curve_meta(const Tensor& variance, const Tensor&, at::ArrayRef<double> averages, int64_t) {
  return at::empty({int64_t(averages.size())}, variance.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("allocate_bits", allocate_bits_cpu);
  m.impl("allocation_curve", allocation_curve_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("allocate_bits", allocate_bits_meta);
  m.impl("allocation_curve", allocation_curve_meta);
}

}  // namespace quantize::activation
