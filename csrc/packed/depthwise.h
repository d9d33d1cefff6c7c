// Convolutions whose groups have one input channel each.
#pragma once

#include <ATen/core/Tensor.h>

#include "../weight/lsq.h"
#include "bit_planes.h"
#include "panels.h"

namespace quantize::packed {

// out = float(dot) * step * scales + bias, to the bit what the products of bytes give. x: float32, contiguous or channels last, as `rows`
// says and `out` lies. panels: float32 [N / C, taps, C filled up to sixteens], the weights' levels: whole numbers within +-127; output
// channel n is [n % (N / C), :, n / (N / C)].
void conv2d_of_channels(const char* op, const at::Tensor& x, const ConvShape& shape, bool rows, const weight::LsqRange& range,
                        const at::Tensor& panels, const Epilogue& epilogue, const at::Tensor& out);

}  // namespace quantize::packed
