// From op arguments to what the CUDA kernels of group_quantize and group_dequantize take.
#pragma once

#include "../core/launch.h"
#include "group_layout.h"
#include "group_plan.cuh"

namespace quantize::activation {

// x: the unpacked tensor. sample_bits, if given: uint8 [samples], contiguous, on the device.
inline GroupPlan plan_groups(const char* op, const GroupLayout<int64_t>& layout, Seed seed, int64_t bits,
                             const std::optional<at::Tensor>& sample_bits, const at::Tensor& codes, const at::Tensor& x, Launcher& launch) {
  TORCH_CHECK_VALUE(layout.total_groups() <= 0xffffffffll, op, ": x has ", layout.total_groups(), " groups; expected less than 2^32");
  PackedGroups p{};
  p.samples = layout.samples, p.elements = layout.elements, p.group_size = layout.group_size, p.groups = layout.groups;
  p.capacity = codes.numel(), p.bits = int(bits), p.seed = seed;
  if (sample_bits) {
    p.sample_bits = sample_bits->const_data_ptr<uint8_t>();
    auto* offsets = launch.scratch<int64_t>(layout.samples + 1);
    launch(sample_offsets, dim3(1), PlaceTraits::threads, p, offsets);
    p.offsets = offsets;
  } else {
    TORCH_CHECK_VALUE(layout.bytes(bits) <= codes.numel(), op, ": the samples' bits need ", layout.bytes(bits),
                      " bytes of codes; there are ", codes.numel());
  }
  return GroupPlan(p, x.const_data_ptr(), x.element_size(), codes.const_data_ptr());
}

}  // namespace quantize::activation
