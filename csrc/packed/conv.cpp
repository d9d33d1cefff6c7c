// packed_conv2d: CPU and Meta.
//
// The input is quantized to an image of bytes, channels last and padded with the code of zero, so that a kernel tap is a fixed distance
// from its pixel and no im2col is written. Each thread decodes two panels of weights and runs them over all pixels.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>

#include "asked.h"
#include "bit_planes.h"
#include "depthwise.h"
#include "images.h"
#include "products.h"
#include "winograd.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// All images times all panels of their groups.
void multiply_images(const Images& images, const uint8_t* bytes, const Panels& panels, const Epilogue& epilogue, IntArrayRef kernel,
                     IntArrayRef dilation, const Output& out) {
  const auto& g = images.g;
  const int64_t groups = images.groups, group_channels = g.out_channels / groups, pixels = g.out_height * g.out_width;
  const auto multiply = [&](const auto& product) {
    const int64_t parts = product.parts();
    share_out(g.batch * groups * parts, [&](int64_t item, std::vector<int8_t>& scratch) {
      const int64_t s = item / parts, sample = s / groups, group = s % groups;
      const uint8_t* image = bytes + s * images.plane;
      product(image, group, item % parts, scratch, out, sample);
    });
  };
  if (tile_kernels() && pixels >= fewest_tile_rows) {
    const TileTaps taps(kernel.data(), dilation[1], images.quads());
    const TileRows rows(g.out_height, g.out_width, images.pixel, images.line, images.steps);
    const auto lines = taps.offsets(kernel.data(), dilation.data(), images.pixel, images.line);
    return multiply(TileProduct{panels, epilogue, rows, taps, lines, group_channels});
  }
  const auto rows = images.rows(), taps = images.taps(kernel, dilation);
  multiply(Product{panels, epilogue, rows, taps, images.quads(), group_channels});
}

