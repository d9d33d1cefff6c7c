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
#include "conv_geometry.h"
#include "image_kernels.h"
#include "panels.h"
#include "scratch.h"
#include "tile_rows.h"
#include "winograd.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t pair = 2;              // decoded panels that go through the rows together
constexpr int64_t fewest_tile_rows = 8;  // fewer leave more than half of a tile empty

struct Activation {
  LsqRange range;
  int zero_point;
};

Activation activation(const char* op, const Tensor& step, const Tensor& zero_point, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, op, ": activation_bits must be between 1 and 8; got ", bits);
  check_dtype(op, "step", step, at::kFloat), check_numel(op, "step", step, 1);
  check_dtype(op, "zero_point", zero_point, at::kFloat), check_numel(op, "zero_point", zero_point, 1);
  const float zero = *zero_point.const_data_ptr<float>();
  TORCH_CHECK_VALUE(zero >= 0 && zero < float(1 << bits) && zero == std::nearbyint(zero), op,
                    ": zero_point must be a whole number below 2^activation_bits; got ", zero);
  return {weight::lsq_range(*step.const_data_ptr<float>(), zero, (1 << bits) - 1), int(zero)};
}

// Runs a part of a group's panels over all rows of an image. out: of the group's first channel.
struct Product {
  const Panels& panels;
  const Epilogue& epilogue;
  const std::vector<int32_t>& rows;
  const std::vector<int32_t>& taps;
  int64_t quads;  // of a tap
  int64_t group_channels;

  bool one_row() const { return rows.size() == 1 && taps.size() == 1; }
  int64_t together() const { return one_row() ? GemmTraits::streams : pair; }
  int64_t parts() const { return (panels.tiles + together() - 1) / together(); }

  void operator()(const uint8_t* image, int64_t group, int64_t part, std::vector<int8_t>& scratch, float* out, int64_t row_stride,
                  int64_t column_stride) const {
    const auto& gemm = gemm_kernels();
    const int64_t first = part * together();
    const int64_t tiles = std::min(together(), panels.tiles - first), panel_bytes = panels.quads * GemmTraits::quad_bytes;
    const int64_t begin = first * GemmTraits::columns, columns = std::min(tiles * GemmTraits::columns, group_channels - begin);
    const int64_t channel = group * group_channels + begin, all = int64_t(rows.size());
    int32_t acc[GemmTraits::rows * pair * GemmTraits::columns];
    const Epilogue::Part after(epilogue, channel, columns);
    const auto finish = [&](int64_t i, int64_t count) {
      image_kernels().finish(acc, tiles * GemmTraits::columns, count, columns, after.correction, after.gain, after.bias,
                             out + i * row_stride + begin * column_stride, row_stride, column_stride);
    };
    if (one_row()) {
      gemm.multiply_row(image + rows[0] + taps[0], panels.tile(group, first), int(tiles), acc);
      return finish(0, 1);
    }
    const int8_t* levels = reinterpret_cast<const int8_t*>(panels.tile(group, first).codes);
    if (panels.bits < 8) {
      scratch.resize(tiles * panel_bytes);
      for (int64_t t = 0; t < tiles; ++t) gemm.decode(panels.tile(group, first + t), scratch.data() + t * panel_bytes);
      levels = scratch.data();
    }
    for (int64_t i = 0; i < all; i += GemmTraits::rows) {
      const int64_t count = std::min<int64_t>(GemmTraits::rows, all - i);
      gemm.multiply(image, &rows[i], int(count), taps.data(), int(taps.size()), quads, levels, panel_bytes, int(tiles), panels.steps, acc);
      finish(i, count);
    }
  }
};

// The same in tiles.
struct TileProduct {
  const Panels& panels;
  const Epilogue& epilogue;
  const TileRows rows;
  const TileTaps taps;
  const std::vector<int32_t> lines;  // where the taps' lines begin
  int64_t group_channels;

  int64_t parts() const { return (panels.tiles + TileTraits::together - 1) / TileTraits::together; }

  // A part's levels, line by line in whole tiles.
  const int8_t* levels(int64_t group, int64_t first, int64_t tiles, std::vector<int8_t>& scratch) const {
    if (panels.bits == 8 && !taps.filled() && panels.bytes == taps.panel_bytes())
      return reinterpret_cast<const int8_t*>(panels.tile(group, first).codes);
    const int64_t stored = panels.quads * GemmTraits::quad_bytes, line = taps.quads * GemmTraits::quad_bytes;
    const int64_t whole = taps.panel_bytes();
    int8_t* made = aligned(at_least(scratch, tiles * whole + stored + 64));
    for (int64_t t = 0; t < tiles; ++t) {
      const auto panel = panels.tile(group, first + t);
      int8_t* target = made + t * whole;
      const int8_t* decoded = reinterpret_cast<const int8_t*>(panel.codes);  // of 8 bits: they are levels
      if (panels.bits != 8) {
        int8_t* place = taps.filled() || stored != whole ? made + tiles * whole : target;
        gemm_kernels().decode(panel, place);
        decoded = place;
      }
      if (decoded == target) continue;
      for (int64_t l = 0; l < taps.lines; ++l) {
        const int64_t pitch = whole / taps.lines;
        std::memcpy(target + l * pitch, decoded + l * line, line);
        std::memset(target + l * pitch + line, 0, pitch - line);
      }
    }
    return made;
  }

