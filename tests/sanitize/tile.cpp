// Products in tiles against plain loops, and how the pixels of a convolution are laid out as rows of tiles.
#include "packed/tile_kernels.h"

#include <algorithm>
#include <new>

#include "harness.h"
#include "packed/tile_rows.h"

namespace sanitize {
namespace {

using namespace quantize::packed;
using quantize::Isa;

constexpr int64_t tile_bytes = TileTraits::quads * TileTraits::bytes;

int64_t check_products(const TileKernels& tiles, Fence fence, int row_tiles, int panels, int64_t line_count, int64_t chunks) {
  const int64_t rows = row_tiles * TileTraits::rows, columns = panels * TileTraits::columns, stride = 36;
  const Buffer<int32_t> offsets(line_count, fence);
  for (int64_t l = 0; l < line_count; ++l) offsets[l] = int32_t(l * 52);
  const Noise<uint8_t> x((rows - 1) * stride + (line_count - 1) * 52 + chunks * TileTraits::bytes, fence, 1);
  const Noise<int8_t> levels(panels * line_count * chunks * tile_bytes, fence, 2);
  const Buffer<int32_t> acc(rows * columns, fence), want(rows * columns, fence);
  const std::string what = "tiles: " + std::to_string(row_tiles) + " by " + std::to_string(panels) + ", " + std::to_string(line_count) +
                           " lines of " + std::to_string(chunks);
  for (bool negative : {false, true}) {
    const TileSession session(&tiles);
    const auto& multiply = negative ? tiles.multiply_signed : tiles.multiply;
    multiply(x.data(), stride, row_tiles, {offsets.data(), line_count, chunks}, levels.data(), panels, acc.data());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) {
        int32_t sum = 0;
        for (int64_t l = 0; l < line_count; ++l)
          for (int64_t k = 0; k < chunks * TileTraits::bytes; ++k) {
            const uint8_t byte = x[i * stride + offsets[l] + k];
            const int64_t at = (c / 16 * line_count + l) * chunks * tile_bytes + k / 4 * TileTraits::bytes + c % 16 * 4 + k % 4;
            sum += (negative ? int(int8_t(byte)) : int(byte)) * levels[at];
          }
        want[i * columns + c] = sum;
      }
    expect_same(acc, want, what);
  }
  return 2;
}

int64_t check_bits(const TileKernels& tiles, Fence fence, int64_t pixels, int channels) {
  const Noise<uint64_t> words(pixels, fence, 5);
  const int64_t pixel = (channels + 3) / 4 * 4 + 4;
  const std::string what = "tiles: " + std::to_string(pixels) + " pixels of " + std::to_string(channels) + " bits";
  for (bool unit : {false, true}) {
    const Buffer<uint8_t> image(pixels * pixel, fence), want(pixels * pixel, fence);
    tiles.spread(words.data(), pixels, channels, unit, image.data(), pixel);
    for (int64_t p = 0; p < pixels; ++p)
      for (int c = 0; c < channels; ++c) {
        const bool bit = words[p] >> c & 1;
        want[p * pixel + c] = unit ? bit : bit ? uint8_t(-1) : 1;
      }
    expect_same(image, want, what);
  }
  const int columns = std::min(channels, int(TileTraits::columns));
  const Noise<int32_t> acc(pixels * 32, fence, 6), threshold(columns, fence, 7);
  const Buffer<uint16_t> bits(pixels, fence), want(pixels, fence);
  tiles.compare(acc.data(), 32, pixels, columns, threshold.data(), bits.data());
  for (int64_t p = 0; p < pixels; ++p) {
    want[p] = 0;
    for (int c = 0; c < columns; ++c) want[p] |= uint16_t((acc[p * 32 + c] < threshold[c]) << c);
  }
  expect_same(bits, want, what + ", compared");
  return 3;
}

int64_t check_levels(const TileKernels& tiles, Fence fence, int64_t quads, int panels) {
  const Noise<uint8_t> nibbles(panels * quads * 4, fence, 8);
  const Buffer<int8_t> levels(quads * TileTraits::bytes, fence), want(quads * TileTraits::bytes, fence);
  tiles.sign_levels(nibbles.data(), quads, panels, quads * 4, levels.data());
  for (int64_t q = 0; q < quads; ++q)
    for (int c = 0; c < 16; ++c)
      for (int k = 0; k < 4; ++k) {
        const int nibble = c / 4 < panels ? nibbles[c / 4 * quads * 4 + q * 4 + c % 4] >> 4 : 0;
        want[q * TileTraits::bytes + c * 4 + k] = nibble >> k & 1 ? -1 : 1;
      }
  expect_same(levels, want, "tiles: levels of " + std::to_string(quads) + " quads, " + std::to_string(panels) + " panels");
  return 1;
}

// Every output pixel once, at the bytes where it lies, and nothing read behind the slack.
int64_t check_rows(int64_t height, int64_t width, int64_t pixel, int64_t line, int64_t down, int64_t right) {
  const int64_t steps[] = {down, right};
  const TileRows rows(height, width, pixel, line, steps);
  std::vector<int> seen(height * width);
  const std::string what = "rows of " + std::to_string(height) + "x" + std::to_string(width) + ", line " + std::to_string(line) +
                           ", stride " + std::to_string(down) + "x" + std::to_string(right);
  const int64_t last = (height - 1) * down * line + (width - 1) * right * pixel;
  rows.blocks([&](int64_t offset, int row_tiles, const auto& runs) {
    if (offset + (row_tiles * TileTraits::rows - 1) * rows.stride > last + TileRows::slack * rows.stride) fail(what + ": reads behind");
    runs([&](int64_t first, int64_t count, int64_t at) {
      if (first < 0 || first + count > row_tiles * TileTraits::rows) fail(what + ": outside of the block");
      for (int64_t i = 0; i < count; ++i) {
        const int64_t p = at + i, lies = p / width * down * line + p % width * right * pixel;
        if (p >= height * width || seen[p]++) fail(what + ": pixel " + std::to_string(p));
        if (lies != offset + (first + i) * rows.stride) fail(what + ": pixel " + std::to_string(p) + " lies elsewhere");
      }
    });
  });
  for (int times : seen)
    if (times != 1) fail(what + ": a pixel is missing");
  return 1;
}

int tiles_in_use = 0;

// Tiles are given back also when memory for what is multiplied runs out.
int64_t check_session() {
  TileKernels counted{};
  counted.begin = [] { ++tiles_in_use; };
  counted.end = [] { --tiles_in_use; };
  try {
    const TileSession session(&counted);
    if (tiles_in_use != 1) fail("tiles: not set up");
    throw std::bad_alloc();
  } catch (const std::bad_alloc&) {
  }
  const TileSession none(nullptr);
  if (tiles_in_use != 0) fail("tiles: kept after an exception");
  return 1;
}

}  // namespace

