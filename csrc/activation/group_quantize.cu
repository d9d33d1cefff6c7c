// group_quantize and group_quantize_mixed on CUDA. Build: setup.py. Specification: group_format.h; arguments: group_quantize.cpp.
#include "group_quantize.cuh"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "group_call.h"

namespace quantize::activation {
namespace {

using at::Tensor;
using std::tuple;

tuple<Tensor, Tensor> quantize(const char* op, const Tensor& input, const GroupLayout<int64_t>& layout, int64_t code_bytes, int64_t bits,
                               const std::optional<Tensor>& sample_bits, const Tensor& seed) {
  const Scalar scalar = check_scalar(op, "x", input.scalar_type());
  Launcher launch(input);
  Tensor codes = at::empty({code_bytes}, input.options().dtype(at::kByte));
  Tensor ranges = at::empty({layout.total_groups(), 2}, input.options().dtype(at::kShort));
  const Seed values = read_seed(op, seed);
  if (input.numel() == 0) return {codes, ranges};
  const Tensor x = packed_memory(input);
  const GroupPlan plan = plan_groups(op, layout, values, bits, sample_bits, codes, x, launch);
  with_type(scalar, [&]<typename T>(T) {
    launch_quantize(plan, static_cast<const T*>(x.const_data_ptr()), codes.mutable_data_ptr<uint8_t>(),
                    reinterpret_cast<uint32_t*>(ranges.mutable_data_ptr<int16_t>()), launch);
  });
  return {codes, ranges};
}

tuple<Tensor, Tensor> group_quantize_cuda(const Tensor& x, int64_t bits, int64_t group_size, const Tensor& seed) {
  check_bits("group_quantize", bits);
  const auto layout = group_layout<int64_t>("group_quantize", x.sizes(), group_size);
  return quantize("group_quantize", x, layout, layout.bytes(bits), bits, std::nullopt, seed);
}

tuple<Tensor, Tensor> group_quantize_mixed_cuda(const Tensor& x, const Tensor& sample_bits, int64_t bit_budget, int64_t group_size,
                                                const Tensor& seed) {
  const char* op = "group_quantize_mixed";
  const auto layout = group_layout<int64_t>(op, x.sizes(), group_size);
  return quantize(op, x, layout, layout.bytes_within(bit_budget), 0, check_sample_bits(op, sample_bits, layout.samples, x), seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("group_quantize", group_quantize_cuda);
  m.impl("group_quantize_mixed", group_quantize_mixed_cuda);
}

}  // namespace quantize::activation
