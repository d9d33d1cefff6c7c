// packed_conv2d and packed_linear on CUDA: the CPU's bits. Build: setup.py. Arguments: packed_call.h.
#include <ATen/ops/add.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "../core/launch.h"
#include "integer_launch.cuh"
#include "packed_call.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the layers have in common, and keep for the length of a call.
struct IntegerLayer {
  const char* op;
  const Tensor &step, &zero_point;
  int64_t activation_bits;
  const Tensor &codes, &levels, &scales, &sums;
  const OptionalTensor& bias;
  int64_t storage_bits;
  const OptionalTensor& residual;
  std::optional<double> low, high;

  Tensor operator()(IntegerCall c, const Tensor& input, IntArrayRef out_sizes, at::MemoryFormat format) const {
    check_activation(op, input, step, zero_point, activation_bits);
    check_weight(op, input, codes, levels, scales, bias, int64_t(c.taps()) * c.inputs(), storage_bits);
    check_dtype(op, "sums", sums, at::kInt);
    check_numel(op, "sums", sums, c.out_channels);
    check_contiguous(op, "sums", sums);
    check_same_device(op, "sums", sums, input);
    Launcher launch(input);
    Tensor out = at::empty(out_sizes, input.options(), format), added;
    const bool asked = residual && residual->defined();
    if (asked && residual->scalar_type() == at::kFloat && residual->sizes() == out_sizes) {
      check_same_device(op, "residual", *residual, input);
      added = residual->contiguous(format);
    }
    const bool on_the_way = !asked || added.defined();
    if (out.numel() > 0) {
      const Tensor x = input.contiguous(format), rows = aligned_bytes(codes);
      c.floats = x.const_data_ptr<float>(), c.out = out.mutable_data_ptr<float>();
      c.step = step.const_data_ptr<float>(), c.zero_point = zero_point.const_data_ptr<float>();
      c.most_code = (1 << activation_bits) - 1, c.bits = int(storage_bits);
      c.codes = rows.const_data_ptr<uint8_t>(), c.levels = levels.const_data_ptr<float>();
      c.sums = sums.const_data_ptr<int32_t>(), c.scales = scales.const_data_ptr<float>();
      if (bias && bias->defined()) c.bias = bias->const_data_ptr<float>();
      if (added.defined()) c.residual = added.const_data_ptr<float>();
      constexpr float infinity = std::numeric_limits<float>::infinity();
      c.low = on_the_way && low ? float(*low) : -infinity, c.high = on_the_way && high ? float(*high) : infinity;
      TORCH_CHECK_VALUE(is_countable(c), op, ": x and its output must have less than 2^30 words of four channels, padding included; got ",
                        input.sizes());
      launch_integer(c, integer_path(c, launch.processors()), launch);
    }
    if (on_the_way) return out;
    out = at::add(out, *residual);
    if (low || high)
      out = at::clamp(out, low ? std::optional<at::Scalar>(*low) : std::nullopt, high ? std::optional<at::Scalar>(*high) : std::nullopt);
    return out;
  }
};

Tensor packed_conv2d_cuda(const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                          const Tensor&, const Tensor& levels, const Tensor& scales, const Tensor& sums, const OptionalTensor& bias,
                          int64_t storage_bits, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                          int64_t groups, const OptionalTensor& residual, std::optional<double> low, std::optional<double> high,
                          const OptionalTensor&, const OptionalTensor&, int64_t next_bits) {
  const char* op = "packed_conv2d";
  const auto g = check_images(op, x, scales, kernel, stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(g.channels > 0, op, ": x must have channels; got ", x.sizes());
  TORCH_CHECK_VALUE(next_bits == 0, op, ": next_bits must be 0 on CUDA; got ", next_bits);
  IntegerCall c;
  c.batch = size_on_device(op, "x's batch", g.batch), c.channels = size_on_device(op, "x's channels", g.channels), c.groups = int(groups);
  c.height = size_on_device(op, "x's height", g.height), c.width = size_on_device(op, "x's width", g.width);
  c.out_channels = size_on_device(op, "scales' length", g.out_channels);
  c.out_height = size_on_device(op, "the output's height", g.out_height);
  c.out_width = size_on_device(op, "the output's width", g.out_width);
  for (int d = 0; d < 2; ++d)
    c.kernel[d] = int(kernel[d]), c.stride[d] = int(stride[d]), c.padding[d] = int(padding[d]), c.dilation[d] = int(dilation[d]);
  TORCH_CHECK_VALUE(kernel[0] * kernel[1] < (int64_t(1) << 30) / g.channels, op, ": codes must have rows of less than 2^30; got kernel ",
                    kernel);
  c.together = x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  return IntegerLayer{op, step, zero_point, activation_bits, codes, levels, scales, sums, bias, storage_bits, residual, low, high}(
      c, x, {g.batch, g.out_channels, g.out_height, g.out_width},
      c.together ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

Tensor packed_linear_cuda(const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                          const Tensor&, const Tensor& levels, const Tensor& scales, const Tensor& sums, const OptionalTensor& bias,
                          int64_t storage_bits) {
  const char* op = "packed_linear";
  check_rows(op, x);
  TORCH_CHECK_VALUE(x.size(1) > 0, op, ": x must have channels; got ", x.sizes());
  IntegerCall c;
  c.batch = size_on_device(op, "x's batch", x.size(0)), c.channels = size_on_device(op, "x's channels", x.size(1));
  c.out_channels = size_on_device(op, "scales' length", scales.numel());
  c.together = true;
  return IntegerLayer{op, step, zero_point, activation_bits, codes, levels, scales, sums, bias, storage_bits, {}, {}, {}}(
      c, x, {x.size(0), scales.numel()}, at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("packed_conv2d", packed_conv2d_cuda);
  m.impl("packed_linear", packed_linear_cuda);
}

}  // namespace quantize::packed
