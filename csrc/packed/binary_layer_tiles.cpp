// A binary layer in tiles: bits spread to bytes, for integer products. Those do more of them in a cycle than popcounts.
#include <ATen/Parallel.h>

#include <algorithm>

#include "binary_pass.h"
#include "image_kernels.h"
#include "scratch.h"
#include "tile_rows.h"

namespace quantize::packed {
namespace {

constexpr int64_t quad = BinaryTraits::quad;
constexpr int64_t fewest_pixels = 48;  // of a sample: fewer are sooner counted than weights are spread to bytes
constexpr int32_t none[TileTraits::together * TileTraits::columns] = {};

struct Scratch {
  std::vector<uint64_t> words;
  std::vector<int8_t> levels;
  uint16_t bits[TileTraits::together * TileTraits::rows];
};

class TileRun : BinaryPass {
 public:
  using BinaryPass::BinaryPass;

  void operator()() const {
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

 private:
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
    const float* added = bias(n);
    const auto place = [&](int64_t at) {
      return l_.out + (l_.rows ? (pixel + at) * l_.out_channels + n : pixel * l_.out_channels + n * out_pixels + at);
    };
    rows.blocks([&](int64_t offset, int row_tiles, const auto& runs) {
      if (l_.out) runs([&](int64_t, int64_t count, int64_t at) { prefetch(place(at), count, many); });
      kernels.multiply_signed(image + offset, rows.stride, row_tiles, {lines.data(), taps.lines, taps.chunks}, levels, int(panels), acc);
      runs([&](int64_t row, int64_t count, int64_t at) {
        const int32_t* sums = acc + row * pitch;
        if (l_.out) {
          float* out = place(at);
          const float* residual = l_.residual ? l_.residual + (out - l_.out) : nullptr;
          image_kernels().finish(sums, pitch, count, many, none, l_.scales + n, added, residual, out, l_.rows ? l_.out_channels : 1,
                                 l_.rows ? 1 : out_pixels);
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
};

}  // namespace

// Quads of one tap, and an image that 32 bits number.
bool fits_tiles(const BinaryLayer& layer) {
  return tile_kernels() && layer.window.channels % quad == 0 && layer.out_height * layer.out_width >= fewest_pixels &&
         layer.window.plane * layer.window.channels < int64_t(1) << 31;
}

void run_binary_tiles(const BinaryLayer& layer, BinaryPrepared& prepared) { TileRun(layer, prepared)(); }

}  // namespace quantize::packed
