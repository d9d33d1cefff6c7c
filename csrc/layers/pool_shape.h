// Max pools over images as max_pool_kernels.h takes them.
#pragma once

#include <c10/util/ArrayRef.h>

#include <optional>

#include "max_pool_kernels.h"

namespace quantize::layers {

// Of an input [.., height, width]. Nothing where the kernels do not take it, or where PyTorch has an error to give.
std::optional<PoolShape> pool_shape(c10::IntArrayRef size, c10::IntArrayRef kernel, c10::IntArrayRef stride, c10::IntArrayRef padding,
                                    c10::IntArrayRef dilation, bool ceil_mode);

}  // namespace quantize::layers