Tensor packed_conv2d_cpu(const Tensor& input, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                         const Tensor& panel_tensor, const Tensor& levels, const Tensor& scales, const Tensor& sums,
                         const OptionalTensor& bias, int64_t storage_bits, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, int64_t groups, const OptionalTensor& residual, std::optional<double> low,
                         std::optional<double> high, const OptionalTensor& next_step, const OptionalTensor& next_zero_point,
                         int64_t next_bits) {
  const char* op = "packed_conv2d";
  const bool coded = input.scalar_type() == at::kByte;
  const Tensor given = coded ? channels_second(input) : input;
  const auto g = check_images(op, given, scales, kernel, stride, padding, dilation, groups, coded);
  if (coded) check_codes(op, given);
  const int64_t group_inputs = g.channels / groups, group_channels = g.out_channels / groups, taps_count = kernel[0] * kernel[1];
  const Activation act = activation(op, input, step, zero_point, activation_bits);
  check_weight(op, input, codes, levels, scales, bias, group_inputs * taps_count, storage_bits);
  const Asked asked(op, input, residual, low, high, next_step, next_zero_point, next_bits);
  const bool rows = coded ? input.dim() == 5 : input.is_contiguous(at::MemoryFormat::ChannelsLast) && !input.is_contiguous();
  const auto format = rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const int64_t out_sizes[] = {g.batch, g.out_channels, g.out_height, g.out_width};
  const auto options = input.options().dtype(at::kFloat);
  const Tensor x = coded ? given : input.contiguous(format);
  const Epilogue epilogue(op, scales, bias, sums, act.range.step, act.zero_point);
  const ConvShape shape{g, kernel, stride, padding, dilation, groups};

  const bool planes = panel_tensor.dim() == 5, taps = panel_tensor.scalar_type() == at::kFloat;
  TORCH_CHECK_VALUE(!coded || !planes, op, ": x must be floats where panels are bit planes; got codes");
  const bool pixels = rows || coded;  // depthwise convolutions of codes have pixels in any case
  bool on_the_way = asked.on_the_way(out_sizes);
  if (planes) on_the_way = !asked.anything();
  if (taps) on_the_way = !asked.residual && (!asked.codes || (pixels && group_channels == 1));
  if (asked.codes && groups > 1 && !taps) on_the_way = on_the_way && group_channels % filled_to == 0;
  Then then;
  Tensor out, added;
  if (on_the_way) {
    then = asked.then();
    if (asked.residual) added = asked.residual->contiguous(format), then.residual = added.const_data_ptr<float>();
  }
  if (on_the_way && asked.codes) {
    out = empty_codes(out_sizes, rows, options);
    then.codes = out.data_ptr<uint8_t>(), then.pixel = rounded_up(g.out_channels, filled_to);
  } else {
    out = at::empty(out_sizes, options, taps && pixels ? at::MemoryFormat::ChannelsLast : format);
  }
  float* floats = then.codes ? nullptr : out.data_ptr<float>();
  const auto done = [&] {
    if (!on_the_way) out = asked.after(out, g, rows);
    return out.scalar_type() == at::kFloat && out.dim() == 4 ? out.contiguous(format) : out;  // a sum may have more
  };

  if (planes) {
    conv2d_of_bit_planes(op, x, shape, rows, act.range, activation_bits, panel_tensor, sums, scales, bias, out);
    return done();
  }
  if (taps) {
    conv2d_of_channels(op, x, shape, pixels, act, panel_tensor, epilogue, floats, then);
    return done();
  }
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const int64_t pixel = rounded_up(group_inputs, GemmTraits::quad), quads = pixel / GemmTraits::quad;
  TORCH_CHECK_VALUE(panels.groups == groups && panels.tiles * GemmTraits::columns >= group_channels && panels.quads >= taps_count * quads,
                    op, ": panels must hold ", groups, " groups of ", group_channels, " channels and ", taps_count * quads, " quads; got ",
                    panel_tensor.sizes());
  if (out.numel() == 0) return done();

  const Images images(g, stride, padding, groups, pixel);
  TORCH_CHECK_VALUE(images.plane < (int64_t(1) << 31), op, ": x must have samples of less than 2 GiB in 8 bits; got ", input.sizes());
  const bool winograd = Winograd::takes(panels, kernel, stride, dilation, group_inputs, g.out_height, g.out_width);
  const int64_t behind = images.behind(kernel[1]) + (winograd ? Winograd::behind(images.line, images.pixel) : 0);
  const int64_t needed = g.batch * groups * images.plane + behind;
  std::unique_ptr<uint8_t[]> made;
  const uint8_t* bytes;
  const int64_t there = coded ? int64_t(x.storage().nbytes()) - x.storage_offset() : 0;
  if (coded && groups == 1 && padding[0] == 0 && padding[1] == 0 && there >= needed) {
    bytes = x.const_data_ptr<uint8_t>();
  } else {
    made.reset(new uint8_t[needed]), bytes = made.get();
    if (coded)
      images.copy(x.const_data_ptr<uint8_t>(), rounded_up(g.channels, filled_to), act.zero_point, made.get());
    else
      images.fill(x, rows, act, made.get());
  }
  const Output target(floats, rows, g.out_channels, g.out_height * g.out_width, then);
  if (winograd)
    Winograd(panels, epilogue, g, groups, images.line, images.pixel)(bytes, images.plane, target);
  else
    multiply_images(images, bytes, panels, epilogue, kernel, dilation, target);
  return done();
}

Tensor packed_conv2d_meta(const Tensor& input, const Tensor&, const Tensor&, int64_t, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor& scales, const Tensor&, const OptionalTensor&, int64_t, IntArrayRef kernel, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, int64_t groups, const OptionalTensor&, std::optional<double>,
                          std::optional<double>, const OptionalTensor&, const OptionalTensor&, int64_t next_bits) {
  const bool coded = input.scalar_type() == at::kByte;
  const Tensor x = coded ? channels_second(input) : input;
  const auto g = geometry<c10::SymInt>("packed_conv2d", x.sym_sizes(), scales.sym_numel(), kernel, stride, padding, dilation, groups);
  const bool rows = coded ? input.dim() == 5 : x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  const c10::SymInt sizes[] = {g.batch, g.out_channels, g.out_height, g.out_width};
  if (next_bits != 0) return empty_codes(C10_AS_INTARRAYREF_SLOW(c10::SymIntArrayRef(sizes)), rows, x.options());
  return at::empty_symint(sizes, x.options().dtype(at::kFloat), rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("packed_conv2d", packed_conv2d_cpu); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("packed_conv2d", packed_conv2d_meta); }

}  // namespace quantize::packed
