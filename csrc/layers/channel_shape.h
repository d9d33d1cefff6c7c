// Values of channels against an activation.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace quantize::layers {

// The view of one value a channel that broadcasts over x.
inline std::vector<int64_t> channel_shape(const at::Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = -1;
  return shape;
}

}  // namespace quantize::layers
