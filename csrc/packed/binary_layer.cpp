// A binary layer on the CPU: bits of the input, blocks of output pixels, counts, outputs. Kernels: binary_kernels.h.
#include "binary_layer.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_bits.h"
#include "image_kernels.h"
#include "scratch.h"
#include "tile_rows.h"

namespace quantize::packed {
namespace {

constexpr int64_t row = BinaryTraits::stride, quad = BinaryTraits::quad, slack = BinaryTraits::slack;
constexpr int64_t fewest_pixels = 16;  // of a linear layer's batch: fewer go through multiply_row
constexpr int32_t none[TileTraits::together * TileTraits::columns] = {};
constexpr int64_t fewest_tile_rows = 48;  // pixels of a sample: fewer are sooner counted than weights are spread to bytes

// What a call prepares for all its blocks. Kept by the thread that calls, but for large images.
struct Prepared {
  std::vector<uint64_t> flips, images;
  std::vector<uint8_t> nibbles;           // images for lookups, or of bytes
  std::vector<int32_t> shift, inside[2];  // inside: how many of a kernel's lines (columns) meet the image
  std::vector<float> bias;
};

struct Scratch {
  std::vector<uint64_t> words, x;
  std::vector<uint8_t> nibbles, index;
  std::vector<int32_t> outside, ones;  // of taps that are outside of the image for some pixel of the block
  std::vector<int64_t> outside_taps;
  std::vector<int8_t> levels;  // for tiles
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

void values_of_row(const int32_t* __restrict counts, bool unit, int32_t base, const int32_t* __restrict shift,
                   const float* __restrict scales, const float* __restrict bias, int64_t many, float* __restrict out) {
  for (int64_t c = 0; c < many; ++c) out[c] = binary_value(binary_dot(unit, counts[c], base + shift[c]), scales[c], bias[c]);
}

void add_lines(const float* __restrict residual, float* __restrict out, int64_t lines, int64_t length, int64_t pitch) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t j = 0; j < length; ++j) out[i * pitch + j] += residual[i * pitch + j];
}

class Run {
 public:
  Run(const BinaryLayer& layer, Prepared& prepared)
      : l_(layer),
        p_(prepared),
        kernels_(binary_kernels()),
        lookup_(layer.words() < kernels_.lookup_words && (layer.window.channels % quad == 0 || layer.taps() == 1)),
        image_(layer.window.plane * (lookup_ ? (layer.window.channels + quad - 1) / quad : layer.planes())) {}

  void operator()() {
    prepare_channels();
    if (l_.height == 1 && !l_.padded() && l_.taps() == 1 && l_.groups == 1 && l_.batch == 1 && l_.out_width < fewest_pixels &&
        l_.window.stride[1] == 1 && l_.skip[1] == 1 && l_.rows && l_.out)
      return multiply_rows();
    if (fits_tiles()) return multiply_tiles();
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
        p_.shift[n] = -binary_ones(int32_t(l_.length()), sum);
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
  }

  const float* threshold(int64_t channel) const { return l_.threshold ? l_.threshold + channel : nullptr; }

