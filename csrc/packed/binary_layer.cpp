// A binary layer on the CPU: bits of the input, blocks of output pixels, counts, outputs. Kernels: binary_kernels.h.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_bits.h"
#include "binary_pass.h"
#include "scratch.h"

namespace quantize::packed {
namespace {

constexpr int64_t row = BinaryTraits::stride, quad = BinaryTraits::quad, slack = BinaryTraits::slack;
constexpr int64_t fewest_pixels = 16;  // of a linear layer's batch: fewer go through multiply_row

struct Scratch {
  std::vector<uint64_t> words, x;
  std::vector<uint8_t> nibbles, index;
  std::vector<int32_t> outside, ones;  // of taps that are outside of the image for some pixel of the block
  std::vector<int64_t> outside_taps;
  alignas(64) int32_t counts[BinaryTraits::channels * row], base[BinaryTraits::block];
  uint16_t bits[BinaryTraits::block];
};

void values_of_row(const int32_t* __restrict counts, bool unit, int32_t base, const int32_t* __restrict shift,
                   const float* __restrict scales, const float* __restrict bias, int64_t many, float* __restrict out) {
  for (int64_t c = 0; c < many; ++c) out[c] = binary_value(binary_dot(unit, counts[c], base + shift[c]), scales[c], bias[c]);
}

class Run : BinaryPass {
 public:
  Run(const BinaryLayer& layer, BinaryPrepared& prepared)
      : BinaryPass(layer, prepared),
        lookup_(layer.words() < kernels_.lookup_words && (layer.window.channels % quad == 0 || layer.taps() == 1)),
        image_(layer.window.plane * (lookup_ ? (layer.window.channels + quad - 1) / quad : layer.planes())) {}

  void operator()() {
    if (l_.height == 1 && !l_.padded() && l_.taps() == 1 && l_.groups == 1 && l_.batch == 1 && l_.out_width < fewest_pixels &&
        l_.window.stride[1] == 1 && l_.skip[1] == 1 && l_.rows && l_.out)
      return multiply_rows();
    prepare_borders();
    fill_images();
    const int64_t pixels = l_.out_height * l_.out_width, block = lookup_ ? kernels_.lookup_block : BinaryTraits::block / 2;
    const int64_t blocks = (pixels + block - 1) / block;
    // Where blocks are too few for the threads, channels are shared out as well. Words of bits are one thread's.
    const int64_t outer = l_.batch * blocks * (l_.out ? l_.groups : 1), sixteens = (l_.group_outputs() + 15) / 16;
    const int64_t shares = l_.out ? std::clamp<int64_t>((2 * at::get_num_threads() - 2) / outer, 1, sixteens) : 1;
    const int64_t share = (sixteens + shares - 1) / shares * 16;
    at::parallel_for(0, outer * shares, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % shares * share, last = std::min(first + share, l_.group_outputs());
        const int64_t at = item / shares, start = at % blocks * block, count = std::min(block, pixels - start);
        if (first >= last) continue;
        if (l_.out) {
          run_block(at / blocks / l_.groups, at / blocks % l_.groups, start, count, first, last, scratch);
        } else {
          for (int64_t group = 0; group < l_.groups; ++group) run_block(at / blocks, group, start, count, first, last, scratch);
        }
      }
    });
  }

 private:
  void prepare_borders() {
    const int64_t size[2] = {l_.height, l_.width}, out[2] = {l_.out_height, l_.out_width};
    for (int d = 0; d < 2; ++d) {
      p_.inside[d].assign(out[d], 0);
      for (int64_t o = 0; o < out[d]; ++o)
        for (int64_t k = 0; k < l_.window.kernel[d]; ++k) {
          const int64_t at = o * l_.window.stride[d] + k * l_.window.dilation[d] - l_.padding[d];
          p_.inside[d][o] += at >= 0 && at < size[d];
        }
    }
  }

  // Planes as they lie become planes with padding around.
  template <typename T>
  void place(const T* plane, T* image) const {
    for (int64_t h = 0; h < l_.height; ++h)
      std::memcpy(image + (h + l_.padding[0]) * l_.window.width + l_.padding[1], plane + h * l_.width, l_.width * sizeof(T));
  }

