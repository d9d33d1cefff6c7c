// packed_conv2d, packed_linear, packed_linear_float: CPU and Meta.
//
// The input is quantized to an image of bytes, channels last and padded with the code of zero, so that a kernel tap is a fixed distance
// from its pixel and no im2col is written. Each thread decodes two panels of weights and runs them over all pixels.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <memory>

#include "bit_planes.h"
#include "depthwise.h"
#include "image_kernels.h"
#include "packed_call.h"
#include "panels.h"
#include "products.h"
#include "tile_rows.h"
#include "winograd.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t fewest_tile_rows = 8;  // fewer leave more than half of a tile empty

struct Activation {
  LsqRange range;
  int zero_point;
};

Activation activation(const char* op, const Tensor& x, const Tensor& step, const Tensor& zero_point, int64_t bits) {
  check_activation(op, x, step, zero_point, bits);
  const float zero = *zero_point.const_data_ptr<float>();
  TORCH_CHECK_VALUE(zero >= 0 && zero < float(1 << bits) && zero == std::nearbyint(zero), op,
                    ": zero_point must be a whole number below 2^activation_bits; got ", zero);
  return {weight::lsq_range(*step.const_data_ptr<float>(), zero, (1 << bits) - 1), int(zero)};
}

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Images of codes, one a sample and group, with padding around: channels of a pixel together, filled up to quads.
struct Images {
  const Geometry<int64_t>& g;
  IntArrayRef padding;
  int64_t groups, inputs;      // inputs: of a group
  int64_t pixel, line, plane;  // bytes
  int64_t steps[2];            // strides. One beyond the image is never taken

  Images(const Geometry<int64_t>& sizes, IntArrayRef stride, IntArrayRef around, int64_t group_count, int64_t pixel_bytes)
      : g(sizes),
        padding(around),
        groups(group_count),
        inputs(g.channels / groups),
        pixel(pixel_bytes),
        line((g.width + 2 * padding[1]) * pixel),
        plane((g.height + 2 * padding[0]) * line),
        steps{std::min(stride[0], g.height + 2 * padding[0]), std::min(stride[1], g.width + 2 * padding[1])} {}

  int64_t quads() const { return pixel / GemmTraits::quad; }

  // Bytes behind the last image: codes are written four at a time, and tiles read rows and taps that are left out.
  int64_t behind(int64_t kernel_width) const {
    return 64 + (tile_kernels() ? TileRows::slack * steps[1] * pixel + kernel_width * pixel : 0);
  }

  // x: channels last where `rows_layout`, else contiguous.
  void fill(const Tensor& x, bool rows_layout, const Activation& act, uint8_t* images) const {
    const float* source = x.const_data_ptr<float>();
    at::parallel_for(0, g.batch * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        uint8_t* image = images + s * plane;
        if (padding[0] || padding[1] || pixel != inputs) std::memset(image, act.zero_point, plane);
        uint8_t* inner = image + padding[0] * line + padding[1] * pixel;
        const int64_t sample = s / groups, first = s % groups * inputs;
        if (!rows_layout) {
          image_kernels().from_planes(source + (sample * g.channels + first) * g.height * g.width, g.height * g.width, inputs, g.height,
                                      g.width, act.range, inner, line, pixel);
          continue;
        }
        for (int64_t h = 0; h < g.height; ++h)
          image_kernels().from_rows(source + (sample * g.height + h) * g.width * g.channels + first, g.channels, inputs, g.width, act.range,
                                    inner + h * line, pixel);
      }
    });
  }

  // Where the windows of the output's pixels begin, and a window's taps in it.
  std::vector<int32_t> rows() const {
    std::vector<int32_t> found;
    found.reserve(g.out_height * g.out_width);
    for (int64_t h = 0; h < g.out_height; ++h)
      for (int64_t w = 0; w < g.out_width; ++w) found.push_back(int32_t(h * steps[0] * line + w * steps[1] * pixel));
    return found;
  }
  std::vector<int32_t> taps(IntArrayRef kernel, IntArrayRef dilation) const {
    std::vector<int32_t> found;
    for (int64_t h = 0; h < kernel[0]; ++h)
      for (int64_t w = 0; w < kernel[1]; ++w) found.push_back(int32_t(h * dilation[0] * line + w * dilation[1] * pixel));
    return found;
  }
};

