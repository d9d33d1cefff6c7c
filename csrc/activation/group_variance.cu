// group_variance on CUDA. Build: setup.py. Specification: group_variance_run.h; arguments: group_variance.cpp.
#include "group_variance.cuh"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "group_call.h"

namespace quantize::activation {
namespace {

using at::Tensor;

Tensor group_variance_cuda(const Tensor& input, int64_t group_size) {
  const Scalar scalar = check_scalar("group_variance", "x", input.scalar_type());
  const auto layout = group_layout<int64_t>("group_variance", input.sizes(), group_size);
  Launcher launch(input);
  Tensor variance = at::empty({layout.samples, VarianceTraits::widths}, input.options().dtype(at::kFloat));
  if (input.numel() == 0) return variance.zero_();
  const Tensor x = packed_memory(input);
  PackedGroups p{};
  p.samples = layout.samples, p.elements = layout.elements, p.group_size = layout.group_size, p.groups = layout.groups, p.bits = 1;
  with_type(scalar, [&]<typename T>(T) {
    launch_variance(p, static_cast<const T*>(x.const_data_ptr()), variance.mutable_data_ptr<float>(), launch);
  });
  return variance;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) { m.impl("group_variance", group_variance_cuda); }

}  // namespace quantize::activation
