#include "depthwise.h"

#include <ATen/Parallel.h>

#include "../core/checks.h"
#include "../core/grain.h"
#include "depthwise_kernels.h"
#include "scratch.h"

namespace quantize::packed {
namespace {

using Traits = DepthwiseTraits;

constexpr int64_t lanes = Traits::lanes;
constexpr int64_t most_floats = 1 << 15;  // of a block's levels, so that a second-level cache holds them
constexpr int64_t grain = 1 << 15;        // products

struct Scratch {
  std::vector<float> levels, line, weights, sums;
  float gain[lanes], bias[lanes];
};

class Run {
 public:
  Run(const ConvShape& shape, bool rows, const weight::LsqRange& range, const float* panels, const Epilogue& epilogue)
      : s_(shape),
        g_(shape.sizes),
        rows_(rows),
        range_(range),
        panels_(panels),
        gain_(g_.out_channels),
        bias_(g_.out_channels),
        input_{g_.height, g_.width},
        output_{g_.out_height, g_.out_width},
        multiplier_(g_.out_channels / g_.channels),
        block_(block_rows()),
        units_(units(block_)) {
    for (int64_t r = 0; r < s_.kernel[0]; ++r)
      for (int64_t c = 0; c < s_.kernel[1]; ++c)
        offsets_.push_back(units_.at(r * s_.dilation[0], c * s_.dilation[1]) * (rows_ ? lanes : 1));
    constexpr int64_t most = Epilogue::Part::most;
    for (int64_t n = 0; n < g_.out_channels; n += most) {
      const int64_t count = std::min(most, g_.out_channels - n);
      const Epilogue::Part part(epilogue, n, count);
      std::copy_n(part.gain, count, &gain_[n]), std::copy_n(part.bias, count, &bias_[n]);
    }
  }

  void operator()(const float* x, float* out) const {
    const int64_t chunks = rows_ ? (g_.channels + lanes - 1) / lanes : g_.channels, blocks = (output_[0] + block_ - 1) / block_;
    const int64_t products = block_ * output_[1] * taps() * multiplier_ * (rows_ ? lanes : 1);
    at::parallel_for(0, g_.batch * chunks * blocks, grain_of(grain, products), [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % blocks * block_, many = std::min(block_, output_[0] - first), channel = item / blocks % chunks;
        const int64_t sample = item / blocks / chunks;
        if (rows_)
          pixels(x, sample, channel * lanes, first, many, out, scratch);
        else
          plane(x, sample, channel, first, many, out, scratch);
      }
    });
  }

 private:
  int64_t taps() const { return s_.kernel[0] * s_.kernel[1]; }

  Units units(int64_t rows) const {
    return Units(input_, output_, s_.kernel.data(), s_.stride.data(), s_.padding.data(), s_.dilation.data(), rows);
  }

  // Rows of a block, not fewer than those that it shares with the next: as many in each.
  int64_t block_rows() const {
    const int64_t most = most_floats / (rows_ ? lanes : 1), columns = units(1).extent[1], shared = (s_.kernel[0] - 1) * s_.dilation[0];
    const int64_t fit = std::max((most / columns - shared) / s_.stride[0], shared / s_.stride[0] + 1);
    const int64_t blocks = std::max<int64_t>(1, (output_[0] + fit / 2) / fit);
    return (output_[0] + blocks - 1) / blocks;
  }

  // What the lanes are multiplied by: all of output channel n.
  void set_lanes(int64_t n, Scratch& scratch) const {
    float* weights = at_least(scratch.weights, taps() * lanes);
    for (int64_t t = 0; t < taps(); ++t) std::fill_n(weights + t * lanes, lanes, panels_[t * g_.out_channels + n]);
    std::fill_n(scratch.gain, lanes, gain_[n]), std::fill_n(scratch.bias, lanes, bias_[n]);
  }

  // Or `count` of them of channels n, n + multiplier and so on; the rest is zero.
  void set_lanes(int64_t n, int64_t count, Scratch& scratch) const {
    float* weights = at_least(scratch.weights, taps() * lanes);
    std::fill_n(weights, taps() * lanes, 0.f);
    std::fill_n(scratch.gain, lanes, 0.f), std::fill_n(scratch.bias, lanes, 0.f);
    for (int64_t l = 0; l < count; ++l, n += multiplier_) {
      for (int64_t t = 0; t < taps(); ++t) weights[t * lanes + l] = panels_[t * g_.out_channels + n];
      scratch.gain[l] = gain_[n], scratch.bias[l] = bias_[n];
    }
  }

