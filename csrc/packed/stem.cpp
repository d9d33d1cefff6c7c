// stem_conv2d: CPU and Meta. Lines of tiles, one after the other: stem_kernels.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <optional>

#include "../core/grain.h"
#include "../layers/pool_shape.h"
#include "scratch.h"
#include "stem_call.h"
#include "stem_kernels.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using layers::PoolShape;
using namespace stem_call;

struct Stem {
  const float *x, *weights;
  int64_t strides[4];  // of x
  Geometry<int64_t> sizes;
  int64_t padding[2];
  StemSizes tiles;
  int64_t panels;
  const float* bias;
  float low, high;
  std::optional<PoolShape> pool;
  float* out;
  bool rows;  // out: channels last

  int64_t pitch() const { return panels * StemTraits::columns; }            // floats of a pixel
  int64_t row() const { return StemTraits::tile * tiles.tiles * pitch(); }  // and of a line
  int64_t out_height() const { return pool ? pool->output[0] : sizes.out_height; }
  int64_t out_width() const { return pool ? pool->output[1] : sizes.out_width; }
  // Lines of the convolution that are made before a line of outputs is.
  int64_t lines() const { return StemTraits::tile + (pool ? pool->kernel[0] + StemTraits::tile : 0); }
};

struct Scratch {
  std::vector<float> lines, nothing, line, apart, tiles, sums, bias, rows, maxima, columns;
};

// Of one thread: it goes down the image, and keeps the transformed lines that the next tiles see as well.
class StemRun {
 public:
  StemRun(const Stem& stem, Scratch& scratch) : s_(stem), k_(*stem_kernels()), line_floats_(stem.tiles.line()) {
    const auto part = [](std::vector<float>& v, int64_t size) { return aligned(at_least(v, size + 16)); };
    lines_ = part(scratch.lines, StemTraits::lines * line_floats_);
    nothing_ = part(scratch.nothing, line_floats_);
    line_ = part(scratch.line, s_.tiles.pixels());
    apart_ = part(scratch.apart, StemTraits::tile * StemTraits::step * (s_.tiles.pitch + 16));
    tiles_ = part(scratch.tiles, 2 * StemTraits::points * line_floats_);
    sums_ = part(scratch.sums, k_.most_sums);
    bias_ = part(scratch.bias, s_.pitch());
    rows_ = part(scratch.rows, s_.lines() * s_.row());
    maxima_ = part(scratch.maxima, s_.pool ? s_.out_width() * s_.pitch() : 0);
    columns_ = part(scratch.columns, s_.pool ? s_.row() : 0);
    std::fill_n(nothing_, line_floats_, 0.f);
    std::fill_n(bias_, s_.pitch(), 0.f);
    if (s_.bias) std::copy_n(s_.bias, s_.sizes.out_channels, bias_);
  }

