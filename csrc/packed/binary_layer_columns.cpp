// A binary layer by columns of its weights: binary_columns.h.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <map>
#include <vector>

#include "binary_columns.h"
#include "binary_pass.h"
#include "image_kernels.h"
#include "scratch.h"

namespace quantize::packed {
namespace {

constexpr int64_t columns = ColumnTraits::columns, word_bits = 32;
constexpr int64_t fewest_pixels = 16;  // of a call: fewer are sooner counted than weights are turned
constexpr int32_t none[columns] = {};

struct Scratch {
  std::vector<uint64_t> words;
  std::vector<uint32_t> weights;
  alignas(64) int32_t sums[ColumnTraits::pixels * columns];
};

class ColumnRun : BinaryPass {
 public:
  ColumnRun(const BinaryLayer& layer, BinaryPrepared& prepared)
      : BinaryPass(layer, prepared),
        column_kernels_(*binary_column_kernels()),
        pixel_(layer.window.channels / word_bits),
        image_(layer.window.plane * pixel_),
        images_(prepared.images, layer.batch * layer.groups * image_ / 2 + 1) {}

  void operator()() {
    fill_images();
    find_runs();
    prepare_offsets();
    // A block of channels is an item, and its weights are turned once; lines are shared out as well where blocks are too few.
    const int64_t blocks = (l_.group_outputs() + columns - 1) / columns, lines = l_.batch * l_.out_height, outer = l_.groups * blocks;
    const int64_t shares = std::clamp<int64_t>((2 * at::get_num_threads() - 2) / outer, 1, lines), share = (lines + shares - 1) / shares;
    at::parallel_for(0, outer * shares, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / shares / blocks, c = item / shares % blocks * columns, first = item % shares * share;
        multiply_block(group, c, first, std::min(first + share, lines), scratch);
      }
    });
  }

