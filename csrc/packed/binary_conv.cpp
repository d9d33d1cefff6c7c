// packed_binary_conv2d, packed_binary_linear: CPU and Meta. What they mean: binary_bits.h.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "binary_call.h"
#include "binary_layer.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using namespace binary_call;

// Everything but the input and the output.
BinaryLayer layer_of(const char* op, const Geometry<int64_t>& g, const OptionalTensor& threshold, const OptionalTensor& flip, bool unit,
                     const Tensor& codes, const Tensor& panels, const Tensor& sums, const Tensor& scales, const OptionalTensor& bias,
                     const OptionalTensor& next_threshold, const OptionalTensor& next_flip, IntArrayRef kernel, IntArrayRef stride,
                     IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  BinaryLayer l;
  l.unit = unit;
  l.batch = g.batch, l.channels = g.channels, l.height = g.height, l.width = g.width;
  l.out_channels = g.out_channels, l.out_height = g.out_height, l.out_width = g.out_width, l.groups = groups;
  for (int d = 0; d < 2; ++d) {
    l.padding[d] = padding[d];
    l.window.kernel[d] = kernel[d], l.window.stride[d] = stride[d], l.window.dilation[d] = dilation[d];
  }
  l.window.channels = g.channels / groups;
  l.window.width = g.width + 2 * padding[1], l.window.plane = l.window.width * (g.height + 2 * padding[0]);
  l.window.out_width = g.out_width;
  TORCH_CHECK_VALUE(l.length() < (int64_t(1) << 30), op, ": codes must have rows of less than 2^30 bits; got ", l.length());
  const int64_t n = g.out_channels;
  l.threshold = values<float>(op, "threshold", threshold, at::kFloat, {g.channels});
  l.flip = values<uint8_t>(op, "flip", flip, at::kByte, {g.channels});
  l.codes = values<uint8_t>(op, "codes", codes, at::kByte, {n, bits_bytes(l.length())});
  l.panels = values<uint8_t>(op, "panels", panels, at::kByte, {groups, (n / groups + 3) / 4, l.quads(), BinaryTraits::quad});
  l.sums = values<int32_t>(op, "sums", sums, at::kInt, {l.taps(), n});
  l.scales = values<float>(op, "scales", scales, at::kFloat, {n});
  l.bias = values<float>(op, "bias", bias, at::kFloat, {n});
  l.next_threshold = values<int32_t>(op, "next_threshold", next_threshold, at::kInt, {n});
  l.next_flip = values<uint8_t>(op, "next_flip", next_flip, at::kByte, {n});
  TORCH_CHECK_VALUE(l.next_threshold || !l.next_flip, op, ": next_flip must be None without next_threshold");
  return l;
}

Tensor run(const char* op, BinaryLayer& layer, const Tensor& x, IntArrayRef out_sizes, IntArrayRef bit_sizes, at::MemoryFormat format,
           const OptionalTensor& residual) {
  const Tensor added = residual_like(op, residual, x, out_sizes, layer.next_threshold, format);
  if (added.defined()) layer.residual = added.const_data_ptr<float>();
  if (x.scalar_type() == at::kByte)
    layer.bits = x.const_data_ptr<uint8_t>();
  else
    layer.floats = x.const_data_ptr<float>();
  Tensor out = layer.next_threshold ? at::zeros(bit_sizes, x.options().dtype(at::kByte))
                                    : at::empty(out_sizes, x.options().dtype(at::kFloat), format);
  if (out.numel() == 0) return given(residual) ? at::add(out, *residual) : out;
  if (layer.next_threshold)
    layer.out_bits = out.data_ptr<uint8_t>();
  else
    layer.out = out.data_ptr<float>();
  run_binary(layer);
  return given(residual) && !added.defined() ? at::add(out, *residual) : out;
}