  // Lines [begin, end) of all samples' outputs.
  void operator()(int64_t begin, int64_t end) {
    const int64_t height = s_.out_height(), pixel = s_.sizes.out_channels;
    // What is written is no more than a line.
    const bool whole = s_.rows && !s_.pool && s_.pitch() == pixel && s_.out_width() % StemTraits::tile == 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / height, y = i % height;
      if (i == begin || y == 0) next_ = 0, made_ = end_ = 0, x_ = s_.x + sample * s_.strides[0];
      float* out = s_.out + (s_.rows ? i * s_.out_width() * pixel : (sample * pixel * height + y) * s_.out_width());
      if (whole && y % StemTraits::tile == 0 && std::max(i + StemTraits::tile - end, y + StemTraits::tile - height) <= 0) {
        make_tiles(y, out, s_.out_width() * pixel);
        made_ = end_ = y + StemTraits::tile, i += StemTraits::tile - 1;
        continue;
      }
      s_.pool ? pool_line(y, out) : copy_line(y, out);
    }
  }

 private:
  void copy_line(int64_t y, float* out) {
    make(y, y + 1);
    store(rows_ + (y - made_) * s_.row(), out);
  }

  void pool_line(int64_t y, float* out) {
    PoolShape p = *s_.pool;
    const int64_t top = p.start(0, y);
    make(std::max<int64_t>(top, 0), std::min(top + p.kernel[0], p.input[0]));
    // As a pool over the lines that are there.
    p.input[0] = end_ - made_, p.padding[0] += made_, p.input[1] = StemTraits::tile * s_.tiles.tiles;
    const bool whole = s_.rows && s_.pitch() == s_.sizes.out_channels;
    layers::max_pool_kernels(cpu_isa(), Scalar::f32).row(rows_, s_.pitch(), p, y, whole ? out : maxima_, nullptr, columns_);
    if (!whole) store(maxima_, out);
  }

  void store(const float* row, float* out) const {
    const int64_t width = s_.out_width(), n = s_.sizes.out_channels, pitch = s_.pitch();
    if (!s_.rows) return k_.turn(row, width, pitch, n, out, s_.out_height() * width);
    for (int64_t w = 0; w < width; ++w) std::copy_n(row + w * pitch, n, out + w * n);
  }

  // Lines [first, last) of the convolution, which come after those that were asked for before; four at a time, some may be there.
  void make(int64_t first, int64_t last) {
    const int64_t row = s_.row(), pixel = s_.pitch(), width = s_.sizes.out_width * pixel;
    if (end_ == 0) made_ = end_ = first / StemTraits::tile * StemTraits::tile;
    while (end_ < last) {
      const int64_t kept = std::min(first, end_);
      std::copy(rows_ + (kept - made_) * row, rows_ + (end_ - made_) * row, rows_);
      made_ = kept;
      float* out = rows_ + (end_ - made_) * row;
      make_tiles(end_, out, row);
      const int64_t some = std::min<int64_t>(StemTraits::tile, s_.sizes.out_height - end_);
      // Windows that go on behind the last pixel see it again.
      for (int64_t l = 0; s_.pool && l < some; ++l)
        for (float* at = out + l * row + width; at < out + (l + 1) * row; at += pixel) std::copy_n(at - pixel, pixel, at);
      end_ += some;
    }
  }

  // Four lines from y on, `pitch` floats apart.
  void make_tiles(int64_t y, float* out, int64_t pitch) {
    transform(y * StemTraits::step - s_.padding[0]);
    k_.multiply(tiles_, s_.tiles, s_.weights, s_.panels, {bias_, s_.low, s_.high}, sums_, out, pitch);
  }

  // What the tiles that begin with the image's line `first` see.
  void transform(int64_t first) {
    const int64_t height = s_.sizes.height;
    next_ = std::max({next_, first, int64_t(0)});
    for (; next_ < std::min(first + StemTraits::lines, height); ++next_) transform_line(next_);
    const float* lines[StemTraits::lines];
    for (int64_t l = 0; l < StemTraits::lines; ++l)
      lines[l] = first + l < 0 || first + l >= height ? nothing_ : lines_ + (first + l) % StemTraits::lines * line_floats_;
    k_.transform_lines(lines, s_.tiles, tiles_);
  }

  void transform_line(int64_t h) {
    const int64_t room = s_.tiles.pixels() - s_.padding[1], count = std::min(s_.sizes.width, room), channels = s_.sizes.channels;
    float* line = line_ + s_.padding[1];
    std::fill_n(line_, s_.padding[1], 0.f);
    std::fill(line + count, line + room, 0.f);
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = x_ + c * s_.strides[1] + h * s_.strides[2];
      if (s_.strides[3] == 1)
        std::copy_n(from, count, line);
      else
        for (int64_t w = 0; w < count; ++w) line[w] = from[w * s_.strides[3]];
      k_.transform(line_, s_.tiles, channels * s_.tiles.pitch, apart_, lines_ + h % StemTraits::lines * line_floats_ + c * s_.tiles.pitch);
    }
  }

  const Stem& s_;
  const StemKernels& k_;
  const int64_t line_floats_;
  const float* x_ = nullptr;
  float *lines_, *nothing_, *line_, *apart_, *tiles_, *sums_, *bias_, *rows_, *maxima_, *columns_;
  int64_t next_ = 0;            // of the image's lines: those before are transformed
  int64_t made_ = 0, end_ = 0;  // of the convolution's lines: those that are in rows_
};

Tensor stem_conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& panels, IntArrayRef stride,
                       IntArrayRef padding, std::optional<double> low, std::optional<double> high, IntArrayRef window,
                       IntArrayRef window_stride, IntArrayRef window_padding) {
  const auto z = sizes<int64_t>(x.sizes(), weight, stride, padding);
  check(x, weight, bias, panels);
  const bool rows = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const Window pooled{window, window_stride, window_padding};
  const int64_t size[] = {z.batch, z.out_channels, z.out_height, z.out_width}, one[] = {1, 1};
  const auto pool = window.empty() ? std::nullopt : layers::pool_shape(size, window, window_stride, window_padding, one, false);
  // The kernels know a padded line by its outputs: what padding there is beyond them is not read.
  if (!stem_kernels() || z.batch == 0 || padding[1] > weight.size(3) || (!window.empty() && !pool))
    return plain(x, weight, bias, stride, padding, low, high, pooled);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const Tensor added = bias && bias->defined() ? bias->contiguous() : Tensor();
  Stem s{x.const_data_ptr<float>(),
         panels.const_data_ptr<float>(),
         {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
         z,
         {padding[0], padding[1]},
         StemSizes(weight.size(2), weight.size(3), z.channels, z.out_width),
         panels.size(0),
         added.defined() ? added.const_data_ptr<float>() : nullptr,
         float(low.value_or(-infinity)),
         float(high.value_or(infinity)),
         pool,
         nullptr,
         rows};
  const Tensor out = at::empty({z.batch, z.out_channels, s.out_height(), s.out_width()}, x.options(),
                               rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  s.out = out.mutable_data_ptr<float>();
  // A thread's first lines are made for it alone: it takes some tiles' at least.
  const int64_t lines = z.batch * s.out_height();
  at::parallel_for(0, lines, std::max<int64_t>(grain_of(1 << 16, s.row()), 2 * StemTraits::tile),
                   [&](int64_t begin, int64_t end) { StemRun(s, scratch_of_thread<Scratch>())(begin, end); });
  return out;
}

Tensor stem_conv2d_meta(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& panels, IntArrayRef stride,
                        IntArrayRef padding, std::optional<double>, std::optional<double>, IntArrayRef window, IntArrayRef window_stride,
                        IntArrayRef window_padding) {
  const auto z = sizes<c10::SymInt>(x.sym_sizes(), weight, stride, padding);
  check(x, weight, bias, panels);
  const bool rows = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const Tensor out = at::empty_symint({z.batch, z.out_channels, z.out_height, z.out_width}, x.options(),
                                      rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  return window.empty() ? out : at::max_pool2d(out, window, window_stride, window_padding);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("stem_conv2d", stem_conv2d_cpu); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("stem_conv2d", stem_conv2d_meta); }

}  // namespace quantize::packed
