// max_pool_offsets, max_pool_values, max_pool_backward: kernels over images on the CPU; for all the rest PyTorch's own, whose indices
// become offsets.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <ATen/ops/max_pool3d.h>
#include <ATen/ops/max_pool3d_with_indices.h>
#include <ATen/ops/max_pool3d_with_indices_backward.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/checks.h"
#include "../core/dispatch.h"
#include "../core/grain.h"
#include "pool_shape.h"

namespace quantize::layers {
namespace {

using at::IntArrayRef;
using at::Tensor;
using std::tuple;
using SymInts = c10::SymIntArrayRef;
using PoolIndices = Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef);

constexpr int64_t grain = 1 << 14;  // taps

tuple<Tensor, Tensor> offsets_of_indices(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                         bool ceil_mode) {
  static const auto pack = find_op<PoolIndices>("quantize::pack_pool_indices");
  auto [y, indices] = kernel.size() == 2 ? at::max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
                                         : at::max_pool3d_with_indices(x, kernel, stride, padding, dilation, ceil_mode);
  const Tensor offsets = pack.call(indices, x.sizes().slice(x.dim() - kernel.size()), kernel, stride, padding, dilation);
  return {y, offsets.contiguous(y.suggest_memory_format())};
}

Tensor values(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  return kernel.size() == 2 ? at::max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
                            : at::max_pool3d(x, kernel, stride, padding, dilation, ceil_mode);
}

Tensor backward_of_indices(const Tensor& grad, const Tensor& offsets, SymInts sizes, SymInts strides, IntArrayRef kernel,
                           IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  static const auto unpack = find_op<PoolIndices>("quantize::unpack_pool_indices");
  const Tensor indices = unpack.call(offsets, size.slice(size.size() - kernel.size()), kernel, stride, padding, dilation);
  const Tensor input = at::empty_strided_symint(sizes, strides, grad.options());  // its shape is read, its memory never touched
  return kernel.size() == 2 ? at::max_pool2d_with_indices_backward(grad, input, kernel, stride, padding, dilation, ceil_mode, indices)
                            : at::max_pool3d_with_indices_backward(grad, input, kernel, stride, padding, dilation, ceil_mode, indices);
}

bool channels_last(const Tensor& x) { return x.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

// y and, if `wanted`, the offsets. Nothing where the kernels do not take the input.
std::optional<tuple<Tensor, Tensor>> pool_images(const char* op, const Tensor& input, IntArrayRef kernel, IntArrayRef stride,
                                                 IntArrayRef padding, IntArrayRef dilation, bool ceil_mode, bool wanted) {
  const auto shape = pool_shape(input.sizes(), kernel, stride, padding, dilation, ceil_mode);
  const bool floats = input.scalar_type() == at::kFloat || at::isReducedFloatingType(input.scalar_type());
  if (!shape || !floats || input.numel() == 0) return std::nullopt;
  const auto& s = *shape;
  const bool rows = channels_last(input);
  const auto format = rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor x = input.contiguous(format);
  std::vector<int64_t> size = x.sizes().vec();
  const int64_t channels = size[size.size() - 3], plane = s.input[0] * s.input[1], out = s.output[0] * s.output[1];
  std::copy(s.output, s.output + 2, size.end() - 2);
  Tensor y = at::empty(size, x.options(), format), offsets;
  if (wanted) offsets = at::empty(size, x.options().dtype(at::kByte), format);
  const auto& kernels = max_pool_kernels(cpu_isa(), check_scalar(op, "input", x.scalar_type()));
  const int64_t bytes = x.element_size(), taps = s.kernel[0] * s.kernel[1];
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  auto* places = wanted ? offsets.mutable_data_ptr<uint8_t>() : nullptr;
  const auto offsets_at = [&](int64_t i) { return wanted ? places + i : nullptr; };
  if (rows) {
    const int64_t row = channels * s.output[1];
    at::parallel_for(0, size[0] * s.output[0], grain_of(grain, row * taps), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(wanted ? 0 : s.row_scratch(channels) / sizeof(float));
      for (int64_t i = begin; i < end; ++i)
        kernels.row(source + i / s.output[0] * plane * channels * bytes, channels, s, i % s.output[0], target + i * row * bytes,
                    offsets_at(i * row), scratch.data());
    });
  } else {
    at::parallel_for(0, x.numel() / plane, grain_of(grain, out * taps), [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(s.scratch() / sizeof(float));
      for (int64_t i = begin; i < end; ++i)
        kernels.plane(source + i * plane * bytes, s, target + i * out * bytes, offsets_at(i * out), scratch.data());
    });
  }
  return std::tuple(y, offsets);
}

tuple<Tensor, Tensor> max_pool_offsets_cpu(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                           IntArrayRef dilation, bool ceil_mode) {
  if (auto made = pool_images("max_pool_offsets", input, kernel, stride, padding, dilation, ceil_mode, true)) return *made;
  return offsets_of_indices(input, kernel, stride, padding, dilation, ceil_mode);
}

Tensor max_pool_values_cpu(const Tensor& input, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                           bool ceil_mode) {
  if (auto made = pool_images("max_pool_values", input, kernel, stride, padding, dilation, ceil_mode, false)) return std::get<0>(*made);
  return values(input, kernel, stride, padding, dilation, ceil_mode);
}

// Adds each gradient to where its maximum was: output by output, as PyTorch does, since sums depend on the order. False if an offset lies
// outside of the input.
template <typename T>
bool scatter(const PoolShape& s, int64_t images, int64_t inner, const T* grad, const uint8_t* offsets, T* grad_input) {
  std::array<int64_t, 256> step{};  // from a window's begin to each of its taps
  const int64_t taps = s.kernel[0] * s.kernel[1];
  const auto row_of = [&](int64_t tap) { return tap / s.kernel[1] * s.dilation[0]; };
  const auto column_of = [&](int64_t tap) { return tap % s.kernel[1] * s.dilation[1]; };
  for (int64_t tap = 0; tap < taps; ++tap) step[tap] = (row_of(tap) * s.input[1] + column_of(tap)) * inner;
  const int64_t input = s.input[0] * s.input[1] * inner, output = s.output[0] * s.output[1] * inner;
  std::vector<uint8_t> whole[2];  // windows that lie in the input with all of their taps
  for (int d = 0; d < 2; ++d)
    for (int64_t o = 0; o < s.output[d]; ++o) whole[d].push_back(s.start(d, o) >= 0 && s.end_tap(d, s.start(d, o)) == s.kernel[d]);
  std::atomic<bool> inside = true;
  at::parallel_for(0, images, grain_of(grain, output), [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t i = begin; i < end; ++i) {
      const T* g = grad + i * output;
      const uint8_t* offset = offsets + i * output;
      for (int64_t h = 0; h < s.output[0]; ++h)
        for (int64_t w = 0; w < s.output[1]; ++w, g += inner, offset += inner) {
          const int64_t top = s.start(0, h), left = s.start(1, w);
          T* window = grad_input + i * input + (top * s.input[1] + left) * inner;
          const auto add = [&](const auto& lies_inside) __attribute__((always_inline)) {
            for (int64_t c = 0; c < inner; ++c)
              if (offset[c] < taps && lies_inside(offset[c]))
                window[step[offset[c]] + c] += g[c];
              else
                all = false;
          };
          if (whole[0][h] & whole[1][w])
            add([](int64_t) { return true; });
          else
            add([&](int64_t tap) {
              const int64_t row = top + row_of(tap), column = left + column_of(tap);
              return row >= 0 && row < s.input[0] && column >= 0 && column < s.input[1];
            });
        }
    }
    if (!all) inside = false;
  });
  return inside;
}