// All images times all panels of their groups. out: channels last where `rows_layout`.
void multiply_images(const Images& images, const uint8_t* bytes, const Panels& panels, const Epilogue& epilogue, IntArrayRef kernel,
                     IntArrayRef dilation, float* out, bool rows_layout) {
  const auto& g = images.g;
  const int64_t groups = images.groups, group_channels = g.out_channels / groups, pixels = g.out_height * g.out_width;
  const auto multiply = [&](const auto& product) {
    const int64_t parts = product.parts();
    share_out(g.batch * groups * parts, [&](int64_t item, std::vector<int8_t>& scratch) {
      const int64_t s = item / parts, sample = s / groups, group = s % groups;
      const uint8_t* image = bytes + s * images.plane;
      float* target = out + sample * g.out_channels * pixels;
      if (rows_layout)
        product(image, group, item % parts, scratch, target + group * group_channels, g.out_channels, 1);
      else
        product(image, group, item % parts, scratch, target + group * group_channels * pixels, 1, pixels);
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
                         IntArrayRef dilation, int64_t groups) {
  const char* op = "packed_conv2d";
  const auto g = check_images(op, input, scales, kernel, stride, padding, dilation, groups);
  const int64_t group_inputs = g.channels / groups, group_channels = g.out_channels / groups, taps_count = kernel[0] * kernel[1];
  const Activation act = activation(op, input, step, zero_point, activation_bits);
  check_weight(op, input, codes, levels, scales, bias, group_inputs * taps_count, storage_bits);
  const bool rows_layout = input.is_contiguous(at::MemoryFormat::ChannelsLast) && !input.is_contiguous();
  const auto format = rows_layout ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor x = input.contiguous(format);
  Tensor out = at::empty({g.batch, g.out_channels, g.out_height, g.out_width}, x.options(), format);
  const ConvShape shape{g, kernel, stride, padding, dilation, groups};
  if (panel_tensor.dim() == 5) {
    conv2d_of_bit_planes(op, x, shape, rows_layout, act.range, activation_bits, panel_tensor, sums, scales, bias, out);
    return out;
  }
  const Epilogue epilogue(op, scales, bias, sums, act.range.step, act.zero_point);
  if (panel_tensor.scalar_type() == at::kFloat) {
    conv2d_of_channels(op, x, shape, rows_layout, act.range, panel_tensor, epilogue, out);
    return out;
  }
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const int64_t pixel = rounded_up(group_inputs, GemmTraits::quad), quads = pixel / GemmTraits::quad;
  TORCH_CHECK_VALUE(panels.groups == groups && panels.tiles * GemmTraits::columns >= group_channels && panels.quads >= taps_count * quads,
                    op, ": panels must hold ", groups, " groups of ", group_channels, " channels and ", taps_count * quads, " quads; got ",
                    panel_tensor.sizes());
  if (out.numel() == 0) return out;

  const Images images(g, stride, padding, groups, pixel);
  TORCH_CHECK_VALUE(images.plane < (int64_t(1) << 31), op, ": x must have samples of less than 2 GiB in 8 bits; got ", input.sizes());
  const bool winograd = Winograd::takes(panels, kernel, stride, dilation, group_inputs, g.out_height, g.out_width);
  const int64_t behind = images.behind(kernel[1]) + (winograd ? Winograd::behind(images.line, images.pixel) : 0);
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[g.batch * groups * images.plane + behind]);
  images.fill(x, rows_layout, act, bytes.get());
  if (winograd)
    Winograd(panels, epilogue, g, groups, images.line, images.pixel)(bytes.get(), images.plane, out.data_ptr<float>(), rows_layout);
  else
    multiply_images(images, bytes.get(), panels, epilogue, kernel, dilation, out.data_ptr<float>(), rows_layout);
  return out;
}

Tensor packed_linear_cpu(const Tensor& input, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                         const Tensor& panel_tensor, const Tensor& levels, const Tensor& scales, const Tensor& sums,
                         const OptionalTensor& bias, int64_t storage_bits) {
  const char* op = "packed_linear";
  check_rows(op, input);
  const Activation act = activation(op, input, step, zero_point, activation_bits);
  check_weight(op, input, codes, levels, scales, bias, input.size(1), storage_bits);
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const Epilogue epilogue(op, scales, bias, sums, act.range.step, act.zero_point);
  const int64_t batch = input.size(0), channels = input.size(1), out_channels = scales.numel();
  const int64_t row = panels.quads * GemmTraits::quad;
  TORCH_CHECK_VALUE(panels.groups == 1 && panels.tiles * GemmTraits::columns >= out_channels && row >= channels, op, ": panels must hold ",
                    out_channels, " channels of ", channels, "; got ", panel_tensor.sizes());
  const Tensor x = input.contiguous();
  Tensor out = at::empty({batch, out_channels}, x.options());
  if (out.numel() == 0) return out;
  const bool tiles = tile_kernels() && batch >= fewest_tile_rows;
  const int64_t behind = 64 + (tiles ? TileRows::slack * row : 0);
  std::unique_ptr<uint8_t[]> image(new uint8_t[batch * row + behind]);
  if (row != channels) std::memset(image.get(), 0, batch * row);
  at::parallel_for(0, batch, 16, [&](int64_t begin, int64_t end) {
    image_kernels().from_rows(x.const_data_ptr<float>() + begin * channels, channels, channels, end - begin, act.range,
                              image.get() + begin * row, row);
  });
  float* target = out.data_ptr<float>();
  const auto multiply = [&](const auto& product, int64_t first) {
    share_out(product.parts(), [&](int64_t part, std::vector<int8_t>& scratch) {
      product(image.get() + first * row, 0, part, scratch, target + first * out_channels, out_channels, 1);
    });
  };
  if (tiles) {
    const int64_t one[] = {1, 1};
    multiply(TileProduct{panels, epilogue, TileRows(1, batch, row, row, one), TileTaps(one, 1, panels.quads), {0}, out_channels}, 0);
    return out;
  }
  std::vector<int32_t> rows(1, 0), taps(1, 0);
  // Rows are numbered from the first of a block, so that 32 bits suffice.
  const int64_t block = std::min<int64_t>(batch, std::max<int64_t>(1, (int64_t(1) << 30) / std::max<int64_t>(1, row)));
  for (int64_t i = 1; i < block; ++i) rows.push_back(int32_t(i * row));
  for (int64_t first = 0; first < batch; first += block) {
    if (batch - first < block) rows.resize(batch - first);
    multiply(Product{panels, epilogue, rows, taps, row / GemmTraits::quad, out_channels}, first);
  }
  return out;
}

Tensor packed_linear_float_cpu(const Tensor& input, const Tensor& codes, const Tensor& panel_tensor, const Tensor& levels,
                               const Tensor& scales, const OptionalTensor& bias, int64_t storage_bits) {
  const char* op = "packed_linear_float";
  check_rows(op, input);
  check_weight(op, input, codes, levels, scales, bias, input.size(1), storage_bits);
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const int64_t batch = input.size(0), channels = input.size(1), out_channels = scales.numel();
  const int64_t row = panels.quads * GemmTraits::quad;
  TORCH_CHECK_VALUE(panels.groups == 1 && panels.tiles * GemmTraits::columns >= out_channels && row >= channels, op, ": panels must hold ",
                    out_channels, " channels of ", channels, "; got ", panel_tensor.sizes());
  const float* shift = bias && bias->defined() ? bias->const_data_ptr<float>() : nullptr;
  Tensor out = at::empty({batch, out_channels}, input.options());
  std::vector<float> x(batch * row);
  const Tensor dense = input.contiguous();
  for (int64_t n = 0; n < batch; ++n) std::copy_n(dense.const_data_ptr<float>() + n * channels, channels, &x[n * row]);
  float* target = out.data_ptr<float>();
  const float* gain = scales.const_data_ptr<float>();
  at::parallel_for(0, panels.tiles, 8, [&](int64_t begin, int64_t end) {
    float acc[GemmTraits::columns];
    for (int64_t t = begin; t < end; ++t)
      for (int64_t n = 0; n < batch; ++n) {
        gemm_kernels().multiply_row_float(&x[n * row], panels.tile(0, t), acc);
        for (int64_t c = t * GemmTraits::columns; c < std::min(out_channels, (t + 1) * GemmTraits::columns); ++c)
          target[n * out_channels + c] = acc[c % GemmTraits::columns] * gain[c] + (shift ? shift[c] : 0.f);
      }
  });
  return out;
}

Tensor packed_conv2d_meta(const Tensor& x, const Tensor&, const Tensor&, int64_t, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor& scales, const Tensor&, const OptionalTensor&, int64_t, IntArrayRef kernel, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const auto g = geometry<c10::SymInt>("packed_conv2d", x.sym_sizes(), scales.sym_numel(), kernel, stride, padding, dilation, groups);
  const bool rows_layout = x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  return at::empty_symint({g.batch, g.out_channels, g.out_height, g.out_width}, x.options(),
                          rows_layout ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

Tensor packed_linear_meta(const Tensor& x, const Tensor&, const Tensor&, int64_t, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor& scales, const Tensor&, const OptionalTensor&, int64_t) {
  return at::empty_symint({x.sym_size(0), scales.sym_numel()}, x.options());
}

Tensor packed_linear_float_meta(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const Tensor& scales, const OptionalTensor&,
                                int64_t) {
  return at::empty_symint({x.sym_size(0), scales.sym_numel()}, x.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("packed_conv2d", packed_conv2d_cpu);
  m.impl("packed_linear", packed_linear_cpu);
  m.impl("packed_linear_float", packed_linear_float_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("packed_conv2d", packed_conv2d_meta);
  m.impl("packed_linear", packed_linear_meta);
  m.impl("packed_linear_float", packed_linear_float_meta);
}

}  // namespace quantize::packed
