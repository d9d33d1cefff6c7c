// What is asked of a convolution beside its sums, and codes as one convolution hands them to the next.
#pragma once

#include <ATen/ops/add.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "images.h"
#include "output.h"

namespace quantize::packed {

// Codes as one convolution hands them to the next: uint8 [N, C, H, W], or where floats would be channels last [N, H, W, 1, C]. Either way a
// pixel's channels lie together, filled up to fours.
inline constexpr int64_t filled_to = GemmTraits::quad;

// Bytes behind codes, which a 1x1 convolution of steps to two reads and leaves out.
inline int64_t slack(int64_t pixel) { return 64 + 2 * (TileRows::slack + 4) * pixel; }

inline at::Tensor empty_codes(at::IntArrayRef sizes, bool rows, const at::TensorOptions& options) {
  const int64_t n = sizes[0], c = sizes[1], h = sizes[2], w = sizes[3], pixel = rounded_up(c, filled_to);
  const at::Tensor all = at::empty({n * h * w * pixel + slack(pixel)}, options.dtype(at::kByte));
  return rows ? all.as_strided({n, h, w, 1, c}, {h * w * pixel, w * pixel, pixel, pixel, 1})
              : all.as_strided({n, c, h, w}, {h * w * pixel, 1, w * pixel, pixel});
}

// Such codes as [N, C, H, W].
inline at::Tensor channels_second(const at::Tensor& codes) { return codes.dim() == 5 ? codes.squeeze(3).permute({0, 3, 1, 2}) : codes; }

inline void check_codes(const char* op, const at::Tensor& x) {
  const int64_t pixel = rounded_up(x.size(1), filled_to);
  const int64_t strides[] = {x.size(2) * x.size(3) * pixel, 1, x.size(3) * pixel, pixel};
  for (int d = 0; d < 4; ++d)
    TORCH_CHECK_VALUE(x.size(d) <= 1 || x.stride(d) == strides[d], op, ": x must be codes as packed_conv2d gives them, of strides ",
                      at::IntArrayRef(strides), "; got ", x.strides());
  const int64_t bytes = x.size(0) * strides[0], there = int64_t(x.storage().nbytes()) - x.storage_offset();
  TORCH_CHECK_VALUE(there >= bytes, op, ": x must be codes whose last pixel is filled up, of ", bytes, " bytes; got ", there);
}

// What is asked of a convolution beside its sums.
struct Asked {
  std::optional<at::Tensor> residual;
  std::optional<double> low, high;
  bool codes = false;
  Activation next{};

  Asked(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& residual, std::optional<double> low,
        std::optional<double> high, const std::optional<at::Tensor>& next_step, const std::optional<at::Tensor>& next_zero_point,
        int64_t next_bits)
      : residual(residual && residual->defined() ? residual : std::nullopt), low(low), high(high), codes(next_bits != 0) {
    const bool both = next_step && next_step->defined() && next_zero_point && next_zero_point->defined();
    TORCH_CHECK_VALUE(!codes || both, op, ": next_bits must come with next_step and next_zero_point");
    if (codes) next = activation(op, x, *next_step, *next_zero_point, next_bits);
  }

  // Whether kernels do it with their sums: all but what is rarely asked.
  bool on_the_way(at::IntArrayRef sizes) const {
    return !residual || (!codes && residual->sizes() == sizes && residual->scalar_type() == at::kFloat);
  }

  bool anything() const { return residual || low || high || codes; }

  Then then() const {
    Then t;
    if (low) t.low = float(*low);
    if (high) t.high = float(*high);
    t.range = next.range, t.zero_point = next.zero_point;
    // The levels of what is clipped are those between the ends' own: rounding keeps the order.
    const auto level = [&](float end) { return weight::lsq_clip(weight::lsq_round(weight::lsq_divide(end, next.range)), next.range); };
    if (codes) t.range.low = level(t.low), t.range.high = level(t.high);
    return t;
  }

  // Of floats that are there already.
  at::Tensor after(at::Tensor out, const Geometry<int64_t>& g, bool rows) const {
    if (residual) out = at::add(out, *residual);
    if (low || high)
      out = at::clamp(out, low ? std::optional<at::Scalar>(*low) : std::nullopt, high ? std::optional<at::Scalar>(*high) : std::nullopt);
    if (!codes) return out;
    const at::Tensor found = empty_codes(out.sizes(), rows, out.options());
    const Geometry<int64_t> sizes{g.batch, g.out_channels, g.out_height, g.out_width, 0, 0, 0};
    const int64_t one[] = {1, 1}, none[] = {0, 0};
    const Images images(sizes, one, none, 1, rounded_up(g.out_channels, filled_to));
    images.fill(out.contiguous(rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous), rows, next,
                found.data_ptr<uint8_t>());
    return found;
  }
};

}  // namespace quantize::packed
