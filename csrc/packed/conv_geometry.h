// The sizes of a 2-D convolution, checked; c10::SymInt in Meta kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace quantize::packed {

template <typename Int>
struct Geometry {
  Int batch, channels, height, width, out_channels, out_height, out_width;
};

template <typename Int>
Int output_size(const Int& size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

template <typename Int>
Geometry<Int> geometry(const char* op, c10::ArrayRef<Int> x, const Int& out_channels, at::IntArrayRef kernel, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(x.size() == 4, op, ": x must be [N, C, H, W]; got ", x);
  TORCH_CHECK_VALUE(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                    ": kernel, stride, padding and dilation must be pairs");
  Geometry<Int> g{x[0], x[1], x[2], x[3], out_channels, 0, 0};
  TORCH_CHECK_VALUE(groups > 0 && g.channels % groups == 0 && out_channels % groups == 0, op, ": groups must divide the channels; got ",
                    groups, " for ", g.channels, " and ", out_channels);
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(kernel[d] > 0 && stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0, op,
                      ": kernel, stride and dilation must be positive and padding not negative");
    constexpr int64_t most = 1 << 24;  // so that their products fit 64 bits
    TORCH_CHECK_VALUE(std::max({kernel[d], stride[d], padding[d], dilation[d]}) <= most, op,
                      ": kernel, stride, padding and dilation must be at most 2^24; got ", kernel, ", ", stride, ", ", padding, " and ",
                      dilation);
  }
  g.out_height = output_size(g.height, kernel[0], stride[0], padding[0], dilation[0]);
  g.out_width = output_size(g.width, kernel[1], stride[1], padding[1], dilation[1]);
  TORCH_CHECK_VALUE(g.out_height > 0 && g.out_width > 0, op, ": x must be at least as large as the kernel; got ", x);
  return g;
}

}  // namespace quantize::packed