Tensor max_pool_backward_cpu(const Tensor& grad, const Tensor& offsets, SymInts sizes, SymInts strides, IntArrayRef kernel,
                             IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const char* op = "max_pool_backward";
  check_dtype(op, "offsets", offsets, at::kByte);
  TORCH_CHECK_VALUE(offsets.sizes() == grad.sizes(), op, ": offsets must be as many as the gradients, ", grad.sizes(), "; got ",
                    offsets.sizes());
  const auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  const auto shape = pool_shape(size, kernel, stride, padding, dilation, ceil_mode);
  std::vector<int64_t> expected = size.vec();
  if (shape) std::copy(shape->output, shape->output + 2, expected.end() - 2);
  if (!shape || grad.numel() == 0 || grad.sizes() != IntArrayRef(expected))
    return backward_of_indices(grad, offsets, sizes, strides, kernel, stride, padding, dilation, ceil_mode);
  const bool rows = channels_last(at::empty_strided(size, C10_AS_INTARRAYREF_SLOW(strides), grad.options()));
  const auto format = rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  Tensor result = at::empty(size, grad.options(), format).zero_();
  const Tensor g = grad.contiguous(format), places = offsets.contiguous(format);
  const int64_t channels = rows ? size[1] : 1, images = result.numel() / (shape->input[0] * shape->input[1] * channels);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, g.scalar_type(), "max_pool_backward", [&] {
    TORCH_CHECK_VALUE(scatter(*shape, images, channels, g.const_data_ptr<scalar_t>(), places.const_data_ptr<uint8_t>(),
                              result.mutable_data_ptr<scalar_t>()),
                      "max_pool_backward: offsets must lie in windows of ", kernel, " and in the input; some do not");
  });
  return result;
}

