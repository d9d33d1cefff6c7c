// Reading a PoolWindow from op arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../core/checks.h"
#include "pool_indices.h"

namespace quantize::activation {

inline PoolWindow read_pool_window(const char* op, const at::Tensor& x, at::IntArrayRef input_size, at::IntArrayRef kernel,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const int64_t n = static_cast<int64_t>(input_size.size());
  TORCH_CHECK_VALUE(n >= 1 && n <= 3 && x.dim() >= n, op, ": input_size must give 1 to 3 spatial sizes of ", x.sizes(), "; got ",
                    input_size);
  for (const at::IntArrayRef window : {kernel, stride, padding, dilation})
    TORCH_CHECK_VALUE(static_cast<int64_t>(window.size()) == n, op, ": kernel, stride, padding and dilation must each have ", n,
                      " numbers, as input_size ", input_size, "; got ", kernel, ", ", stride, ", ", padding, ", ", dilation);
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_VALUE(input_size[i] > 0 && kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, op,
                      ": input_size, kernel, stride and dilation must be positive and padding not negative; got ", input_size, ", ", kernel,
                      ", ", stride, ", ", dilation, " and ", padding);
  PoolWindow window;
  int64_t positions = 1;
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t i = d - (3 - n);
    const bool present = i >= 0;
    window.input[d] = present ? input_size[i] : 1;
    window.output[d] = present ? x.size(x.dim() - n + i) : 1;
    window.kernel[d] = present ? kernel[i] : 1;
    window.stride[d] = present ? stride[i] : 1;
    window.padding[d] = present ? padding[i] : 0;
    window.dilation[d] = present ? dilation[i] : 1;
    positions *= std::min<int64_t>(window.kernel[d], 257);  // more would do for an overflow
  }
  TORCH_CHECK_VALUE(positions <= 256, op, ": kernel must have at most 256 positions for 8-bit indices; got ", kernel);
  return window;
}

}  // namespace quantize::activation