 private:
  void fill_images() {
    const int64_t samples = l_.batch * l_.groups, planes = l_.planes(), pixels = l_.height * l_.width;
    auto* images = reinterpret_cast<uint32_t*>(images_.data());
    if (l_.padded()) std::memset(images, 0, samples * image_ * 4);
    at::parallel_for(0, samples * planes, 1, [&](int64_t begin, int64_t end) {
      uint64_t* words = at_least(scratch_of_thread<Scratch>().words, (pixels + 31) / 32 * 32);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t s = item / planes, plane = item % planes;
        pack(s / l_.groups, s % l_.groups, plane, words);
        uint32_t* image = images + s * image_ + (l_.padding[0] * l_.window.width + l_.padding[1]) * pixel_ + plane * 2;
        for (int64_t half = 0; half < std::min<int64_t>(2, pixel_ - plane * 2); ++half)
          for (int64_t h = 0; h < l_.height; ++h)
            for (int64_t w = 0; w < l_.width; ++w)
              image[(h * l_.window.width + w) * pixel_ + half] = uint32_t(words[h * l_.width + w] >> half * word_bits);
      }
    });
  }

  // A line of the kernel is one run, unless its taps lie apart.
  void find_runs() {
    const BinaryWindow& w = l_.window;
    const int64_t apart = w.dilation[1] > 1 ? w.kernel[1] : 1;
    starts_.clear();
    for (int64_t i = 0; i < w.kernel[0]; ++i)
      for (int64_t j = 0; j < apart; ++j) starts_.push_back(int32_t((i * w.dilation[0] * w.width + j * w.dilation[1]) * pixel_));
    runs_ = {starts_.data(), int64_t(starts_.size()), w.kernel[1] / apart * pixel_};
  }

  // Of each line (column) of the output: which of the kernel's meet the image, as a number of those that differ. Returns one of each.
  std::vector<int64_t> kinds(int d, std::vector<int32_t>& kind) const {
    const int64_t size[2] = {l_.height, l_.width}, out[2] = {l_.out_height, l_.out_width};
    std::map<std::pair<int64_t, int64_t>, int32_t> numbers;
    std::vector<int64_t> examples;
    kind.resize(out[d]);
    for (int64_t o = 0; o < out[d]; ++o) {
      int64_t before = 0, behind = 0;
      for (int64_t k = 0; k < l_.window.kernel[d]; ++k) before += position(d, o, k) < 0, behind += position(d, o, k) >= size[d];
      const auto [found, fresh] = numbers.try_emplace({before, behind}, int32_t(examples.size()));
      if (fresh) examples.push_back(o);
      kind[o] = found->second;
    }
    return examples;
  }

  int64_t position(int d, int64_t out, int64_t tap) const {
    return out * l_.window.stride[d] + tap * l_.window.dilation[d] - l_.padding[d];
  }

  // What sums begin with, of each kind of pixel and each channel: binary_bits.h's offset, and twice what taps outside of the image will
  // have counted. Those of {0, 1} count what the offset takes away.
  void prepare_offsets() {
    const int64_t n = l_.out_channels;
    padded_ = (n + columns - 1) / columns * columns + columns;  // 32 are read from any channel on
    std::vector<int64_t> lines{0}, across{0};
    line_kind_.assign(l_.out_height, 0), places_.assign(l_.out_width, 0);
    if (!l_.unit && l_.padded()) lines = kinds(0, line_kind_), across = kinds(1, places_);
    line_kinds_ = int64_t(across.size()) * padded_;
    for (int32_t& place : places_) place *= int32_t(padded_);
    offsets_.assign(lines.size() * line_kinds_, 0);
    for (size_t y = 0; y < lines.size(); ++y)
      for (size_t x = 0; x < across.size(); ++x) {
        int32_t* __restrict offset = offsets_.data() + y * line_kinds_ + x * padded_;
        for (int64_t c = 0; c < n; ++c) offset[c] = l_.unit ? p_.shift[c] : int32_t(l_.length());
        if (l_.unit || !l_.padded()) continue;
        for (int64_t t = 0; t < l_.taps(); ++t) {
          const int64_t h = position(0, lines[y], t / l_.window.kernel[1]), w = position(1, across[x], t % l_.window.kernel[1]);
          if (h >= 0 && h < l_.height && w >= 0 && w < l_.width) continue;
          const int32_t* __restrict sums = l_.sums + t * n;
          for (int64_t c = 0; c < n; ++c) offset[c] -= sums[c];
        }
      }
  }

  // Up to 32 channels of a group, from c on, times lines [first, last) of all samples.
  void multiply_block(int64_t group, int64_t c, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t words = l_.words() * 2, n = group * l_.group_outputs() + c;
    const int many = int(std::min(columns, l_.group_outputs() - c));
    uint32_t* weights = aligned(at_least(scratch.weights, words * columns + 16));
    column_kernels_.turn(l_.codes + n * words * 4, words, many, weights);
    const int64_t step = l_.window.stride[1] * pixel_;
    // The next channels' weights come meanwhile: as rows of codes the machine does not see them coming.
    const int64_t bytes = n + columns < l_.out_channels ? words * 4 * std::min(columns, l_.out_channels - n - columns) : 0;
    const uint8_t* next = l_.codes + (n + columns) * words * 4;
    for (int64_t line = first; line < last; ++line) {
      for (int64_t i = bytes * (line - first) / (last - first); i < bytes * (line - first + 1) / (last - first); i += 64)
        __builtin_prefetch(next + i, 0, 2);
      const int64_t sample = line / l_.out_height, y = line % l_.out_height;
      const auto* image = reinterpret_cast<const uint32_t*>(images_.data()) + (sample * l_.groups + group) * image_;
      const uint32_t* x = image + y * l_.window.stride[0] * l_.window.width * pixel_;
      const int32_t* offsets = offsets_.data() + line_kind_[y] * line_kinds_ + n;
      for (int64_t w = 0; w < l_.out_width; w += ColumnTraits::pixels) {
        const int64_t some = std::min<int64_t>(ColumnTraits::pixels, l_.out_width - w);
        float* out = l_.out ? l_.out + place(sample, y * l_.out_width + w, n) : nullptr;
        if (out) prefetch(out, some, many);
        column_kernels_.multiply(x + w * step, step, some, runs_, weights, offsets, places_.data() + w, l_.unit, scratch.sums);
        if (out)
          store(scratch.sums, some, many, n, out);
        else
          store_words(scratch.sums, some, many, n, line * l_.out_width + w);
      }
    }
  }

  int64_t place(int64_t sample, int64_t pixel, int64_t n) const {
    const int64_t pixels = l_.out_height * l_.out_width;
    return l_.rows ? (sample * pixels + pixel) * l_.out_channels + n : (sample * l_.out_channels + n) * pixels + pixel;
  }

  void store(const int32_t* sums, int64_t pixels, int64_t many, int64_t n, float* out) const {
    const ImageKernels& k = image_kernels();
    const float* residual = l_.residual ? l_.residual + (out - l_.out) : nullptr;
    if (l_.rows) {
      constexpr float all = std::numeric_limits<float>::infinity();
      return k.finish_clipped(sums, columns, pixels, many, none, l_.scales + n, bias(n), residual, -all, all, out, l_.out_channels);
    }
    k.finish(sums, columns, pixels, many, none, l_.scales + n, bias(n), residual, out, 1, l_.out_height * l_.out_width);
  }

  void store_words(const int32_t* sums, int64_t pixels, int many, int64_t n, int64_t pixel) const {
    const int64_t bytes = (l_.out_channels + 63) / 64 * 8;
    uint32_t flip = 0;
    for (int c = 0; l_.next_flip && c < many; ++c) flip |= uint32_t(l_.next_flip[n + c] & 1) << c;
    column_kernels_.compare(sums, pixels, many, l_.next_threshold + n, flip, l_.out_bits + pixel * bytes + n / 8, bytes);
  }

  const BinaryColumnKernels& column_kernels_;
  const int64_t pixel_, image_;  // words of 32 bits of a pixel, and of a group's image
  const CallArray<uint64_t> images_;
  ColumnRuns runs_;
  int64_t padded_, line_kinds_;  // offsets of a pixel's kind, and of a line's
  std::vector<int32_t>&starts_ = p_.starts, &line_kind_ = p_.inside[0], &places_ = p_.inside[1], &offsets_ = p_.offsets;
};

}  // namespace

// Words of one tap, bits of the output that are 32-bit words of one block, and an image that 32 bits number.
bool fits_columns(const BinaryLayer& layer) {
  return binary_column_kernels() && layer.window.channels % word_bits == 0 && (layer.groups == 1 || layer.group_outputs() % columns == 0) &&
         layer.batch * layer.out_height * layer.out_width >= fewest_pixels &&
         layer.window.plane * layer.window.channels / word_bits < int64_t(1) << 31;
}

void run_binary_columns(const BinaryLayer& layer, BinaryPrepared& prepared) { ColumnRun(layer, prepared)(); }

}  // namespace quantize::packed
