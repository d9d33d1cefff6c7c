// The way of a block of pixels: levels, words of bits, nibbles, counts of each pair of planes, outputs. Kernels: binary_kernels.h.
#include "bit_planes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "binary_kernels.h"
#include "panels.h"
#include "scratch.h"

namespace quantize::packed {
namespace {

constexpr int64_t quad = BinaryTraits::quad, slack = BinaryTraits::slack;

struct Scratch {
  std::vector<uint64_t> words;
  std::vector<uint8_t> nibbles, index;
  alignas(64) int32_t counts[BinaryTraits::channels * BinaryTraits::stride], more[BinaryTraits::channels * BinaryTraits::stride];
};

constexpr int32_t no_base[BinaryTraits::block] = {};

class Run {
 public:
  Run(const ConvShape& shape, bool rows, const weight::LsqRange& range, int64_t input_planes, int64_t weight_planes, const uint8_t* panels)
      : s_(shape),
        g_(shape.sizes),
        rows_(rows),
        range_(range),
        input_planes_(int(input_planes)),
        weight_planes_(int(weight_planes)),
        panels_(panels),
        kernels_(binary_kernels()) {
    for (int d = 0; d < 2; ++d) window_.kernel[d] = s_.kernel[d], window_.stride[d] = s_.stride[d], window_.dilation[d] = s_.dilation[d];
    window_.channels = g_.channels / s_.groups;
    window_.width = g_.width + 2 * s_.padding[1], window_.plane = window_.width * (g_.height + 2 * s_.padding[0]);
    window_.out_width = g_.out_width;
    image_ = window_.plane * ((window_.channels + quad - 1) / quad);
    quads_ = (taps() * window_.channels + quad - 1) / quad;
  }

  int64_t image() const { return image_; }
  int64_t quads() const { return quads_; }
  int64_t length() const { return taps() * window_.channels; }

  // What counts lack to dots: popcounts of the weights (binary_dot), from the sums of their levels.
  std::vector<int32_t> shifts(const int32_t* sums) const {
    std::vector<int32_t> shift(g_.out_channels);
    const int32_t inputs = (1 << input_planes_) - 1, weights = (1 << weight_planes_) - 1;
    for (int64_t n = 0; n < g_.out_channels; ++n) shift[n] = -inputs * ((int32_t(length()) * weights - sums[n]) / 2);
    return shift;
  }

  void operator()(const float* x, const int32_t* shift, const float* gain, const float* bias, float* out) {
    const int64_t samples = g_.batch * s_.groups, pixels = g_.out_height * g_.out_width, block = kernels_.lookup_block;
    std::vector<uint8_t> images(samples * input_planes_ * image_ + slack);  // zeros, as padding is
    fill_images(x, images.data());
    const int64_t blocks = (pixels + block - 1) / block, all = g_.out_channels / s_.groups;
    // Where blocks are too few for the threads, channels are shared out as well.
    const int64_t sixteens = (all + BinaryTraits::channels - 1) / BinaryTraits::channels;
    const int64_t shares = std::clamp<int64_t>((2 * at::get_num_threads() - 2) / (samples * blocks), 1, sixteens);
    const int64_t share = (sixteens + shares - 1) / shares * BinaryTraits::channels;
    at::parallel_for(0, samples * blocks * shares, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % shares * share, last = std::min(first + share, all), at = item / shares;
        const int64_t sample = at / blocks, start = at % blocks * block, count = std::min(block, pixels - start);
        if (first >= last) continue;
        const uint8_t* index = gather(images.data() + sample * input_planes_ * image_, start, count, scratch);
        for (int64_t c = first; c < last; c += BinaryTraits::channels) {
          const int many = int(std::min<int64_t>(BinaryTraits::channels, last - c));
          const int64_t group = sample % s_.groups, n = group * all + c, item = sample / s_.groups;
          multiply(index, group, c, many, count, scratch);
          float* target = out + (rows_ ? (item * pixels + start) * g_.out_channels + n : (item * g_.out_channels + n) * pixels + start);
          kernels_.finish_floats(scratch.counts, many, count, {true, no_base, shift + n}, gain + n, bias + n, target, nullptr,
                                 rows_ ? 1 : pixels, rows_ ? g_.out_channels : 1);
        }
      }
    });
  }

 private:
  int64_t taps() const { return s_.kernel[0] * s_.kernel[1]; }