  void operator()(const uint8_t* image, int64_t group, int64_t part, std::vector<int8_t>& scratch, float* out, int64_t row_stride,
                  int64_t column_stride) const {
    const int64_t first = part * TileTraits::together, tiles = std::min<int64_t>(TileTraits::together, panels.tiles - first);
    const int64_t begin = first * TileTraits::columns, columns = std::min(tiles * TileTraits::columns, group_channels - begin);
    const Epilogue::Part after(epilogue, group * group_channels + begin, columns);
    const int8_t* weights = levels(group, first, tiles, scratch);
    const auto& kernels = *tile_kernels();
    const int64_t pitch = tiles * TileTraits::columns;
    alignas(64) int32_t acc[TileTraits::together * TileTraits::rows * TileTraits::together * TileTraits::columns];
    rows.blocks([&](int64_t offset, int row_tiles, const auto& runs) {
      kernels.multiply(image + offset, rows.stride, row_tiles, {lines.data(), taps.lines, taps.chunks}, weights, int(tiles), acc);
      runs([&](int64_t row, int64_t count, int64_t pixel) {
        const int32_t* sums = acc + row * pitch;
        float* target = out + pixel * row_stride + begin * column_stride;
        if (column_stride == 1)
          image_kernels().finish(sums, pitch, count, columns, after.correction, after.gain, after.bias, target, row_stride, 1);
        else
          kernels.finish_planes(sums, pitch, count, columns, after.correction, after.gain, after.bias, target, column_stride);
      });
    });
  }
};

