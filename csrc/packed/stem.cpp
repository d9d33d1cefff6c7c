// stem_conv2d: CPU and Meta. Lines of tiles, one after the other: stem_kernels.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

#include "../core/grain.h"
#include "scratch.h"
#include "stem_call.h"
#include "stem_kernels.h"

namespace quantize::packed {
namespace {

using at::IntArrayRef;
using at::Tensor;
using namespace stem_call;

struct Stem {
  const float *x, *weights;
  int64_t strides[4];  // of x
  Geometry<int64_t> sizes;
  int64_t padding[2];
  StemSizes tiles;
  float* out;
  bool rows;  // out: channels last
  int64_t panels, pitch;

  int64_t down() const { return (sizes.out_height + StemTraits::tile - 1) / StemTraits::tile; }  // lines of tiles
};

struct Scratch {
  std::vector<float> lines, nothing, line, apart, tiles, sums, bias, rows;
};

// Of one thread: it goes down the image, and keeps the transformed lines that the next tiles see as well.
class StemRun {
 public:
  StemRun(const Stem& stem, const Tensor* bias, Scratch& scratch) : s_(stem), k_(*stem_kernels()), line_floats_(stem.tiles.line()) {
    const auto part = [](std::vector<float>& v, int64_t size) { return aligned(at_least(v, size + 16)); };
    lines_ = part(scratch.lines, StemTraits::lines * line_floats_);
    nothing_ = part(scratch.nothing, line_floats_);
    line_ = part(scratch.line, s_.tiles.pixels());
    apart_ = part(scratch.apart, StemTraits::tile * StemTraits::step * (s_.tiles.pitch + 16));
    tiles_ = part(scratch.tiles, 2 * StemTraits::points * line_floats_);
    sums_ = part(scratch.sums, k_.most_sums);
    bias_ = part(scratch.bias, s_.pitch);
    rows_ = part(scratch.rows, StemTraits::tile * row());
    std::fill_n(nothing_, line_floats_, 0.f);
    std::fill_n(bias_, s_.pitch, 0.f);
    if (bias) std::copy_n(bias->const_data_ptr<float>(), s_.sizes.out_channels, bias_);
  }

  // Lines of tiles [begin, end) of all samples.
  void operator()(int64_t begin, int64_t end) {
    const int64_t height = s_.sizes.out_height, width = s_.sizes.out_width, n = s_.sizes.out_channels, down = s_.down();
    const bool whole = s_.rows && s_.pitch == n && width % StemTraits::tile == 0;  // what is written is no more than a line
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / down, y = i % down * StemTraits::tile, some = std::min<int64_t>(StemTraits::tile, height - y);
      if (i == begin || y == 0) next_ = 0, x_ = s_.x + sample * s_.strides[0];
      transform(y * StemTraits::step - s_.padding[0]);
      float* out = s_.out + (s_.rows ? (sample * height + y) * width * n : (sample * n * height + y) * width);
      if (whole && some == StemTraits::tile) {
        k_.multiply(tiles_, s_.tiles, s_.weights, bias_, s_.panels, sums_, out, width * n);
        continue;
      }
      k_.multiply(tiles_, s_.tiles, s_.weights, bias_, s_.panels, sums_, rows_, row());
      for (int64_t l = 0; l < some; ++l) store(rows_ + l * row(), out + l * width * (s_.rows ? n : 1));
    }
  }

 private:
  int64_t row() const { return StemTraits::tile * s_.tiles.tiles * s_.pitch; }

  void store(const float* row, float* out) {
    const int64_t width = s_.sizes.out_width, n = s_.sizes.out_channels;
    if (!s_.rows) return k_.turn(row, width, s_.pitch, n, out, s_.sizes.out_height * width);
    for (int64_t w = 0; w < width; ++w) std::copy_n(row + w * s_.pitch, n, out + w * n);
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
  float *lines_, *nothing_, *line_, *apart_, *tiles_, *sums_, *bias_, *rows_;
  int64_t next_ = 0;  // of the image's lines: those before are transformed
};

Tensor stem_conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& panels, IntArrayRef stride,
                       IntArrayRef padding) {
  const auto z = sizes<int64_t>(x.sizes(), weight, stride, padding);
  check(x, weight, bias, panels);
  const bool rows = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  // The kernels know a padded line by its outputs: what padding there is beyond them is not read.
  if (!stem_kernels() || z.batch == 0 || padding[1] > weight.size(3)) return at::conv2d(x, weight, bias, stride, padding);
  const int64_t n = z.out_channels;
  const Tensor out =
      at::empty({z.batch, n, z.out_height, z.out_width}, x.options(), rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const Stem s{x.const_data_ptr<float>(),
               panels.const_data_ptr<float>(),
               {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
               z,
               {padding[0], padding[1]},
               StemSizes(weight.size(2), weight.size(3), z.channels, z.out_width),
               out.mutable_data_ptr<float>(),
               rows,
               panels.size(0),
               panels.size(0) * StemTraits::columns};
  const Tensor added = bias && bias->defined() ? bias->contiguous() : Tensor();
  at::parallel_for(0, z.batch * s.down(), grain_of(1 << 16, StemTraits::tile * z.out_width * n), [&](int64_t begin, int64_t end) {
    StemRun(s, added.defined() ? &added : nullptr, scratch_of_thread<Scratch>())(begin, end);
  });
  return out;
}

Tensor stem_conv2d_meta(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& panels, IntArrayRef stride,
                        IntArrayRef padding) {
  const auto z = sizes<c10::SymInt>(x.sym_sizes(), weight, stride, padding);
  check(x, weight, bias, panels);
  const bool rows = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return at::empty_symint({z.batch, z.out_channels, z.out_height, z.out_width}, x.options(),
                          rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("stem_conv2d", stem_conv2d_cpu); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("stem_conv2d", stem_conv2d_meta); }

}  // namespace quantize::packed
