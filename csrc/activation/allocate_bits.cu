// allocate_bits and allocation_curve on CUDA. Build: setup.py. Specification: allocate_bits.h; arguments: allocate_bits.cpp. Nothing waits
// for the device.
#include "allocate_bits.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "../core/checks.h"
#include "../core/grid.h"
#include "../core/launch.h"

namespace quantize::activation {
namespace {

using at::Tensor;

// Upgrades by falling key: int64 [3 * samples].
Tensor sorted_upgrades(const Tensor& variance, int64_t max_bits, Launcher& launch) {
  const int64_t samples = variance.size(0);
  Tensor keys = at::empty({UpgradeTraits::count * samples}, variance.options());
  const dim3 grid(unsigned(grid_size(launch.processors(), AllocateTraits::blocks, samples, AllocateTraits::threads)));
  launch(upgrade_keys_kernel, grid, AllocateTraits::threads, variance.const_data_ptr<float>(), samples, int(max_bits),
         keys.mutable_data_ptr<float>());
  return std::get<1>(at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/true));
}

Tensor take(const Tensor& order, const Tensor& variance, int64_t bit_budget, int64_t max_bits, Launcher& launch) {
  const int64_t samples = variance.size(0);
  Tensor bits = at::empty({samples}, variance.options().dtype(at::kByte));
  launch(take_upgrades_kernel, dim3(1), AllocateTraits::threads, order.const_data_ptr<int64_t>(), samples, bit_budget - samples,
         int(max_bits), bits.mutable_data_ptr<uint8_t>());
  return bits;
}

void check_variance(const char* op, const Tensor& variance, int64_t max_bits) {
  check_bits(op, max_bits);
  check_dtype(op, "variance", variance, at::kFloat);
  TORCH_CHECK_VALUE(variance.dim() == 2 && variance.size(1) == 4, op, ": variance must be [N, 4]; got ", variance.sizes());
}

Tensor allocate_bits_cuda(const Tensor& input, int64_t bit_budget, int64_t max_bits) {
  check_variance("allocate_bits", input, max_bits);
  const int64_t samples = input.size(0);
  TORCH_CHECK_VALUE(bit_budget >= samples, "allocate_bits: bit_budget must give each of ", samples, " samples a bit; got ", bit_budget);
  Launcher launch(input);
  const Tensor variance = input.contiguous();
  if (samples == 0) return at::empty({0}, variance.options().dtype(at::kByte));
  return take(sorted_upgrades(variance, max_bits, launch), variance, bit_budget, max_bits, launch);
}

Tensor allocation_curve_cuda(const Tensor& input, const Tensor& cost, at::ArrayRef<double> averages, int64_t max_bits) {
  check_variance("allocation_curve", input, max_bits);
  check_variance("allocation_curve", cost, max_bits);
  check_numel("allocation_curve", "cost", cost, input.numel());
  Launcher launch(input);
  const Tensor variance = input.contiguous();
  const int64_t samples = variance.size(0);
  Tensor curve = at::empty({int64_t(averages.size())}, variance.options()).zero_();
  if (samples == 0) return curve;
  const Tensor order = sorted_upgrades(variance, max_bits, launch);
  for (size_t i = 0; i < averages.size(); ++i) {
    const int64_t budget = curve_budget(averages[i], samples, max_bits);
    if (budget == 0) continue;
    const Tensor level = take(order, variance, budget, max_bits, launch).to(at::kFloat).log2().to(at::kLong).unsqueeze(1);
    curve.select(0, int64_t(i)).copy_(cost.gather(1, level).sum());
  }
  return curve;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("allocate_bits", allocate_bits_cuda);
  m.impl("allocation_curve", allocation_curve_cuda);
}

}  // namespace quantize::activation