  void fill_images() {
    const int64_t samples = l_.batch * l_.groups, planes = l_.planes(), pixels = l_.height * l_.width;
    const int64_t stride = (pixels + 31) / 32 * 32;  // of planes of nibbles
    if (lookup_)
      nibbles_ = CallArray(p_.nibbles, samples * image_ + slack);
    else
      images_ = CallArray(p_.images, samples * image_ + slack);
    uint64_t* images = images_.data();
    uint8_t* nibbles = nibbles_.data();
    if (l_.padded()) lookup_ ? std::memset(nibbles, l_.unit ? 0 : 128, samples * image_) : std::memset(images, 0, samples * image_ * 8);
    at::parallel_for(0, samples * planes, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t s = item / planes, plane = item % planes;
        if (!lookup_ && !l_.padded()) {
          pack(s / l_.groups, s % l_.groups, plane, images + s * image_ + plane * pixels);
          continue;
        }
        uint64_t* words = at_least(scratch.words, stride);
        pack(s / l_.groups, s % l_.groups, plane, words);
        if (!lookup_) {
          place(words, images + s * image_ + plane * l_.window.plane);
          continue;
        }
        const int rows = int((std::min<int64_t>(64, l_.window.channels - plane * 64) + quad - 1) / quad);
        uint8_t* flat = at_least(scratch.nibbles, 16 * stride);
        kernels_.index(words, pixels, rows, flat, stride);
        for (int r = 0; r < rows; ++r) place(flat + r * stride, nibbles + s * image_ + (plane * 16 + r) * l_.window.plane);
      }
    });
  }

  void run_block(int64_t sample, int64_t group, int64_t start, int64_t count, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t words = l_.words(), quads = l_.quads(), bytes = words * 8, image = (sample * l_.groups + group) * image_;
    uint64_t* x = nullptr;
    uint8_t* index = nullptr;
    if (lookup_) {
      index = aligned(at_least(scratch.index, quads * kernels_.lookup_block + 2 * slack));
      kernels_.gather_index(nibbles_.data() + image, l_.window, start, count, index, kernels_.lookup_block);
    } else {
      x = at_least(scratch.x, words * row);
      kernels_.gather(images_.data() + image, l_.window, start, count, x);
      if (l_.padded() && !l_.unit) find_outside(start, count, scratch);
    }
    for (int64_t i = 0, y = start / l_.out_width, w = start % l_.out_width; i < count; ++i) {
      scratch.base[i] = l_.unit ? 0 : p_.inside[0][y] * p_.inside[1][w] * int32_t(l_.window.channels);
      if (++w == l_.out_width) w = 0, ++y;
    }
    const int64_t pixels = l_.out_height * l_.out_width, all = l_.group_outputs();
    for (int64_t c = first; c < last; c += BinaryTraits::channels) {
      const int many = int(std::min<int64_t>(BinaryTraits::channels, last - c));
      const int64_t n = group * all + c;
      const int64_t place = l_.rows ? (sample * pixels + start) * l_.out_channels + n : (sample * l_.out_channels + n) * pixels + start;
      float* out = l_.out ? l_.out + place : nullptr;
      if (out) prefetch(out, count, many);
      if (lookup_) {
        kernels_.lookup(index, kernels_.lookup_block, quads, count,
                        l_.panels + (group * ((all + quad - 1) / quad) + c / quad) * quads * quad, int((many + quad - 1) / quad),
                        scratch.counts);
      } else {
        kernels_.multiply(x, words, count, l_.codes + n * bytes, many, scratch.counts);
        if (l_.padded() && !l_.unit) leave_out(n, many, count, scratch);
      }
      const BinaryFinish finish{l_.unit, scratch.base, &p_.shift[n]};
      if (out) {
        kernels_.finish_floats(scratch.counts, many, count, finish, l_.scales + n, bias(n), out,
                               l_.residual ? l_.residual + (out - l_.out) : nullptr, l_.rows ? 1 : pixels, l_.rows ? l_.out_channels : 1);
      } else {
        kernels_.finish_bits(scratch.counts, many, count, finish, l_.next_threshold + n, scratch.bits);
        store_bits(scratch.bits, n, many, count, sample * pixels + start);
      }
    }
  }

  // Which taps of which pixels of a block lie outside of the image.
  void find_outside(int64_t start, int64_t count, Scratch& scratch) const {
    const BinaryWindow& w = l_.window;
    scratch.outside_taps.clear();
    int32_t* outside = at_least(scratch.outside, l_.taps() * row);
    for (int64_t tap = 0; tap < l_.taps(); ++tap) {
      const int64_t below = tap / w.kernel[1] * w.dilation[0] - l_.padding[0], right = tap % w.kernel[1] * w.dilation[1] - l_.padding[1];
      int32_t any = 0;
      for (int64_t i = 0, y = start / l_.out_width, x = start % l_.out_width; i < count; ++i) {
        const int64_t h = y * w.stride[0] + below, v = x * w.stride[1] + right;
        any |= outside[i] = h < 0 || h >= l_.height || v < 0 || v >= l_.width ? -1 : 0;
        if (++x == l_.out_width) x = 0, ++y;
      }
      if (!any) continue;
      scratch.outside_taps.push_back(tap);
      outside += row;
    }
  }

  void leave_out(int64_t channel, int many, int64_t count, Scratch& scratch) const {
    const int64_t taps = int64_t(scratch.outside_taps.size());
    int32_t* ones = at_least(scratch.ones, taps * BinaryTraits::channels);
    for (int64_t t = 0; t < taps; ++t)
      for (int c = 0; c < many; ++c)
        ones[t * BinaryTraits::channels + c] =
            binary_ones(int32_t(l_.window.channels), l_.sums[scratch.outside_taps[t] * l_.out_channels + channel + c]);
    kernels_.leave_out(scratch.counts, many, count, int(taps), scratch.outside.data(), ones);
  }

  // A few rows of a linear layer, each through all weights as they lie.
  void multiply_rows() {
    constexpr int64_t some = 64;
    const int64_t words = l_.words(), bytes = words * 8;
    uint64_t* x = at_least(p_.images, l_.out_width * words);
    for (int64_t r = 0; r < l_.out_width; ++r)
      for (int64_t k = 0; k < words; ++k) {
        const int many = int(std::min<int64_t>(64, l_.channels - k * 64));
        if (l_.floats)
          kernels_.pack_rows(l_.floats + r * l_.channels + k * 64, 0, 1, many, threshold(k * 64), p_.flips[k], x + r * words + k);
        else
          x[r * words + k] = word_at(l_.bits + r * bytes + k * 8);
      }
    at::parallel_for(0, (l_.out_channels + some - 1) / some, 1, [&](int64_t begin, int64_t end) {
      int32_t counts[some];
      for (int64_t item = begin; item < end; ++item)
        for (int64_t r = 0; r < l_.out_width; ++r) {
          const int64_t first = item * some, many = std::min(some, l_.out_channels - first);
          kernels_.multiply_row(x + r * words, words, l_.codes + first * bytes, many, counts);
          values_of_row(counts, l_.unit, l_.unit ? 0 : int32_t(l_.length()), &p_.shift[first], l_.scales + first, bias(first), many,
                        l_.out + r * l_.out_channels + first);
          add_residual(l_.out + r * l_.out_channels + first, 1, many);
        }
    });
  }

  const bool lookup_;
  const int64_t image_;  // words, or bytes, of a group's
  CallArray<uint64_t> images_;
  CallArray<uint8_t> nibbles_;
};

}  // namespace

void run_binary(const BinaryLayer& layer) {
  auto& prepared = scratch_of_thread<BinaryPrepared>();
  if (fits_tiles(layer)) return run_binary_tiles(layer, prepared);
  if (fits_columns(layer)) return run_binary_columns(layer, prepared);
  Run(layer, prepared)();
}

}  // namespace quantize::packed