  void sum(const float* levels, int64_t vectors, const Scratch& scratch, float* out, int64_t stride, int64_t count) const {
    kernels_.sum(levels, vectors, offsets_.data(), taps(), scratch.weights.data(), scratch.gain, scratch.bias, out, stride, count);
  }

  void plane(const float* x, int64_t sample, int64_t channel, int64_t first, int64_t many, float* out, Scratch& scratch) const {
    float *levels = at_least(scratch.levels, units_.count()), *line = at_least(scratch.line, units_.extent[1] + lanes);
    kernels_.fill_plane(x + (sample * g_.channels + channel) * g_.height * g_.width, units_, first, range_, levels, line);
    // The windows between the last of a row and the first of the next are summed too, and left out.
    const int64_t vectors = ((many - 1) * units_.pitch() + output_[1] + lanes - 1) / lanes;
    float* sums = at_least(scratch.sums, vectors * lanes + lanes);
    for (int64_t n = channel * multiplier_; n < (channel + 1) * multiplier_; ++n) {
      set_lanes(n, scratch);
      sum(levels, vectors, scratch, sums, lanes, lanes);
      float* target = out + ((sample * g_.out_channels + n) * output_[0] + first) * output_[1];
      kernels_.copy_rows(sums, units_.pitch(), many, output_[1], target);
    }
  }

  // Of the sixteen channels from `channel` on, or what is left.
  void pixels(const float* x, int64_t sample, int64_t channel, int64_t first, int64_t many, float* out, Scratch& scratch) const {
    const int64_t count = std::min(lanes, g_.channels - channel), image = g_.height * g_.width * g_.channels;
    float *levels = at_least(scratch.levels, units_.count() * lanes), *sums = at_least(scratch.sums, output_[1] * lanes);
    const float* source = x + sample * image;
    kernels_.fill_pixels(source + channel, source + image, g_.channels, units_, first, range_, levels);
    for (int64_t k = 0; k < multiplier_; ++k) {
      const int64_t n = channel * multiplier_ + k;
      set_lanes(n, count, scratch);
      for (int64_t h = 0; h < many; ++h) {
        const float* row = levels + h * units_.pitch() * lanes;
        float* target = out + (sample * output_[0] + first + h) * output_[1] * g_.out_channels + n;
        if (multiplier_ == 1) {
          sum(row, output_[1], scratch, target, g_.out_channels, count);
          continue;
        }
        sum(row, output_[1], scratch, sums, lanes, lanes);
        for (int64_t w = 0; w < output_[1]; ++w)
          for (int64_t l = 0; l < count; ++l) target[w * g_.out_channels + l * multiplier_] = sums[w * lanes + l];
      }
    }
  }

  const ConvShape& s_;
  const Geometry<int64_t>& g_;
  const bool rows_;
  const LsqRange range_;
  const float* panels_;
  std::vector<float> gain_, bias_;
  const int64_t input_[2], output_[2], multiplier_, block_;
  const Units units_;             // of each block: the last one's go beyond the image
  std::vector<int64_t> offsets_;  // of the taps, in floats
  const DepthwiseKernels& kernels_ = depthwise_kernels();
};

}  // namespace

void conv2d_of_channels(const char* op, const at::Tensor& x, const ConvShape& shape, bool rows, const weight::LsqRange& range,
                        const at::Tensor& panels, const Epilogue& epilogue, const at::Tensor& out) {
  const Geometry<int64_t>& g = shape.sizes;
  const int64_t sizes[] = {shape.kernel[0] * shape.kernel[1], g.out_channels};
  check_dtype(op, "panels", panels, at::kFloat);
  TORCH_CHECK_VALUE(shape.groups == g.channels && sizes[0] <= Traits::most_taps, op, ": groups must be the channels, ", g.channels,
                    ", and taps at most ", Traits::most_taps, " where panels are floats; got ", shape.groups, " and ", sizes[0]);
  TORCH_CHECK_VALUE(panels.sizes() == at::IntArrayRef(sizes) && panels.is_contiguous(), op, ": panels must be contiguous ",
                    at::IntArrayRef(sizes), "; got ", panels.sizes());
  if (out.numel() == 0) return;
  Run(shape, rows, range, panels.const_data_ptr<float>(), epilogue)(x.const_data_ptr<float>(), out.mutable_data_ptr<float>());
}

}  // namespace quantize::packed