  // A group's words of 64 channels, pixel by pixel.
  void pack(int64_t sample, int64_t group, int64_t plane, uint64_t* words) const {
    const int64_t pixels = l_.height * l_.width, channels = l_.window.channels, first = group * channels + plane * 64;
    const int many = int(std::min<int64_t>(64, channels - plane * 64));
    const uint64_t flip = p_.flips[group * l_.planes() + plane];
    if (l_.bits) {
      const int64_t bytes = (l_.channels + 63) / 64 * 8;
      for (int64_t p = 0; p < pixels; ++p) words[p] = bits_at(l_.bits + (sample * pixels + p) * bytes, first, first + many);
    } else if (l_.rows) {
      const int64_t lines = l_.skip[0] * l_.skip[1] == 1 ? 1 : l_.height, step = l_.skip[1] * l_.channels;
      const float* line = l_.floats + sample * l_.sample + first;
      for (int64_t h = 0; h < lines; ++h, line += l_.line * l_.skip[0])
        kernels_.pack_rows(line, step, pixels / lines, many, threshold(first), flip, words + h * l_.width);
    } else {
      kernels_.pack_planes(l_.floats + sample * l_.sample + first * pixels, pixels, many, threshold(first), flip, words);
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
        kernels_.finish_floats(scratch.counts, many, count, finish, l_.scales + n, l_.bias ? l_.bias + n : &p_.bias[n], out,
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

  // Quads of one tap, and an image that 32 bits number.
  bool fits_tiles() const {
    return tile_kernels() && l_.window.channels % quad == 0 && l_.out_height * l_.out_width >= fewest_tile_rows &&
           l_.window.plane * l_.window.channels < int64_t(1) << 31;
  }

  // Bits spread to bytes, for the integer products of tiles: those do more of them in a cycle than popcounts.
  void multiply_tiles() {
    const BinaryWindow& w = l_.window;
    const int64_t pixel = w.channels, line = w.width * pixel, plane = w.plane * pixel, samples = l_.batch * l_.groups;
    const TileRows rows(l_.out_height, l_.out_width, pixel, line, w.stride);
    const TileTaps taps(w.kernel, w.dilation[1], pixel / quad);
    const std::vector<int32_t> lines = taps.offsets(w.kernel, w.dilation, pixel, line);
    const int64_t behind = TileRows::slack * rows.stride + w.kernel[1] * pixel + 2 * 64;
    const CallArray<uint8_t> memory(p_.nibbles, samples * plane + behind);
    uint8_t* images = aligned(memory.data());
    spread_images(images, plane);
    const int64_t pixels = l_.out_height * l_.out_width, all = l_.group_outputs();
    const int64_t share = l_.out ? 2 * TileTraits::columns : l_.groups == 1 ? 64 : all, shares = (all + share - 1) / share;
    const int64_t outer = l_.out ? samples : l_.batch;  // words of bits are one thread's
    at::parallel_for(0, outer * shares, 1, [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_of_thread<Scratch>();
      const TileSession tiles(tile_kernels());
      for (int64_t item = begin; item < end; ++item)
        for (int64_t s = item / shares * (samples / outer), i = 0; i < samples / outer; ++i, ++s)
          for (int64_t c = item % shares * share, last = std::min(c + share, all); c < last; c += 2 * TileTraits::columns)
            multiply_tile(images + s * plane, rows, taps, lines, s / l_.groups * pixels, s % l_.groups * all + c, c,
                          std::min<int64_t>(last - c, 2 * TileTraits::columns), scratch);
    });
  }

  void spread_images(uint8_t* images, int64_t image) const {
    const int64_t planes = l_.planes(), pixel = l_.window.channels;
    if (l_.padded()) std::memset(images, 0, l_.batch * l_.groups * image);
    at::parallel_for(0, l_.batch * l_.groups * planes, 1, [&](int64_t begin, int64_t end) {
      uint64_t* words = at_least(scratch_of_thread<Scratch>().words, (l_.height * l_.width + 31) / 32 * 32);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t s = item / planes, plane = item % planes;
        pack(s / l_.groups, s % l_.groups, plane, words);
        uint8_t* first = images + s * image + (l_.padding[0] * l_.window.width + l_.padding[1]) * pixel + plane * 64;
        const int many = int(std::min<int64_t>(64, pixel - plane * 64));
        for (int64_t h = 0; h < l_.height; ++h)
          tile_kernels()->spread(words + h * l_.width, l_.width, many, l_.unit, first + h * l_.window.width * pixel, pixel);
      }
    });
  }

  // All pixels of an image times up to 32 channels: n is the first, c its number in the group.
  void multiply_tile(const uint8_t* image, const TileRows& rows, const TileTaps& taps, const std::vector<int32_t>& lines, int64_t pixel,
                     int64_t n, int64_t c, int64_t many, Scratch& scratch) const {
    constexpr int64_t columns = TileTraits::columns;
    const auto& kernels = *tile_kernels();
    const int64_t panels = (many + columns - 1) / columns, panel_bytes = l_.quads() * quad, line = taps.panel_bytes() / taps.lines;
    const int64_t group_panels = (l_.group_outputs() + quad - 1) / quad, filling = line - taps.quads * TileTraits::bytes;
    const uint8_t* nibbles = l_.panels + ((n - c) / l_.group_outputs() * group_panels + c / quad) * panel_bytes;
    int8_t* levels = aligned(at_least(scratch.levels, panels * taps.panel_bytes() + 64));
    for (int64_t t = 0; t < panels; ++t)
      for (int64_t l = 0; l < taps.lines; ++l) {
        const int fours = int(std::min<int64_t>(columns / quad, group_panels - c / quad - t * columns / quad));
        int8_t* target = levels + t * taps.panel_bytes() + l * line;
        kernels.sign_levels(nibbles + t * columns / quad * panel_bytes + l * taps.quads * quad, taps.quads, fours, panel_bytes, target);
        if (filling) std::memset(target + line - filling, 0, filling);
      }
    alignas(64) int32_t acc[TileTraits::together * TileTraits::rows * TileTraits::together * columns];
    const int64_t pitch = panels * columns, out_pixels = l_.out_height * l_.out_width;
    const float* bias = l_.bias ? l_.bias + n : &p_.bias[n];
    rows.blocks([&](int64_t offset, int row_tiles, const auto& runs) {
      kernels.multiply_signed(image + offset, rows.stride, row_tiles, {lines.data(), taps.lines, taps.chunks}, levels, int(panels), acc);
      runs([&](int64_t row, int64_t count, int64_t at) {
        const int32_t* sums = acc + row * pitch;
        if (l_.out) {
          float* out = l_.out + (l_.rows ? (pixel + at) * l_.out_channels + n : pixel * l_.out_channels + n * out_pixels + at);
          if (l_.rows)
            image_kernels().finish(sums, pitch, count, many, none, l_.scales + n, bias, out, l_.out_channels, 1);
          else
            kernels.finish_planes(sums, pitch, count, many, none, l_.scales + n, bias, out, out_pixels);
          add_residual(out, count, many);
          return;
        }
        for (int64_t t = 0; t < panels; ++t) {
          const int some = int(std::min(columns, many - t * columns));
          kernels.compare(sums + t * columns, pitch, count, some, l_.next_threshold + n + t * columns, scratch.bits);
          store_bits(scratch.bits, n + t * columns, some, count, pixel + at);
        }
      });
    });
  }

  // To a block of the output that was just written and is still in the cache.
  void add_residual(float* out, int64_t pixels, int64_t channels) const {
    if (!l_.residual) return;
    const float* residual = l_.residual + (out - l_.out);
    if (l_.rows)
      add_lines(residual, out, pixels, channels, l_.out_channels);
    else
      add_lines(residual, out, channels, pixels, l_.out_height * l_.out_width);
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
    const float* bias = l_.bias ? l_.bias : p_.bias.data();
    at::parallel_for(0, (l_.out_channels + some - 1) / some, 1, [&](int64_t begin, int64_t end) {
      int32_t counts[some];
      for (int64_t item = begin; item < end; ++item)
        for (int64_t r = 0; r < l_.out_width; ++r) {
          const int64_t first = item * some, many = std::min(some, l_.out_channels - first);
          kernels_.multiply_row(x + r * words, words, l_.codes + first * bytes, many, counts);
          values_of_row(counts, l_.unit, l_.unit ? 0 : int32_t(l_.length()), &p_.shift[first], l_.scales + first, bias + first, many,
                        l_.out + r * l_.out_channels + first);
          add_residual(l_.out + r * l_.out_channels + first, 1, many);
        }
    });
  }

  const BinaryLayer& l_;
  Prepared& p_;
  const BinaryKernels& kernels_;
  const bool lookup_;
  const int64_t image_;  // words, or bytes, of a group's
  CallArray<uint64_t> images_;
  CallArray<uint8_t> nibbles_;
};

}  // namespace

void run_binary(const BinaryLayer& layer) { Run(layer, scratch_of_thread<Prepared>())(); }

}  // namespace quantize::packed