  // Planes of nibbles of each sample and group, in padded images.
  void fill_images(const float* x, uint8_t* images) const {
    const int64_t pixels = g_.height * g_.width, stride = (pixels + 31) / 32 * 32, planes = (window_.channels + 63) / 64;
    at::parallel_for(0, g_.batch * s_.groups * planes, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      uint64_t* words = at_least(scratch.words, most_planes * stride);
      uint8_t* flat = at_least(scratch.nibbles, 64 / quad * stride);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t sample = item / planes, first = item % planes * 64, channel = sample % s_.groups * window_.channels + first;
        const int many = int(std::min<int64_t>(64, window_.channels - first)), lines = int((many + quad - 1) / quad);
        const float* source = x + sample / s_.groups * g_.channels * pixels;
        if (rows_)
          kernels_.pack_level_rows(source + channel, g_.channels, pixels, many, range_, words, words + stride);
        else
          kernels_.pack_level_planes(source + channel * pixels, pixels, many, range_, words, words + stride);
        for (int plane = 0; plane < input_planes_; ++plane) {
          kernels_.index(words + plane * stride, pixels, lines, flat, stride);
          uint8_t* image = images + (sample * input_planes_ + plane) * image_ + first / quad * window_.plane;
          for (int i = 0; i < lines; ++i)
            for (int64_t h = 0; h < g_.height; ++h)
              std::copy_n(flat + i * stride + h * g_.width, g_.width,
                          image + i * window_.plane + (h + s_.padding[0]) * window_.width + s_.padding[1]);
        }
      }
    });
  }

  const uint8_t* gather(const uint8_t* images, int64_t start, int64_t count, Scratch& scratch) const {
    const int64_t one = quads_ * kernels_.lookup_block + slack;
    uint8_t* index = at_least(scratch.index, input_planes_ * one);
    for (int plane = 0; plane < input_planes_; ++plane)
      kernels_.gather_index(images + plane * image_, window_, start, count, index + plane * one, kernels_.lookup_block);
    return index;
  }

  // counts of up to 16 channels of a group: c is the first.
  void multiply(const uint8_t* index, int64_t group, int64_t c, int many, int64_t count, Scratch& scratch) const {
    const int64_t one = quads_ * kernels_.lookup_block + slack, fours = (g_.out_channels / s_.groups + quad - 1) / quad;
    for (int j = 0; j < weight_planes_; ++j)
      for (int i = 0; i < input_planes_; ++i) {
        const uint8_t* nibbles = panels_ + ((j * s_.groups + group) * fours + c / quad) * quads_ * quad;
        int32_t* counts = i + j ? scratch.more : scratch.counts;
        kernels_.lookup(index + i * one, kernels_.lookup_block, quads_, count, nibbles, int((many + quad - 1) / quad), counts);
        if (i + j == 0) continue;
        for (int k = 0; k < many; ++k)
          for (int64_t p = 0; p < count; ++p)
            scratch.counts[k * BinaryTraits::stride + p] += scratch.more[k * BinaryTraits::stride + p] << (i + j);
      }
  }

  const ConvShape& s_;
  const Geometry<int64_t>& g_;
  const bool rows_;
  const weight::LsqRange range_;
  const int input_planes_, weight_planes_;
  const uint8_t* panels_;
  const BinaryKernels& kernels_;
  BinaryWindow window_;
  int64_t image_, quads_;  // bytes of a plane of a group's image
};

}  // namespace

void conv2d_of_bit_planes(const char* op, const at::Tensor& x, const ConvShape& shape, bool rows, const weight::LsqRange& range,
                          int64_t input_planes, const at::Tensor& panels, const at::Tensor& sums, const at::Tensor& scales,
                          const std::optional<at::Tensor>& bias, const at::Tensor& out) {
  const Geometry<int64_t>& g = shape.sizes;
  const int64_t weight_planes = panels.size(0), n = g.out_channels, fours = (n / shape.groups + quad - 1) / quad;
  check_dtype(op, "panels", panels, at::kByte);
  TORCH_CHECK_VALUE(binary_kernels().lookup, op, ": panels of bit planes are for AVX2 and AVX-512; this is ", isa_name(cpu_isa()));
  TORCH_CHECK_VALUE(input_planes <= most_planes && range.low == 0, op,
                    ": activation_bits must be at most 2 and zero_point 0 where panels are bit planes; got ", input_planes, " and ",
                    -range.low);
  TORCH_CHECK_VALUE(shape.kernel[0] * shape.kernel[1] == 1 || g.channels / shape.groups % quad == 0, op,
                    ": x must have channels in fours where panels are bit planes; got ", x.sizes());
  Run run(shape, rows, range, input_planes, weight_planes, panels.const_data_ptr<uint8_t>());
  const int64_t sizes[] = {weight_planes, shape.groups, fours, run.quads(), quad};
  TORCH_CHECK_VALUE(
      weight_planes >= 1 && weight_planes <= most_planes && panels.sizes() == at::IntArrayRef(sizes) && panels.is_contiguous(), op,
      ": panels must be one or two planes of contiguous ", at::IntArrayRef(sizes).slice(1), "; got ", panels.sizes());
  TORCH_CHECK_VALUE(run.length() < int64_t(1) << 26, op, ": codes must have rows of less than 2^26 levels; got ", run.length());
  TORCH_CHECK_VALUE(run.image() < int64_t(1) << 31, op, ": x must have samples of less than 2 GiB in nibbles; got ", x.sizes());
  const Epilogue epilogue(op, scales, bias, sums, range.step, 0);
  if (out.numel() == 0) return;
  std::vector<float> gain(n), added(n);
  for (int64_t first = 0; first < n; first += Epilogue::Part::most) {
    const int64_t count = std::min(Epilogue::Part::most, n - first);
    const Epilogue::Part part(epilogue, first, count);
    std::copy_n(part.gain, count, &gain[first]), std::copy_n(part.bias, count, &added[first]);
  }
  run(x.const_data_ptr<float>(), run.shifts(sums.const_data_ptr<int32_t>()).data(), gain.data(), added.data(), out.data_ptr<float>());
}

}  // namespace quantize::packed
