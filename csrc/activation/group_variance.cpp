// group_variance: CPU and Meta.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../core/grain.h"
#include "group_layout.h"
#include "group_variance_kernels.h"

namespace quantize::activation {
namespace {

using at::Tensor;

Tensor group_variance_cpu(const Tensor& input, int64_t group_size) {
  const Scalar scalar = check_scalar("group_variance", "x", input.scalar_type());
  const auto layout = group_layout<int64_t>("group_variance", input.sizes(), group_size);
  const Tensor x = packed_memory(input);
  Tensor variance = at::empty({layout.samples, 4}, x.options().dtype(at::kFloat));
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = variance.data_ptr<float>();
  const int64_t row = layout.elements * x.element_size();
  at::parallel_for(0, layout.samples, grain_of(4096, layout.elements), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      double sum[4] = {};
      group_variance_kernel(cpu_isa(), scalar)(source + n * row, layout.elements, layout.group_size, sum);
      for (int b = 0; b < 4; ++b) target[4 * n + b] = float(sum[b]);
    }
  });
  return variance;
}

Tensor group_variance_meta(const Tensor& x, int64_t group_size) {
  const auto layout = group_layout<c10::SymInt>("group_variance", x.sym_sizes(), group_size);
  return at::empty_symint({layout.samples, 4}, x.options().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("group_variance", group_variance_cpu); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("group_variance", group_variance_meta); }

}  // namespace quantize::activation
