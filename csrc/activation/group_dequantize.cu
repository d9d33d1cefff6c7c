// group_dequantize on CUDA. Build: setup.py. Specification: group_format.h.
#include "group_dequantize.cuh"

#include <torch/library.h>

#include "group_call.h"
#include "group_dequantize_call.h"

namespace quantize::activation {
namespace {

using at::Tensor;

Tensor group_dequantize_cuda(const Tensor& codes, const Tensor& ranges, const std::optional<Tensor>& sample_bits, int64_t bits,
                             int64_t group_size, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype, const Tensor& seed) {
  const char* op = "group_dequantize";
  const Scalar scalar = check_scalar(op, "dtype", dtype);
  const auto layout = check_dequantize(op, codes, ranges, sample_bits, bits, group_size, size);
  const std::optional<Tensor> own_bits = check_sample_bits(op, sample_bits, layout.samples, codes);
  Launcher launch(codes);
  Tensor y = empty_unpacked(op, size, stride, codes.options().dtype(dtype));
  const Seed values = read_seed(op, seed);
  if (y.numel() == 0) return y;
  const Tensor bytes = codes.contiguous();
  Tensor words = ranges.contiguous();
  if (reinterpret_cast<uintptr_t>(words.const_data_ptr()) % 4 != 0) words = words.clone();  // a range is read as one word
  const GroupPlan plan = plan_groups(op, layout, values, bits, own_bits, bytes, y, launch);
  with_type(scalar, [&]<typename T>(T) {
    launch_dequantize(plan, bytes.const_data_ptr<uint8_t>(), reinterpret_cast<const uint32_t*>(words.const_data_ptr<int16_t>()),
                      static_cast<T*>(y.mutable_data_ptr()), launch);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) { m.impl("group_dequantize", group_dequantize_cuda); }

}  // namespace quantize::activation
