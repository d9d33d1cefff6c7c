// group_dequantize on CUDA. Build: setup.py. Specification: group_format.h; arguments: group_quantize.cpp.
#include "group_dequantize.cuh"

#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "group_call.h"

namespace quantize::activation {
namespace {

using at::Tensor;

Tensor group_dequantize_cuda(const Tensor& codes, const Tensor& ranges, const std::optional<Tensor>& sample_bits, int64_t bits,
                             int64_t group_size, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype, const Tensor& seed) {
  const char* op = "group_dequantize";
  const Scalar scalar = check_scalar(op, "dtype", dtype);
  if (!sample_bits) check_bits(op, bits);
  const auto layout = group_layout<int64_t>(op, size, group_size);
  check_dtype(op, "codes", codes, at::kByte);
  check_dtype(op, "ranges", ranges, at::kShort);
  check_numel(op, "ranges", ranges, 2 * layout.total_groups());
  check_same_device(op, "ranges", ranges, codes);
  const std::optional<Tensor> own_bits = check_sample_bits(op, sample_bits, layout.samples, codes);
  Launcher launch(codes);
  Tensor y = at::empty_strided(size, stride, codes.options().dtype(dtype));
  TORCH_CHECK_VALUE(packed_strides(y.sizes(), y.strides()) == y.strides().vec(), op, ": stride must be dense with samples outermost; got ",
                    stride);
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
