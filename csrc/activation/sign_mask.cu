// clip_mask, clip_mask_, pack_mask and apply_mask on CUDA. Build: setup.py. Specification: sign_mask_kernels.h.
#include "sign_mask.cuh"

#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "../core/launch.h"
#include "sign_mask_call.h"

namespace quantize::activation {
namespace {

using at::Tensor;

void clip_into(const Tensor& x, double low, double high, double negative_slope, const Tensor& y, const Tensor& mask, Launcher& launch) {
  const Scalar scalar = check_scalar("clip_mask", "x", x.scalar_type());
  if (x.numel() == 0) return;
  const Clip clip{float(low), float(high), float(negative_slope)};
  with_type(scalar, [&]<typename T>(T) {
    launch_clip_mask(static_cast<const T*>(x.const_data_ptr()), x.numel(), clip, static_cast<T*>(y.mutable_data_ptr()),
                     mask.mutable_data_ptr<uint8_t>(), launch);
  });
}

std::tuple<Tensor, Tensor> clip_mask_cuda(const Tensor& input, double low, double high, double negative_slope) {
  Launcher launch(input);
  const Tensor x = packed_memory(input);
  Tensor y = at::empty_strided(x.sizes(), x.strides(), x.options()), mask = empty_mask(x);
  clip_into(x, low, high, negative_slope, y, mask, launch);
  return {y, mask};
}

Tensor clip_mask_inplace_cuda(Tensor& x, double low, double high, double negative_slope) {
  check_clip_in_place(x);
  Launcher launch(x);
  Tensor mask = empty_mask(x);
  clip_into(x, low, high, negative_slope, x, mask, launch);
  return mask;
}

Tensor pack_mask_cuda(const Tensor& input) {
  check_dtype("pack_mask", "mask", input, at::kBool);
  Launcher launch(input);
  const Tensor mask = packed_memory(input);
  Tensor packed = empty_mask(mask);
  if (mask.numel() > 0)
    launch_pack_mask(reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()), mask.numel(), packed.mutable_data_ptr<uint8_t>(),
                     launch);
  return packed;
}

Tensor apply_mask_cuda(const Tensor& input, const Tensor& mask, double on, double off) {
  const Scalar scalar = check_apply_mask(input, mask);
  Launcher launch(input);
  const Tensor grad = packed_memory(input), bits = mask.contiguous();
  Tensor out = at::empty_strided(grad.sizes(), grad.strides(), grad.options());
  if (grad.numel() == 0) return out;
  with_type(scalar, [&]<typename T>(T) {
    launch_apply_mask(static_cast<const T*>(grad.const_data_ptr()), bits.const_data_ptr<uint8_t>(), grad.numel(), float(on), float(off),
                      static_cast<T*>(out.mutable_data_ptr()), launch);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("clip_mask", clip_mask_cuda);
  m.impl("clip_mask_", clip_mask_inplace_cuda);
  m.impl("pack_mask", pack_mask_cuda);
  m.impl("apply_mask", apply_mask_cuda);
}

}  // namespace quantize::activation
