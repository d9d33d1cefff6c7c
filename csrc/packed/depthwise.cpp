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
constexpr int64_t most_floats = 1 << 15;  // of levels: so that they stay in a second-level cache
constexpr int64_t grain = 1 << 15;        // products

int64_t chunks_of(int64_t channels) { return (channels + lanes - 1) / lanes; }

struct Scratch {
  std::vector<float> levels, line, weights, sums;
  std::vector<int64_t> offsets;
};

class Run {
 public:
  Run(const ConvShape& shape, bool rows, const Activation& activation, const float* panels, const Epilogue& epilogue, const Then& then)
      : s_(shape),
        g_(shape.sizes),
        rows_(rows),
        activation_(activation),
        panels_(panels),
        then_(then),
        multiplier_(g_.out_channels / g_.channels),
        padded_(chunks_of(g_.channels) * lanes),
        gain_(multiplier_ * padded_),
        bias_(multiplier_ * padded_),
        input_{g_.height, g_.width},
        output_{g_.out_height, g_.out_width},
        channels_(group_channels()),
        block_(block_rows()),
        units_(units(block_)) {
    for (int64_t r = 0; r < s_.kernel[0]; ++r)
      for (int64_t c = 0; c < s_.kernel[1]; ++c)
        offsets_.push_back(rows_ ? units_.at(c * s_.dilation[1]) : units_.at(r * s_.dilation[0], c * s_.dilation[1]));
    constexpr int64_t most = Epilogue::Part::most;
    for (int64_t first = 0; first < g_.out_channels; first += most) {
      const int64_t count = std::min(most, g_.out_channels - first);
      const Epilogue::Part part(epilogue, first, count);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = first + i, at = n % multiplier_ * padded_ + n / multiplier_;
        gain_[at] = part.gain[i], bias_[at] = part.bias[i];
      }
    }
  }

  // x: floats, or codes.
  template <typename T>
  void operator()(const T* x, float* out) const {
    const int64_t groups = rows_ ? (g_.channels + channels_ - 1) / channels_ : g_.channels, blocks = (output_[0] + block_ - 1) / block_;
    const int64_t products = block_ * output_[1] * taps() * multiplier_ * (rows_ ? channels_ : 1);
    at::parallel_for(0, g_.batch * groups * blocks, grain_of(grain, products), [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / blocks % groups, first = item % blocks * block_, many = std::min(block_, output_[0] - first);
        const int64_t sample = item / blocks / groups;
        if (rows_) {
          pixels(x, sample, group * channels_, first, many, out, scratch);
          continue;
        }
        if constexpr (std::is_same_v<T, float>) plane(x, sample, group, first, many, out, scratch);
      }
    });
  }

 private:
  int64_t taps() const { return s_.kernel[0] * s_.kernel[1]; }

  Units units(int64_t rows) const {
    return Units(input_, output_, s_.kernel.data(), s_.stride.data(), s_.padding.data(), s_.dilation.data(), rows);
  }

  // Rows of a window, those between its taps too.
  int64_t window_rows() const { return (s_.kernel[0] - 1) * s_.dilation[0] + 1; }

  // Of pixels, how many channels go through the rows together.
  int64_t group_channels() const {
    const int64_t chunks = std::max<int64_t>(1, most_floats / (window_rows() * units(1).chunk()));
    return std::min(chunks * lanes, padded_);
  }

  // Rows of a block, which share a window's with the next: of planes as many as the cache holds; of pixels all, if that leaves no thread
  // without work.
  int64_t block_rows() const {
    const int64_t least = 2 * (window_rows() - 1) / s_.stride[0] + 1;
    int64_t blocks;
    if (rows_) {
      const int64_t items = std::max<int64_t>(1, g_.batch * ((g_.channels + channels_ - 1) / channels_));
      blocks = std::min((2 * at::get_num_threads() + items - 1) / items, output_[0] / least);
    } else {
      const int64_t fit = std::max((most_floats / units(1).extent[1] - window_rows()) / s_.stride[0] + 1, least);
      blocks = (output_[0] + fit / 2) / fit;
    }
    blocks = std::max<int64_t>(1, blocks);
    return (output_[0] + blocks - 1) / blocks;
  }

  void plane(const float* x, int64_t sample, int64_t channel, int64_t first, int64_t many, float* out, Scratch& scratch) const {
    float *levels = at_least(scratch.levels, units_.count()), *line = at_least(scratch.line, units_.extent[1] + lanes);
    kernels_.fill_plane(x + (sample * g_.channels + channel) * g_.height * g_.width, units_, first, activation_.range, levels, line);
    // The windows between the last of a row and the first of the next are summed too, and left out.
    const int64_t vectors = ((many - 1) * units_.pitch() + output_[1] + lanes - 1) / lanes;
    float *sums = at_least(scratch.sums, (vectors + 1) * lanes), *weights = at_least(scratch.weights, taps() * lanes);
    for (int64_t k = 0; k < multiplier_; ++k) {
      for (int64_t t = 0; t < taps(); ++t) std::fill_n(weights + t * lanes, lanes, panels_[(k * taps() + t) * padded_ + channel]);
      float gain[lanes], bias[lanes];
      std::fill_n(gain, lanes, gain_[k * padded_ + channel]), std::fill_n(bias, lanes, bias_[k * padded_ + channel]);
      kernels_.sum(levels, vectors, offsets_.data(), taps(), weights, lanes, gain, bias, sums, lanes, lanes);
      const int64_t n = channel * multiplier_ + k;
      float* target = out + ((sample * g_.out_channels + n) * output_[0] + first) * output_[1];
      kernels_.copy_rows(sums, units_.pitch(), many, output_[1], target);
      clip(target, 1, 0, many * output_[1]);
    }
  }

  // Of the channels from `channel` on. A window's rows are kept, each in the place of one that no window needs any more.
  template <typename T>
  void pixels(const T* x, int64_t sample, int64_t channel, int64_t first, int64_t many, float* out, Scratch& scratch) const {
    const int64_t pixel = std::is_same_v<T, float> ? g_.channels : (g_.channels + 3) / 4 * 4;
    const int64_t count = std::min(channels_, g_.channels - channel), image = g_.height * g_.width * pixel;
    const int64_t row = chunks_of(count) * units_.chunk(), rows = window_rows();
    float* levels = aligned(at_least(scratch.levels, rows * row + lanes));
    int64_t* offsets = at_least(scratch.offsets, taps());
    const T* source = x + sample * image;
    int64_t next = first * s_.stride[0];  // counted from the padding on
    for (int64_t h = first; h < first + many; ++h) {
      const int64_t top = h * s_.stride[0];
      for (next = std::max(next, top); next < top + rows; ++next) {
        const int64_t y = next - s_.padding[0];
        const T* from = y < 0 || y >= g_.height ? nullptr : source + y * g_.width * pixel + channel;
        float* to = levels + next % rows * row;
        if constexpr (std::is_same_v<T, float>)
          kernels_.fill_row(from, source + image, pixel, count, units_, activation_.range, to);
        else
          kernels_.fill_row_of_codes(from, source + image, pixel, count, units_, float(activation_.zero_point), to);
      }
      for (int64_t r = 0, t = 0; r < s_.kernel[0]; ++r) {
        const int64_t begin = (top + r * s_.dilation[0]) % rows * row;
        for (int64_t c = 0; c < s_.kernel[1]; ++c, ++t) offsets[t] = begin + offsets_[t];
      }
      const int64_t place = (sample * output_[0] + h) * output_[1];
      for (int64_t c = 0; c < count; c += lanes)
        for (int64_t k = 0; k < multiplier_; ++k)
          sum_row(levels + c / lanes * units_.chunk(), offsets, channel + c, std::min(lanes, count - c), k, out, place, scratch);
    }
  }

  // Output k of `count` channels from c on, of all pixels of a row.
  void sum_row(const float* levels, const int64_t* offsets, int64_t c, int64_t count, int64_t k, float* out, int64_t place,
               Scratch& scratch) const {
    const float *weights = panels_ + k * taps() * padded_ + c, *gain = &gain_[k * padded_ + c], *bias = &bias_[k * padded_ + c];
    if (multiplier_ == 1 && !then_.codes) {
      float* target = out + place * g_.out_channels + c;
      kernels_.sum(levels, output_[1], offsets, taps(), weights, padded_, gain, bias, target, g_.out_channels, count);
      return clip(target, output_[1], g_.out_channels, count);
    }
    if (then_.codes)
      return kernels_.sum_codes(levels, output_[1], offsets, taps(), weights, padded_, gain, bias, then_.range, then_.zero_point,
                                then_.codes + place * then_.pixel + c, then_.pixel, count);
    float* sums = at_least(scratch.sums, output_[1] * lanes);
    kernels_.sum(levels, output_[1], offsets, taps(), weights, padded_, gain, bias, sums, lanes, lanes);
    clip(sums, 1, 0, output_[1] * lanes);
    for (int64_t w = 0; w < output_[1]; ++w)
      for (int64_t l = 0; l < count; ++l) out[(place + w) * g_.out_channels + (c + l) * multiplier_ + k] = sums[w * lanes + l];
  }

  void clip(float* out, int64_t lines, int64_t stride, int64_t length) const {
    if (then_.changes()) image_kernels().add_and_clip(out, nullptr, lines, stride, length, then_.low, then_.high);
  }

  const ConvShape& s_;
  const Geometry<int64_t>& g_;
  const bool rows_;
  const Activation activation_;
  const float* panels_;
  const Then then_;
  const int64_t multiplier_, padded_;  // padded_: the channels, in whole chunks
  std::vector<float> gain_, bias_;     // as the panels lie: [multiplier, channels]
  const int64_t input_[2], output_[2], channels_, block_;
  const Units units_;             // of each block: the last one's go beyond the image
  std::vector<int64_t> offsets_;  // of the taps; of pixels, in their row
  const DepthwiseKernels& kernels_ = depthwise_kernels();
};

}  // namespace

