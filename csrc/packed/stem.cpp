// stem_conv2d: CPU and Meta. Lines of outputs, one after the other: stem_kernels.h.
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
  int64_t kernel, stride, padding[2];
  StemLines lines;
  float* out;
  bool rows;  // out: channels last
  int64_t panels, pitch;
};

struct Scratch {
  std::vector<float> transformed, nothing, line, apart, sums, bias, row;
};

// Of one thread: it goes down the image, and keeps what the next line of outputs needs as well.
class StemRun {
 public:
  StemRun(const Stem& stem, const Tensor* bias, Scratch& scratch) : s_(stem), k_(*stem_kernels()), floats_(stem.lines.floats()) {
    const auto part = [](std::vector<float>& v, int64_t size) { return aligned(at_least(v, size + 16)); };
    transformed_ = part(scratch.transformed, s_.kernel * floats_);
    nothing_ = part(scratch.nothing, floats_);
    line_ = part(scratch.line, s_.lines.pixels());
    apart_ = part(scratch.apart, StemTraits::tile * StemTraits::step * (s_.lines.pitch + 16));
    sums_ = part(scratch.sums, k_.most_sums);
    bias_ = part(scratch.bias, s_.pitch);
    row_ = part(scratch.row, StemTraits::tile * s_.lines.tiles * s_.pitch);
    std::fill_n(nothing_, floats_, 0.f);
    std::fill_n(bias_, s_.pitch, 0.f);
    if (bias) std::copy_n(bias->const_data_ptr<float>(), s_.sizes.out_channels, bias_);
  }

  // Lines [begin, end) of all samples' outputs.
  void operator()(int64_t begin, int64_t end) {
    const int64_t height = s_.sizes.out_height, width = s_.sizes.out_width, n = s_.sizes.out_channels;
    const bool whole = s_.rows && s_.pitch == n && width % StemTraits::tile == 0;  // what is written is no more than a line
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / height, y = i % height;
      if (i == begin || y == 0) next_ = 0, x_ = s_.x + sample * s_.strides[0];
      float* to = s_.out + (s_.rows ? i * width * n : sample * n * height * width + y * width);
      multiply(y, whole ? to : row_);
      if (whole) continue;
      if (!s_.rows)
        k_.turn(row_, width, s_.pitch, n, to, height * width);
      else
        for (int64_t w = 0; w < width; ++w) std::copy_n(row_ + w * s_.pitch, n, to + w * n);
    }
  }

 private:
  void multiply(int64_t y, float* to) {
    const int64_t first = y * s_.stride - s_.padding[0], height = s_.sizes.height;
    next_ = std::max({next_, first, int64_t(0)});
    for (; next_ < std::min(first + s_.kernel, height); ++next_) transform(next_);
    const float* lines[StemTraits::most_lines];
    for (int64_t l = 0; l < s_.kernel; ++l)
      lines[l] = first + l < 0 || first + l >= height ? nothing_ : transformed_ + (first + l) % s_.kernel * floats_;
    k_.multiply(lines, s_.lines, s_.weights, bias_, s_.panels, sums_, to);
  }

  void transform(int64_t h) {
    const int64_t room = s_.lines.pixels() - s_.padding[1], count = std::min(s_.sizes.width, room), channels = s_.sizes.channels;
    float* line = line_ + s_.padding[1];
    std::fill_n(line_, s_.padding[1], 0.f);
    std::fill(line + count, line + room, 0.f);
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = x_ + c * s_.strides[1] + h * s_.strides[2];
      if (s_.strides[3] == 1)
        std::copy_n(from, count, line);
      else
        for (int64_t w = 0; w < count; ++w) line[w] = from[w * s_.strides[3]];
      k_.transform(line_, s_.lines, channels * s_.lines.pitch, apart_, transformed_ + h % s_.kernel * floats_ + c * s_.lines.pitch);
    }
  }

  const Stem& s_;
  const StemKernels& k_;
  const int64_t floats_;
  const float* x_ = nullptr;
  float *transformed_, *nothing_, *line_, *apart_, *sums_, *bias_, *row_;
  int64_t next_ = 0;  // of the image's lines: those before are transformed
};

Tensor stem_conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& panels, IntArrayRef stride,
                       IntArrayRef padding) {
  const auto z = sizes<int64_t>(x.sizes(), weight, stride, padding);
  check(x, weight, bias, panels);
  const bool rows = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  // The kernels know a padded line by its outputs: what padding there is beyond them is not read.
  if (!stem_kernels() || z.batch == 0 || padding[1] > weight.size(3)) return at::conv2d(x, weight, bias, stride, padding);
  const int64_t kernel = weight.size(2), n = z.out_channels;
  const Tensor out =
      at::empty({z.batch, n, z.out_height, z.out_width}, x.options(), rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const Stem s{x.const_data_ptr<float>(),
               panels.const_data_ptr<float>(),
               {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
               z,
               kernel,
               stride[0],
               {padding[0], padding[1]},
               StemLines(kernel, weight.size(3), z.channels, z.out_width),
               out.mutable_data_ptr<float>(),
               rows,
               panels.size(0),
               panels.size(0) * StemTraits::columns};
  const Tensor added = bias && bias->defined() ? bias->contiguous() : Tensor();
  const int64_t lines = z.batch * z.out_height;
  at::parallel_for(0, lines, grain_of(1 << 16, z.out_width * n), [&](int64_t begin, int64_t end) {
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
