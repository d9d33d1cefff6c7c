// Convolutions of few bits as sums of binary ones: with inputs x = sum_i 2^i x_i of {0, 1} and weights w = sum_j 2^j w_j of signs,
//
//   dot(x, w) = sum_ij 2^(i + j) dot(x_i, w_j),
//
// each by the lookups of binary_kernels.h. On AVX2 two such products take about two thirds of the time of one of bytes, four longer; with
// VNNI or tiles bytes are faster.
#pragma once

#include <ATen/core/Tensor.h>

#include "../weight/lsq.h"
#include "conv_geometry.h"

namespace quantize::packed {

inline constexpr int most_planes = 2;  // of inputs, and of weights

struct ConvShape {
  const Geometry<int64_t>& sizes;
  at::IntArrayRef kernel, stride, padding, dilation;
  int64_t groups;
};

// out = float(dot) * step * scales + bias. x: float32, contiguous or channels last, as `rows` says and `out` lies; its levels are those of
// `range`, from zero on, of `input_planes` bits. panels: uint8 [weight planes, groups, ceil(N / groups / 4), quads, 4], as
// quantize/packed/binary_panels.py makes them. sums: int32 [N], of the weights' levels.
void conv2d_of_bit_planes(const char* op, const at::Tensor& x, const ConvShape& shape, bool rows, const weight::LsqRange& range,
                          int64_t input_planes, const at::Tensor& panels, const at::Tensor& sums, const at::Tensor& scales,
                          const std::optional<at::Tensor>& bias, const at::Tensor& out);

}  // namespace quantize::packed