int64_t check_tile_rows() {
  int64_t count = check_session();
  for (int64_t height : {1, 2, 7, 14, 57})
    for (int64_t width : {1, 5, 14, 31, 32, 33, 56})
      for (int64_t down : {1, 2})
        for (int64_t right : {1, 2, 3})
          for (int64_t around : {0, 2, 3}) count += check_rows(height, width, 20, ((width - 1) * right + 1 + around) * 20, down, right);
  for (int64_t batch : {1, 8, 33, 100}) count += check_rows(1, batch, 64, 64, 1, 1);  // a linear layer's
  return count;
}

int64_t check_tile(Isa isa, Fence fence) {
  quantize::set_cpu_isa(isa);
  if (!tile_kernels()) return 0;
  const TileKernels& tiles = *tile_kernels();
  int64_t count = 0;
  for (int row_tiles : {1, 2})
    for (int panels : {1, 2})
      for (int64_t lines : {1, 3})
        for (int64_t chunks : {1, 2, 5}) count += check_products(tiles, fence, row_tiles, panels, lines, chunks);
  for (int64_t pixels : {1, 16, 33})
    for (int channels : {1, 3, 16, 40, 64}) count += check_bits(tiles, fence, pixels, channels);
  for (int64_t quads : {1, 3, 4, 18})
    for (int panels : {1, 2, 4}) count += check_levels(tiles, fence, quads, panels);
  return count;
}

}  // namespace sanitize
