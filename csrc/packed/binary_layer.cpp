// A binary layer on the CPU: bits of the input, blocks of output pixels, counts, outputs. Kernels: binary_kernels.h.
//
// Scratch is kept by each thread between calls: small layers take microseconds, and the allocator's would be a good part of them.
#include "binary_layer.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_bits.h"

namespace quantize::packed {
namespace {

constexpr int64_t row = BinaryTraits::stride;
constexpr int64_t fewest_pixels = 16;  // of a linear layer's batch: fewer go through multiply_row

// What a call prepares for all its blocks.
struct Prepared {
  std::vector<uint64_t> flips, flat, images, mask;  // mask: an image of ones with zeros around, where inputs are signs
  std::vector<uint8_t> outside;                     // the same for lookups: 128 outside of the image
  std::vector<int32_t> shift, inside[2];            // inside: how many of a kernel's lines (columns) meet the image
  std::vector<float> bias;
};

struct Scratch {
  std::vector<uint64_t> x, mask;
  std::vector<uint8_t> index, outside;
  alignas(64) int32_t counts[BinaryTraits::channels * row], base[BinaryTraits::block];
  uint16_t bits[BinaryTraits::block];
};

uint64_t word_at(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

// 64 of a row of bits, from any bit on; zeros from bit `end` on.
uint64_t bits_at(const uint8_t* bytes, int64_t first, int64_t end) {
  const int64_t word = first / 64, shift = first % 64, left = end - first;
  uint64_t v = word_at(bytes + word * 8) >> shift;
  if (shift && (word + 1) * 64 < end) v |= word_at(bytes + (word + 1) * 8) << (64 - shift);
  return left < 64 ? v & ((uint64_t(1) << left) - 1) : v;
}

class Run {
 public:
  Run(const BinaryLayer& layer, Prepared& prepared)
      : l_(layer),
        p_(prepared),
        kernels_(binary_kernels()),
        image_(layer.planes() * layer.window.plane),
        masked_(layer.padded() && !layer.unit),
        lookup_(layer.words() < kernels_.lookup_words && (!masked_ || layer.window.channels % BinaryTraits::quad == 0)) {}

  void operator()() {
    prepare_channels();
    if (l_.height == 1 && !l_.padded() && l_.taps() == 1 && l_.groups == 1 && l_.batch == 1 && l_.out_width < fewest_pixels &&
        l_.window.stride[1] == 1 && l_.rows && l_.out)
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
      static thread_local Scratch scratch;
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
  void prepare_channels() {
    const int64_t planes = l_.planes(), group = l_.window.channels;
    p_.flips.assign(l_.groups * planes, 0);
    if (l_.flip)
      for (int64_t c = 0; c < l_.channels; ++c)
        p_.flips[c / group * planes + c % group / 64] |= uint64_t(l_.flip[c] & 1) << (c % group % 64);
    p_.shift.assign(l_.out_channels, 0);
    if (l_.unit)
      for (int64_t n = 0; n < l_.out_channels; ++n) {
        int32_t sum = 0;
        for (int64_t t = 0; t < l_.taps(); ++t) sum += l_.sums[t * l_.out_channels + n];
        p_.shift[n] = binary_dot(true, 0, binary_ones(int32_t(l_.length()), sum)).offset;
      }
    if (!l_.bias) p_.bias.assign(l_.out_channels, 0.f);
  }

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
    if (!masked_) return;
    const auto around = [&](auto& plane, auto outside, auto inside) {
      plane.assign(l_.window.plane + BinaryTraits::slack, outside);
      for (int64_t h = 0; h < l_.height; ++h)
        std::fill_n(plane.begin() + (h + l_.padding[0]) * l_.window.width + l_.padding[1], l_.width, inside);
    };
    lookup_ ? around(p_.outside, uint8_t(128), uint8_t(0)) : around(p_.mask, uint64_t(0), ~uint64_t(0));
  }

  const float* threshold(int64_t channel) const { return l_.threshold ? l_.threshold + channel : nullptr; }

  void fill_images() {
    const int64_t samples = l_.batch * l_.groups, planes = l_.planes(), pixels = l_.height * l_.width, group = l_.window.channels;
    const int64_t needed = samples * image_ + BinaryTraits::slack;
    if (int64_t(p_.images.size()) < needed) p_.images.resize(needed);
    if (l_.padded()) std::memset(p_.images.data(), 0, needed * 8);
    if (l_.floats && !l_.rows) {
      if (l_.padded() && int64_t(p_.flat.size()) < samples * planes * pixels) p_.flat.resize(samples * planes * pixels);
      at::parallel_for(0, samples * planes, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t s = item / planes, plane = item % planes, channel = s % l_.groups * group + plane * 64;
          const float* x = l_.floats + (s / l_.groups * l_.channels + channel) * pixels;
          uint64_t* image = p_.images.data() + s * image_ + plane * l_.window.plane;
          uint64_t* words = l_.padded() ? p_.flat.data() + item * pixels : image;
          kernels_.pack_planes(x, pixels, std::min<int64_t>(64, group - plane * 64), threshold(channel),
                               &p_.flips[s % l_.groups * planes + plane], words);
          if (!l_.padded()) continue;
          for (int64_t h = 0; h < l_.height; ++h)
            std::memcpy(image + (h + l_.padding[0]) * l_.window.width + l_.padding[1], words + h * l_.width, l_.width * 8);
        }
      });
      return;
    }
    at::parallel_for(0, samples * l_.height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t s = item / l_.height, h = item % l_.height, first = s % l_.groups * group;
        uint64_t* line = p_.images.data() + s * image_ + (h + l_.padding[0]) * l_.window.width + l_.padding[1];
        const int64_t pixel = (s / l_.groups * l_.height + h) * l_.width;
        if (l_.floats) {
          kernels_.pack_rows(l_.floats + pixel * l_.channels + first, l_.channels, group, l_.width, threshold(first),
                             &p_.flips[s % l_.groups * planes], line, l_.window.plane);
          continue;
        }
        const int64_t bytes = (l_.channels + 63) / 64 * 8;
        for (int64_t plane = 0; plane < planes; ++plane)
          for (int64_t w = 0; w < l_.width; ++w)
            line[plane * l_.window.plane + w] = bits_at(l_.bits + (pixel + w) * bytes, first + plane * 64, first + group);
      }
    });
  }

  // The bytes of `outside` under each tap, and what lies outside of the image in index[nibble].
  void mark_outside(int64_t first, int64_t count, Scratch& scratch) const {
    const int64_t quads = l_.window.channels / BinaryTraits::quad;
    scratch.outside.resize(row);
    uint8_t* index = scratch.index.data();
    for (int64_t i = 0; i < l_.window.kernel[0]; ++i)
      for (int64_t j = 0; j < l_.window.kernel[1]; ++j, index += quads * row) {
        uint8_t any = 0;
        for (int64_t done = 0; done < count;) {
          const int64_t y = (first + done) / l_.out_width, x = (first + done) % l_.out_width, line = std::min(count - done, l_.out_width - x);
          const int64_t step = l_.window.stride[1];
          const uint8_t* source = p_.outside.data() + (y * l_.window.stride[0] + i * l_.window.dilation[0]) * l_.window.width + x * step +
                                  j * l_.window.dilation[1];
          for (int64_t k = 0; k < line; ++k) any |= scratch.outside[done + k] = source[k * step];
          done += line;
        }
        if (!any) continue;
        for (int64_t k = 0; k < quads; ++k)
          for (int64_t p = 0; p < count; ++p) index[k * row + p] |= scratch.outside[p];
      }
  }

  void run_block(int64_t sample, int64_t group, int64_t start, int64_t count, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t words = l_.words(), quads = l_.quads(), bytes = words * 8;
    if (int64_t(scratch.x.size()) < words * row) scratch.x.resize(words * row);
    kernels_.gather(p_.images.data() + (sample * l_.groups + group) * image_, l_.window.plane, l_.window, start, count, scratch.x.data());
    const uint64_t* mask = nullptr;
    if (lookup_) {
      if (int64_t(scratch.index.size()) < 16 * words * row) scratch.index.resize(16 * words * row);
      kernels_.index(scratch.x.data(), words, count, scratch.index.data());
      if (masked_) mark_outside(start, count, scratch);
    } else if (masked_) {
      if (int64_t(scratch.mask.size()) < words * row) scratch.mask.resize(words * row);
      kernels_.gather(p_.mask.data(), 0, l_.window, start, count, scratch.mask.data());
      mask = scratch.mask.data();
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t inside = p_.inside[0][(start + i) / l_.out_width] * p_.inside[1][(start + i) % l_.out_width];
      scratch.base[i] = l_.unit ? 0 : inside * int32_t(l_.window.channels);
    }
    const int64_t pixels = l_.out_height * l_.out_width, quad = BinaryTraits::quad, all = l_.group_outputs();
    for (int64_t c = first; c < last; c += BinaryTraits::channels) {
      const int many = int(std::min<int64_t>(BinaryTraits::channels, last - c));
      if (lookup_)
        kernels_.lookup(scratch.index.data(), quads, count, l_.panels + (group * ((all + quad - 1) / quad) + c / quad) * quads * quad,
                        int((many + quad - 1) / quad), scratch.counts);
      else
        kernels_.multiply(scratch.x.data(), mask, words, count, l_.codes + (group * all + c) * bytes, many, scratch.counts);
      const int64_t n = group * all + c;
      const BinaryFinish finish{binary_dot(l_.unit, 0, 0).slope, scratch.base, &p_.shift[n]};
      if (l_.out) {
        float* out = l_.out + sample * l_.out_channels * pixels + (l_.rows ? start * l_.out_channels + n : n * pixels + start);
        kernels_.finish_floats(scratch.counts, many, count, finish, l_.scales + n, l_.bias ? l_.bias + n : &p_.bias[n], out,
                               l_.rows ? 1 : pixels, l_.rows ? l_.out_channels : 1);
      } else {
        kernels_.finish_bits(scratch.counts, many, count, finish, l_.next_threshold + n, scratch.bits);
        store_bits(scratch.bits, n, many, count, sample * pixels + start);
      }
    }
  }

  // Up to 16 channels' bits of each pixel into its words.
  void store_bits(const uint16_t* bits, int64_t channel, int many, int64_t count, int64_t pixel) const {
    uint64_t flips = 0;
    for (int c = 0; c < many; ++c) flips |= uint64_t(l_.next_flip ? l_.next_flip[channel + c] & 1 : 0) << c;
    const int64_t bytes = (l_.out_channels + 63) / 64 * 8, shift = channel % 64;
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* word = l_.out_bits + (pixel + i) * bytes + channel / 64 * 8;
      const uint64_t v = bits[i] ^ flips, low = word_at(word) | v << shift;
      std::memcpy(word, &low, 8);
      if (shift + many <= 64) continue;
      const uint64_t high = word_at(word + 8) | v >> (64 - shift);
      std::memcpy(word + 8, &high, 8);
    }
  }

  // A few rows of a linear layer, each through all weights as they lie.
  void multiply_rows() {
    constexpr int64_t some = 64;
    const int64_t words = l_.words(), bytes = words * 8;
    p_.flat.resize(l_.out_width * words);
    for (int64_t r = 0; r < l_.out_width; ++r) {
      uint64_t* x = p_.flat.data() + r * words;
      if (l_.floats)
        kernels_.pack_rows(l_.floats + r * l_.channels, l_.channels, l_.channels, 1, l_.threshold, p_.flips.data(), x, 1);
      else
        std::memcpy(x, l_.bits + r * bytes, bytes);
    }
    const float* bias = l_.bias ? l_.bias : p_.bias.data();
    at::parallel_for(0, (l_.out_channels + some - 1) / some, 1, [&](int64_t begin, int64_t end) {
      int32_t counts[some];
      for (int64_t item = begin; item < end; ++item)
        for (int64_t r = 0; r < l_.out_width; ++r) {
          const int64_t first = item * some, many = std::min(some, l_.out_channels - first);
          kernels_.multiply_row(p_.flat.data() + r * words, words, l_.codes + first * bytes, many, counts);
          const BinaryDot dot = binary_dot(l_.unit, int32_t(l_.length()), 0);
          float* out = l_.out + r * l_.out_channels + first;
          for (int64_t c = 0; c < many; ++c)
            out[c] = binary_value(dot.slope * counts[c] + (dot.offset + p_.shift[first + c]), l_.scales[first + c], bias[first + c]);
        }
    });
  }

  const BinaryLayer& l_;
  Prepared& p_;
  const BinaryKernels& kernels_;
  const int64_t image_;  // words of a group's
  const bool masked_, lookup_;
};

}  // namespace

void run_binary(const BinaryLayer& layer) {
  static thread_local Prepared prepared;
  Run(layer, prepared)();
}

}  // namespace quantize::packed