Tensor conv2d_cpu(const Tensor& input, const OptionalTensor& threshold, const OptionalTensor& flip, bool unit, const Tensor& codes,
                  const Tensor& panels, const Tensor& sums, const Tensor& scales, const OptionalTensor& bias,
                  const OptionalTensor& next_threshold, const OptionalTensor& next_flip, int64_t channels, IntArrayRef kernel,
                  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, const OptionalTensor& residual) {
  const char* op = "packed_binary_conv2d";
  check_input(op, input, threshold, flip, channels, conv_floats, conv_bits, 4);
  const bool bits_in = input.scalar_type() == at::kByte, rows = channels_last(input, residual);
  auto g = conv_sizes<int64_t>(op, input.sizes(), bits_in, scales.numel(), channels, kernel, stride, padding, dilation, groups);
  const int64_t sample = g.channels * g.height * g.width, line = g.channels * g.width, one[2] = {1, 1};
  // One tap: what lies between its pixels need not be packed.
  const bool sparse = rows && !bits_in && kernel[0] * kernel[1] == 1 && !padding[0] && !padding[1];
  if (sparse) g.height = g.out_height, g.width = g.out_width;
  BinaryLayer layer = layer_of(op, g, threshold, flip, unit, codes, panels, sums, scales, bias, next_threshold, next_flip, kernel,
                               sparse ? IntArrayRef(one) : stride, padding, dilation, groups);
  layer.rows = rows, layer.sample = sample, layer.line = line;
  if (sparse) layer.skip[0] = stride[0], layer.skip[1] = stride[1];
  const auto format = layer.rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor x = bits_in ? input.contiguous() : input.contiguous(format);
  return run(op, layer, x, {g.batch, g.out_channels, g.out_height, g.out_width},
             {g.batch, g.out_height, g.out_width, bits_bytes(g.out_channels)}, format, residual);
}

// A batch is an image of one line, its channels together.
Tensor linear_cpu(const Tensor& input, const OptionalTensor& threshold, const OptionalTensor& flip, bool unit, const Tensor& codes,
                  const Tensor& panels, const Tensor& sums, const Tensor& scales, const OptionalTensor& bias,
                  const OptionalTensor& next_threshold, const OptionalTensor& next_flip, int64_t channels) {
  const char* op = "packed_binary_linear";
  check_input(op, input, threshold, flip, channels, linear_floats, linear_bits, 2);
  const int64_t batch = input.size(0), outputs = scales.numel(), one[2] = {1, 1}, none[2] = {0, 0};
  const Geometry<int64_t> g{1, channels, 1, batch, outputs, 1, batch};
  BinaryLayer layer =
      layer_of(op, g, threshold, flip, unit, codes, panels, sums, scales, bias, next_threshold, next_flip, one, one, none, one, 1);
  layer.rows = true, layer.sample = channels * batch, layer.line = layer.sample;
  return run(op, layer, input.contiguous(), {batch, outputs}, {batch, bits_bytes(outputs)}, at::MemoryFormat::Contiguous, {});
}

Tensor conv2d_meta(const Tensor& x, const OptionalTensor& threshold, const OptionalTensor& flip, bool, const Tensor&, const Tensor&,
                   const Tensor&, const Tensor& scales, const OptionalTensor&, const OptionalTensor& next_threshold, const OptionalTensor&,
                   int64_t channels, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                   const OptionalTensor& residual) {
  const char* op = "packed_binary_conv2d";
  check_input(op, x, threshold, flip, channels, conv_floats, conv_bits, 4);
  const auto g = conv_sizes<c10::SymInt>(op, x.sym_sizes(), x.scalar_type() == at::kByte, scales.sym_numel(), channels, kernel, stride,
                                         padding, dilation, groups);
  if (given(next_threshold))
    return at::empty_symint({g.batch, g.out_height, g.out_width, (g.out_channels + 63) / 64 * 8}, x.options().dtype(at::kByte));
  const Tensor out = at::empty_symint({g.batch, g.out_channels, g.out_height, g.out_width}, x.options().dtype(at::kFloat),
                                      channels_last(x, residual) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  return given(residual) ? at::add(out, *residual) : out;
}

Tensor linear_meta(const Tensor& x, const OptionalTensor& threshold, const OptionalTensor& flip, bool, const Tensor&, const Tensor&,
                   const Tensor&, const Tensor& scales, const OptionalTensor&, const OptionalTensor& next_threshold, const OptionalTensor&,
                   int64_t channels) {
  check_input("packed_binary_linear", x, threshold, flip, channels, linear_floats, linear_bits, 2);
  if (given(next_threshold)) return at::empty_symint({x.sym_size(0), (scales.sym_numel() + 63) / 64 * 8}, x.options().dtype(at::kByte));
  return at::empty_symint({x.sym_size(0), scales.sym_numel()}, x.options().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("packed_binary_conv2d", conv2d_cpu);
  m.impl("packed_binary_linear", linear_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("packed_binary_conv2d", conv2d_meta);
  m.impl("packed_binary_linear", linear_meta);
}

}  // namespace quantize::packed
