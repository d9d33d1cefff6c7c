// Arguments of stem_conv2d, checked, and what it is by ATen: the same on every backend.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/max_pool2d.h>

#include <optional>

#include "../core/checks.h"
#include "conv_geometry.h"
#include "stem_kernels.h"

namespace quantize::packed::stem_call {

// Int: c10::SymInt in Meta kernels.
template <typename Int>
Geometry<Int> sizes(c10::ArrayRef<Int> x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding) {
  const char* op = "stem_conv2d";
  using T = StemTraits;
  const auto fits = [](int64_t taps) { return taps >= T::fewest_taps && taps <= T::most_taps; };
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(1) >= 1 && weight.size(1) <= T::most_channels && fits(weight.size(2)) && fits(weight.size(3)), op,
      ": weight must be [N, 1 to ", T::most_channels, ", ", T::fewest_taps, " to ", T::most_taps, ", ", T::fewest_taps, " to ",
      T::most_taps, "]; got ", weight.sizes());
  TORCH_CHECK_VALUE(x.size() == 4 && x[1] == weight.size(1), op, ": x must be [N, ", weight.size(1), ", H, W]; got ", x);
  TORCH_CHECK_VALUE(stride == at::IntArrayRef({T::step, T::step}), op, ": stride must be [", T::step, ", ", T::step, "]; got ", stride);
  const int64_t one[2] = {1, 1};
  return geometry<Int>(op, x, weight.size(0), weight.sizes().slice(2), stride, padding, one, 1);
}

inline void check(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& panels) {
  const char* op = "stem_conv2d";
  check_dtype(op, "x", x, at::kFloat);
  check_dtype(op, "weight", weight, at::kFloat);
  check_dtype(op, "panels", panels, at::kFloat);
  check_same_device(op, "weight", weight, x);
  check_same_device(op, "panels", panels, x);
  const int64_t n = weight.size(0), steps = StemSizes(weight.size(2), weight.size(3), weight.size(1), 1).steps();
  const int64_t shape[] = {(n + StemTraits::columns - 1) / StemTraits::columns, steps, StemTraits::columns};
  TORCH_CHECK_VALUE(panels.sizes() == at::IntArrayRef(shape) && panels.is_contiguous(), op, ": panels must be contiguous ",
                    at::IntArrayRef(shape), "; got ", panels.sizes());
  if (!bias || !bias->defined()) return;
  check_dtype(op, "bias", *bias, at::kFloat);
  check_same_device(op, "bias", *bias, x);
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n, op, ": bias must be [", n, "]; got ", bias->sizes());
}

// Of the pool behind it; empty: there is none.
struct Window {
  at::IntArrayRef size, stride, padding;
};

inline at::Tensor plain(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                        at::IntArrayRef padding, std::optional<double> low, std::optional<double> high, const Window& window) {
  at::Tensor y = at::conv2d(x, weight, bias, stride, padding);
  if (low || high) y = at::clamp(y, low, high);
  return window.size.empty() ? y : at::max_pool2d(y, window.size, window.stride, window.padding);
}

}  // namespace quantize::packed::stem_call