void conv2d_of_channels(const char* op, const at::Tensor& x, const ConvShape& shape, bool rows, const Activation& activation,
                        const at::Tensor& panels, const Epilogue& epilogue, float* out, const Then& then) {
  const Geometry<int64_t>& g = shape.sizes;
  const int64_t taps = shape.kernel[0] * shape.kernel[1];
  TORCH_CHECK_VALUE(shape.groups == g.channels && taps <= Traits::most_taps, op, ": groups must be the channels, ", g.channels,
                    ", and taps at most ", Traits::most_taps, " where panels are floats; got ", shape.groups, " and ", taps);
  const int64_t sizes[] = {g.out_channels / g.channels, taps, chunks_of(g.channels) * lanes};
  TORCH_CHECK_VALUE(panels.sizes() == at::IntArrayRef(sizes) && panels.is_contiguous(), op, ": panels must be contiguous ",
                    at::IntArrayRef(sizes), "; got ", panels.sizes());
  if (g.batch == 0) return;
  const Run run(shape, rows, activation, panels.const_data_ptr<float>(), epilogue, then);
  if (x.scalar_type() == at::kFloat)
    run(x.const_data_ptr<float>(), out);
  else
    run(x.const_data_ptr<uint8_t>(), out);
}

}  // namespace quantize::packed
