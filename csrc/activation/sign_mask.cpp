// clip_mask, clip_mask_, pack_mask and apply_mask: CPU and Meta. One bit an element, in memory order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "sign_mask_call.h"

namespace quantize::activation {

const MaskKernels& mask_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, mask_kernels)[int(scalar)]; }

namespace {

using at::Tensor;

constexpr int64_t grain = 32768;  // elements a task; a multiple of 8, so that tasks meet on whole bytes

template <typename F>
void for_each_span(int64_t n, const F& body) {  // body(first element, elements); the first is a multiple of 8
  at::parallel_for(0, mask_bytes(n), grain / 8, [&](int64_t begin, int64_t end) { body(begin * 8, std::min(n, end * 8) - begin * 8); });
}

void clip_into(const Tensor& x, double low, double high, double negative_slope, const Tensor& y, const Tensor& mask) {
  const Scalar scalar = check_scalar("clip_mask", "x", x.scalar_type());
  const int64_t item = x.element_size();
  const Clip clip{float(low), float(high), float(negative_slope)};
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.data_ptr());
  auto* bits = mask.data_ptr<uint8_t>();
  for_each_span(x.numel(), [&](int64_t first, int64_t n) {
    mask_kernels(cpu_isa(), scalar).clip(source + first * item, n, clip, target + first * item, bits + first / 8);
  });
}

std::tuple<Tensor, Tensor> clip_mask_cpu(const Tensor& input, double low, double high, double negative_slope) {
  const Tensor x = packed_memory(input);
  Tensor y = at::empty_strided(x.sizes(), x.strides(), x.options()), mask = empty_mask(x);
  clip_into(x, low, high, negative_slope, y, mask);
  return {y, mask};
}

Tensor clip_mask_inplace_cpu(Tensor& x, double low, double high, double negative_slope) {
  check_clip_in_place(x);
  Tensor mask = empty_mask(x);
  clip_into(x, low, high, negative_slope, x, mask);
  return mask;
}

// Bit i for boolean i: a product moves each byte's lowest bit to its place in the highest byte.
uint8_t bits_of(const bool* source, int64_t count) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, source, count);
  return uint8_t(bytes * 0x0102040810204080u >> 56);
}

Tensor pack_mask_cpu(const Tensor& input) {
  check_dtype("pack_mask", "mask", input, at::kBool);
  const Tensor mask = packed_memory(input);
  Tensor packed = empty_mask(mask);
  const bool* source = mask.const_data_ptr<bool>();
  auto* bits = packed.data_ptr<uint8_t>();
  for_each_span(mask.numel(), [&](int64_t first, int64_t n) {
    const bool* own = source + first;
    for (int64_t byte = 0; byte < mask_bytes(n); ++byte)
      bits[first / 8 + byte] = bits_of(own + 8 * byte, std::min<int64_t>(8, n - 8 * byte));
  });
  return packed;
}

Tensor apply_mask_cpu(const Tensor& input, const Tensor& mask, double on, double off) {
  const Scalar scalar = check_apply_mask(input, mask);
  const Tensor grad = packed_memory(input), own_mask = mask.contiguous();
  Tensor out = at::empty_strided(grad.sizes(), grad.strides(), grad.options());
  const int64_t item = grad.element_size();
  const auto* source = static_cast<const uint8_t*>(grad.const_data_ptr());
  auto* target = static_cast<uint8_t*>(out.data_ptr());
  const auto* bits = own_mask.const_data_ptr<uint8_t>();
  for_each_span(grad.numel(), [&](int64_t first, int64_t n) {
    mask_kernels(cpu_isa(), scalar).apply(source + first * item, bits + first / 8, n, float(on), float(off), target + first * item);
  });
  return out;
}

Tensor empty_mask_meta(const Tensor& x) { return at::empty_symint({(x.sym_numel() + 7) / 8}, x.options().dtype(at::kByte)); }

std::tuple<Tensor, Tensor> clip_mask_meta(const Tensor& x, double, double, double) { return {empty_packed(x), empty_mask_meta(x)}; }
Tensor clip_mask_inplace_meta(Tensor& x, double, double, double) { return empty_mask_meta(x); }
Tensor pack_mask_meta(const Tensor& mask) { return empty_mask_meta(mask); }
Tensor apply_mask_meta(const Tensor& grad, const Tensor&, double, double) { return empty_packed(grad); }

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("clip_mask", clip_mask_cpu);
  m.impl("clip_mask_", clip_mask_inplace_cpu);
  m.impl("pack_mask", pack_mask_cpu);
  m.impl("apply_mask", apply_mask_cpu);
}

TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("clip_mask", clip_mask_meta);
  m.impl("clip_mask_", clip_mask_inplace_meta);
  m.impl("pack_mask", pack_mask_meta);
  m.impl("apply_mask", apply_mask_meta);
}

}  // namespace quantize::activation