Tensor max_pool_backward_meta(const Tensor& grad, const Tensor&, SymInts sizes, SymInts strides, IntArrayRef, IntArrayRef, IntArrayRef,
                              IntArrayRef, bool) {
  const Tensor like = at::empty_strided_symint(sizes, strides, grad.options());
  return at::empty_symint(sizes, grad.options(), like.suggest_memory_format());
}

tuple<Tensor, Tensor> max_pool_offsets_meta(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                                            IntArrayRef dilation, bool ceil_mode) {
  const Tensor y = values(x, kernel, stride, padding, dilation, ceil_mode);
  return {y, at::empty_like(y, y.options().dtype(at::kByte))};
}

}  // namespace

std::optional<PoolShape> pool_shape(IntArrayRef size, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                    bool ceil_mode) {
  if (size.size() < 3 || size.size() > 4) return std::nullopt;
  for (const IntArrayRef own : {kernel, stride, padding, dilation})
    if (own.size() != 2) return std::nullopt;
  constexpr int64_t most = int64_t(1) << 31;  // numbers whose products 64 bits hold
  PoolShape s;
  for (int d = 0; d < 2; ++d) {
    const int64_t n = size[size.size() - 2 + d], k = kernel[d], pad = padding[d];
    if (n < 1 || k < 1 || k > 256 || stride[d] < 1 || dilation[d] < 1 || std::max({n, stride[d], dilation[d]}) > most || pad < 0 ||
        2 * pad > k)
      return std::nullopt;
    const int64_t room = n + 2 * pad - dilation[d] * (k - 1) - 1;
    if (room < 0) return std::nullopt;
    int64_t out = (room + (ceil_mode ? stride[d] - 1 : 0)) / stride[d] + 1;
    if (ceil_mode && (out - 1) * stride[d] >= n + pad) --out;
    s.input[d] = n, s.output[d] = out, s.kernel[d] = k, s.stride[d] = stride[d], s.padding[d] = pad, s.dilation[d] = dilation[d];
    for (int64_t o = 0; o < out; ++o)
      if (s.first_tap(d, s.start(d, o)) >= s.end_tap(d, s.start(d, o))) return std::nullopt;
  }
  return s.kernel[0] * s.kernel[1] <= 256 ? std::optional(s) : std::nullopt;
}

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("max_pool_offsets", max_pool_offsets_cpu);
  m.impl("max_pool_values", max_pool_values_cpu);
  m.impl("max_pool_backward", max_pool_backward_cpu);
}

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("max_pool_offsets", offsets_of_indices);
  m.impl("max_pool_values", values);
  m.impl("max_pool_backward", backward_of_indices);
}

TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("max_pool_offsets", max_pool_offsets_meta);
  m.impl("max_pool_values", values);
  m.impl("max_pool_backward", max_pool_backward_meta);
}

}  // namespace quantize::layers
