// sample_energy: kernels of its own on the CPU, where ATen would copy 16-bit tensors to float32 first; elsewhere ATen's.
#include "energy.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/library.h>

#include "../core/grain.h"
#include "energy_kernels.h"

namespace quantize::layers {
namespace {

Tensor generic_energy(const Tensor& x) {
  if (x.dim() < 2) return x.to(at::kFloat).square();
  std::vector<int64_t> rest;
  for (int64_t d = 1; d < x.dim(); ++d) rest.push_back(d);
  return at::linalg_vector_norm(x, 2, rest, /*keepdim=*/false, at::kFloat).square_();
}

Tensor sample_energy_cpu(const Tensor& x) {
  const Scalar scalar = check_scalar("sample_energy", "x", x.scalar_type());
  const bool whole = x.dim() > 0 && activation::packed_strides(x.sizes(), x.strides()) == x.strides().vec();
  if (!whole || x.numel() == 0) return generic_energy(x);
  Tensor energy = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  const int64_t elements = x.numel() / x.size(0), row = elements * x.element_size();
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = energy.data_ptr<float>();
  at::parallel_for(0, x.size(0), grain_of(16384, elements), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) target[n] = float(energy_kernel(cpu_isa(), scalar)(source + n * row, elements));
  });
  return energy;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("sample_energy", sample_energy_cpu); }
TORCH_LIBRARY_IMPL(quantize, CUDA, m) { m.impl("sample_energy", generic_energy); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("sample_energy", generic_energy); }

}  // namespace quantize::layers