// run(item, scratch) for each item, on all threads, in tiles where there are any.
template <typename Run>
void share_out(int64_t items, const Run& run) {
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> scratch;
    const TileSession tiles(tile_kernels());
    for (int64_t item = begin; item < end; ++item) run(item, scratch);
  });
}

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Tensor packed_conv2d_cpu(const Tensor& input, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                         const Tensor& panel_tensor, const Tensor& levels, const Tensor& scales, const Tensor& sums,
                         const OptionalTensor& bias, int64_t storage_bits, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, int64_t groups) {
  const char* op = "packed_conv2d";
  check_dtype(op, "x", input, at::kFloat);
  const auto g = geometry<int64_t>(op, input.sizes(), scales.numel(), kernel, stride, padding, dilation, groups);
  const Activation act = activation(op, step, zero_point, activation_bits);
  const bool rows_layout = input.is_contiguous(at::MemoryFormat::ChannelsLast) && !input.is_contiguous();
  const auto format = rows_layout ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor x = input.contiguous(format);
  Tensor out = at::empty({g.batch, g.out_channels, g.out_height, g.out_width}, x.options(), format);
  if (panel_tensor.dim() == 5) {
    conv2d_of_bit_planes(op, x, {g, kernel, stride, padding, dilation, groups}, rows_layout, act.range, activation_bits, panel_tensor, sums,
                         scales, bias, out);
    return out;
  }
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const Epilogue epilogue(op, scales, bias, sums, act.range.step, act.zero_point);
  const int64_t group_inputs = g.channels / groups, group_channels = g.out_channels / groups;
  const int64_t pixel = rounded_up(group_inputs, GemmTraits::quad), quads = pixel / GemmTraits::quad, taps_count = kernel[0] * kernel[1];
  check_codes(op, codes, g.out_channels, group_inputs * taps_count, storage_bits);
  TORCH_CHECK_VALUE(panels.groups == groups && panels.tiles * GemmTraits::columns >= group_channels && panels.quads >= taps_count * quads,
                    op, ": panels must hold ", groups, " groups of ", group_channels, " channels and ", taps_count * quads, " quads; got ",
                    panel_tensor.sizes());
  if (out.numel() == 0) return out;

  // An image a sample and group. 64 bytes behind the last: codes are written four at a time.
  const int64_t line = (g.width + 2 * padding[1]) * pixel, plane = (g.height + 2 * padding[0]) * line;
  TORCH_CHECK_VALUE(plane < (int64_t(1) << 31), op, ": x must have samples of less than 2 GiB in 8 bits; got ", input.sizes());
  // In tiles, more: rows and taps behind the last are read and left out. A stride beyond the image is one that is never taken.
  const int64_t steps[2] = {std::min(stride[0], g.height + 2 * padding[0]), std::min(stride[1], g.width + 2 * padding[1])};
  const bool winograd = Winograd::takes(panels, kernel, stride, dilation, group_inputs, g.out_height, g.out_width);
  const int64_t behind = 64 + (tile_kernels() ? TileRows::slack * steps[1] * pixel + kernel[1] * pixel : 0);
  std::unique_ptr<uint8_t[]> images(new uint8_t[g.batch * groups * plane + behind + (winograd ? Winograd::behind(line, pixel) : 0)]);
  at::parallel_for(0, g.batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      uint8_t* image = images.get() + s * plane;
      if (padding[0] || padding[1] || pixel != group_inputs) std::memset(image, act.zero_point, plane);
      uint8_t* inner = image + padding[0] * line + padding[1] * pixel;
      const int64_t sample = s / groups, first = s % groups * group_inputs;
      if (!rows_layout) {
        image_kernels().from_planes(x.const_data_ptr<float>() + (sample * g.channels + first) * g.height * g.width, g.height * g.width,
                                    group_inputs, g.height, g.width, act.range, inner, line, pixel);
        continue;
      }
      for (int64_t h = 0; h < g.height; ++h)
        image_kernels().from_rows(x.const_data_ptr<float>() + (sample * g.height + h) * g.width * g.channels + first, g.channels,
                                  group_inputs, g.width, act.range, inner + h * line, pixel);
    }
  });

  if (winograd) {
    Winograd(panels, epilogue, g, groups, line, pixel)(images.get(), plane, out.data_ptr<float>(), rows_layout);
    return out;
  }
  std::vector<int32_t> rows, taps;
  for (int64_t h = 0; h < g.out_height; ++h)
    for (int64_t w = 0; w < g.out_width; ++w) rows.push_back(int32_t(h * steps[0] * line + w * steps[1] * pixel));
  for (int64_t h = 0; h < kernel[0]; ++h)
    for (int64_t w = 0; w < kernel[1]; ++w) taps.push_back(int32_t(h * dilation[0] * line + w * dilation[1] * pixel));
  const int64_t pixels = g.out_height * g.out_width;
  const auto multiply = [&](const auto& product) {
    const int64_t parts = product.parts();
    share_out(g.batch * groups * parts, [&](int64_t item, std::vector<int8_t>& scratch) {
      const int64_t s = item / parts, sample = s / groups, group = s % groups;
      const uint8_t* image = images.get() + s * plane;
      float* target = out.data_ptr<float>() + sample * g.out_channels * pixels;
      if (rows_layout)
        product(image, group, item % parts, scratch, target + group * group_channels, g.out_channels, 1);
      else
        product(image, group, item % parts, scratch, target + group * group_channels * pixels, 1, pixels);
    });
  };
  if (tile_kernels() && pixels >= fewest_tile_rows) {
    const TileTaps tile_taps(kernel.data(), dilation[1], quads);
    const TileRows tile_rows(g.out_height, g.out_width, pixel, line, steps);
    multiply(TileProduct{panels, epilogue, tile_rows, tile_taps, tile_taps.offsets(kernel.data(), dilation.data(), pixel, line),
                         group_channels});
  } else {
    multiply(Product{panels, epilogue, rows, taps, quads, group_channels});
  }
  return out;
}

Tensor packed_linear_cpu(const Tensor& input, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                         const Tensor& panel_tensor, const Tensor& levels, const Tensor& scales, const Tensor& sums,
                         const OptionalTensor& bias, int64_t storage_bits) {
  const char* op = "packed_linear";
  check_dtype(op, "x", input, at::kFloat);
  TORCH_CHECK_VALUE(input.dim() == 2, op, ": x must be [N, C]; got ", input.sizes());
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const Activation act = activation(op, step, zero_point, activation_bits);
  const Epilogue epilogue(op, scales, bias, sums, act.range.step, act.zero_point);
  const int64_t batch = input.size(0), channels = input.size(1), out_channels = scales.numel();
  const int64_t row = panels.quads * GemmTraits::quad;
  check_codes(op, codes, out_channels, channels, storage_bits);
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
  check_dtype(op, "x", input, at::kFloat);
  TORCH_CHECK_VALUE(input.dim() == 2, op, ": x must be [N, C]; got ", input.sizes());
  check_floats(op, "scales", scales, scales.numel());
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const int64_t batch = input.size(0), channels = input.size(1), out_channels = scales.numel();
  const int64_t row = panels.quads * GemmTraits::quad;
  check_codes(op, codes, out_channels, channels, storage_bits);
  TORCH_CHECK_VALUE(panels.groups == 1 && panels.tiles * GemmTraits::columns >= out_channels && row >= channels, op, ": panels must hold ",
                    out_channels, " channels of ", channels, "; got ", panel_tensor.sizes());
  if (bias && bias->defined()) check_floats(op, "bias", *bias, out_channels);
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
