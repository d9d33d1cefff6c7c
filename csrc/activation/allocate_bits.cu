// allocate_bits on CUDA. Build: setup.py. Specification: allocate_bits.h; arguments: allocate_bits.cpp. Nothing waits for the device.
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

Tensor allocate_bits_cuda(const Tensor& input, int64_t bit_budget, int64_t max_bits) {
  check_bits("allocate_bits", max_bits);
  check_dtype("allocate_bits", "variance", input, at::kFloat);
  TORCH_CHECK_VALUE(input.dim() == 2 && input.size(1) == 4, "allocate_bits: variance must be [N, 4]; got ", input.sizes());
  const int64_t samples = input.size(0);
  TORCH_CHECK_VALUE(bit_budget >= samples, "allocate_bits: bit_budget must give each of ", samples, " samples a bit; got ", bit_budget);
  Launcher launch(input);
  const Tensor variance = input.contiguous();
  Tensor bits = at::empty({samples}, variance.options().dtype(at::kByte));
  if (samples == 0) return bits;
  Tensor keys = at::empty({UpgradeTraits::count * samples}, variance.options());
  const dim3 grid(unsigned(grid_size(launch.processors(), AllocateTraits::blocks, samples, AllocateTraits::threads)));
  launch(upgrade_keys_kernel, grid, AllocateTraits::threads, variance.const_data_ptr<float>(), samples, int(max_bits),
         keys.mutable_data_ptr<float>());
  const Tensor order = std::get<1>(at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/true));
  launch(take_upgrades_kernel, dim3(1), AllocateTraits::threads, order.const_data_ptr<int64_t>(), samples, bit_budget - samples,
         int(max_bits), bits.mutable_data_ptr<uint8_t>());
  return bits;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) { m.impl("allocate_bits", allocate_bits_cuda); }

}  // namespace quantize::activation
