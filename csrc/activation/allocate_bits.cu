// allocate_bits and allocation_curve on CUDA. Build: setup.py. Specification: allocate_bits.h. Nothing waits for the device.
#include "allocate_bits.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "../core/grid.h"
#include "../core/launch.h"
#include "allocate_bits_call.h"

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

Tensor allocate_bits_cuda(const Tensor& input, int64_t bit_budget, int64_t max_bits) {
  check_allocate(input, bit_budget, max_bits);
  const int64_t samples = input.size(0);
  Launcher launch(input);
  const Tensor variance = input.contiguous();
  Tensor bits = at::empty({samples}, variance.options().dtype(at::kByte));
  if (samples == 0) return bits;
  const Tensor order = sorted_upgrades(variance, max_bits, launch);
  launch(take_upgrades_kernel, dim3(1), AllocateTraits::threads, order.const_data_ptr<int64_t>(), samples, bit_budget - samples,
         int(max_bits), bits.mutable_data_ptr<uint8_t>());
  return bits;
}

Tensor allocation_curve_cuda(const Tensor& input, const Tensor& input_cost, at::ArrayRef<double> averages, int64_t max_bits) {
  check_curve(input, input_cost, max_bits);
  Launcher launch(input);
  const Tensor variance = input.contiguous(), cost = input_cost.contiguous();
  const int64_t samples = variance.size(0);
  Tensor curve = at::empty({int64_t(averages.size())}, variance.options());
  if (samples == 0) return curve.zero_();
  std::vector<int64_t> budgets;
  for (double average : averages) budgets.push_back(curve_budget(average, samples, max_bits));
  const Tensor order = sorted_upgrades(variance, max_bits, launch);
  launch_curve(order.const_data_ptr<int64_t>(), cost.const_data_ptr<float>(), samples, budgets, int(max_bits),
               curve.mutable_data_ptr<float>(), launch);
  return curve;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("allocate_bits", allocate_bits_cuda);
  m.impl("allocation_curve", allocation_curve_cuda);
}

}  // namespace quantize::activation
