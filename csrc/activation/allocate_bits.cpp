// allocate_bits: CPU and Meta.
#include "allocate_bits.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "../core/checks.h"

namespace quantize::activation {
namespace {

using at::Tensor;

Tensor allocate_bits_cpu(const Tensor& input, int64_t bit_budget, int64_t max_bits) {
  check_bits("allocate_bits", max_bits);
  check_dtype("allocate_bits", "variance", input, at::kFloat);
  TORCH_CHECK_VALUE(input.dim() == 2 && input.size(1) == 4, "allocate_bits: variance must be [N, 4]; got ", input.sizes());
  const int64_t samples = input.size(0);
  TORCH_CHECK_VALUE(bit_budget >= samples, "allocate_bits: bit_budget must give each of ", samples, " samples a bit; got ", bit_budget);
  const Tensor variance = input.contiguous();
  std::vector<float> keys(UpgradeTraits::count * samples);
  for (int64_t n = 0; n < samples; ++n) upgrade_keys(variance.const_data_ptr<float>() + 4 * n, int(max_bits), &keys[3 * n]);
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  Tensor bits = at::empty({samples}, variance.options().dtype(at::kByte));
  auto* level = bits.data_ptr<uint8_t>();
  std::fill(level, level + samples, uint8_t(0));
  take_upgrades(order.data(), int64_t(order.size()), bit_budget - samples, int(max_bits), level);
  for (int64_t n = 0; n < samples; ++n) level[n] = uint8_t(1 << level[n]);
  return bits;
}

Tensor allocate_bits_meta(const Tensor& variance, int64_t, int64_t) {
  return at::empty_symint({variance.sym_size(0)}, variance.options().dtype(at::kByte));
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("allocate_bits", allocate_bits_cpu); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("allocate_bits", allocate_bits_meta); }

}  // namespace quantize::activation
