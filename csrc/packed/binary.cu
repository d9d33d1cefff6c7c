// packed_binary_conv2d and packed_binary_linear on CUDA: the CPU's bits. Build: setup.py. Specification: binary_bits.h; arguments:
// binary_call.h.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../core/launch.h"
#include "binary_call.h"
#include "binary_launch.cuh"

namespace quantize::packed {
namespace {

using namespace binary_call;
using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the layers have in common, and keep for the length of a call.
struct Layer {
  const char* op;
  const OptionalTensor &threshold, &flip;
  bool unit;
  const Tensor &codes, &sums, &scales;
  const OptionalTensor &bias, &next_threshold, &next_flip, &residual;

  // A tensor on x's device, or null.
  template <typename T, typename Given>
  const T* on_device(const Tensor& x, const char* name, const Given& tensor, at::ScalarType dtype, IntArrayRef sizes) const {
    const T* data = values<T>(op, name, tensor, dtype, sizes);
    if (data) check_same_device(op, name, *OptionalTensor(tensor), x);
    return data;
  }

  Tensor operator()(BinaryCall c, const Tensor& input, IntArrayRef out_sizes, IntArrayRef bit_sizes, at::MemoryFormat format) const {
    const bool bits_in = input.scalar_type() == at::kByte;
    const int64_t n = c.out_channels, length = int64_t(c.taps()) * c.inputs();
    c.unit = unit;
    c.threshold = on_device<float>(input, "threshold", threshold, at::kFloat, {c.channels});
    c.flip = on_device<uint8_t>(input, "flip", flip, at::kByte, {c.channels});
    on_device<uint8_t>(input, "codes", codes, at::kByte, {n, bits_bytes(length)});
    c.sums = on_device<int32_t>(input, "sums", sums, at::kInt, {c.taps(), n});
    c.scales = on_device<float>(input, "scales", scales, at::kFloat, {n});
    c.bias = on_device<float>(input, "bias", bias, at::kFloat, {n});
    c.next_threshold = on_device<int32_t>(input, "next_threshold", next_threshold, at::kInt, {n});
    c.next_flip = on_device<uint8_t>(input, "next_flip", next_flip, at::kByte, {n});
    TORCH_CHECK_VALUE(c.next_threshold || !c.next_flip, op, ": next_flip must be None without next_threshold");
    const Tensor added = residual_like(op, residual, input, out_sizes, c.next_threshold, format);
    if (added.defined()) c.residual = added.const_data_ptr<float>();
    Launcher launch(input);
    Tensor out = c.next_threshold ? at::empty(bit_sizes, input.options().dtype(at::kByte))
                                  : at::empty(out_sizes, input.options().dtype(at::kFloat), format);
    if (out.numel() == 0) return given(residual) ? at::add(out, *residual) : out;
    const Tensor x = bits_in ? aligned_bytes(input) : input.contiguous(format), rows = aligned_bytes(codes);
    if (bits_in)
      c.image = reinterpret_cast<const uint32_t*>(x.const_data_ptr<uint8_t>());
    else
      c.floats = x.const_data_ptr<float>();
    c.codes = reinterpret_cast<const uint32_t*>(rows.const_data_ptr<uint8_t>());
    if (c.next_threshold)
      c.out_bits = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<uint8_t>());
    else
      c.out = out.mutable_data_ptr<float>();
    TORCH_CHECK_VALUE(is_countable(c), op,
                      ": x must have less than 2^30 words of 32 bits, and outputs be less than 2^30 pixels and words; got ", input.sizes());
    launch_binary(c, binary_path(c, launch.processors()), launch);
    return given(residual) && !added.defined() ? at::add(out, *residual) : out;
  }
};

Tensor conv2d_cuda(const Tensor& x, const OptionalTensor& threshold, const OptionalTensor& flip, bool unit, const Tensor& codes,
                   const Tensor&, const Tensor& sums, const Tensor& scales, const OptionalTensor& bias,
                   const OptionalTensor& next_threshold, const OptionalTensor& next_flip, int64_t channels, IntArrayRef kernel,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, const OptionalTensor& residual) {
  const char* op = "packed_binary_conv2d";
  check_input(op, x, threshold, flip, channels, conv_floats, conv_bits, 4);
  const auto g =
      conv_sizes<int64_t>(op, x.sizes(), x.scalar_type() == at::kByte, scales.numel(), channels, kernel, stride, padding, dilation, groups);
  BinaryCall c;
  c.batch = size_on_device(op, "x's batch", g.batch), c.channels = size_on_device(op, "channels", channels), c.groups = int(groups);
  c.height = size_on_device(op, "x's height", g.height), c.width = size_on_device(op, "x's width", g.width);
  c.out_channels = size_on_device(op, "scales' length", g.out_channels);
  c.out_height = size_on_device(op, "the output's height", g.out_height),
  c.out_width = size_on_device(op, "the output's width", g.out_width);
  for (int d = 0; d < 2; ++d) {
    c.kernel[d] = size_on_device(op, "kernel", kernel[d]), c.stride[d] = size_on_device(op, "stride", stride[d]);
    c.padding[d] = size_on_device(op, "padding", padding[d]), c.dilation[d] = size_on_device(op, "dilation", dilation[d]);
  }
  const int64_t length = kernel[0] * kernel[1] * (channels / groups);
  TORCH_CHECK_VALUE(length < (int64_t(1) << 30), op, ": codes must have rows of less than 2^30 bits; got ", length);
  c.together = channels_last(x, residual);
  return Layer{op, threshold, flip, unit, codes, sums, scales, bias, next_threshold, next_flip, residual}(
      c, x, {g.batch, g.out_channels, g.out_height, g.out_width}, {g.batch, g.out_height, g.out_width, bits_bytes(g.out_channels)},
      c.together ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

Tensor linear_cuda(const Tensor& x, const OptionalTensor& threshold, const OptionalTensor& flip, bool unit, const Tensor& codes,
                   const Tensor&, const Tensor& sums, const Tensor& scales, const OptionalTensor& bias,
                   const OptionalTensor& next_threshold, const OptionalTensor& next_flip, int64_t channels) {
  const char* op = "packed_binary_linear";
  check_input(op, x, threshold, flip, channels, linear_floats, linear_bits, 2);
  BinaryCall c;
  c.batch = size_on_device(op, "x's batch", x.size(0)), c.channels = size_on_device(op, "channels", channels);
  c.out_channels = size_on_device(op, "scales' length", scales.numel());
  c.together = true;
  return Layer{op, threshold, flip, unit, codes, sums, scales, bias, next_threshold, next_flip, {}}(
      c, x, {x.size(0), scales.numel()}, {x.size(0), bits_bytes(scales.numel())}, at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("packed_binary_conv2d", conv2d_cuda);
  m.impl("packed_binary_linear", linear_cuda);
}

}  // namespace quantize::packed
