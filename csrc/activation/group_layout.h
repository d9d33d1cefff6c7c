// How a tensor's memory is cut into samples and groups: shared by group_quantize's CPU, CUDA and Meta implementations and by the layers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include <optional>

#include "../core/checks.h"
#include "../core/seed.h"
#include "group_format.h"
#include "packed_strides.h"

namespace quantize::activation {

// Special values of an op's group_size argument.
constexpr int64_t group_is_sample = 0;   // one range for each sample
constexpr int64_t group_is_tensor = -1;  // one range for all

// T is int64_t, or SymInt where shapes are traced.
template <typename T>
struct GroupLayout {
  T samples, elements, group_size, groups;  // elements and groups: of one sample

  T total_groups() const { return samples * groups; }
  T bytes(int64_t bits) const {
    return samples * (elements / group_size * ((group_size * bits + 7) / 8) + (elements % group_size * bits + 7) / 8);
  }
  // Upper bound of the bytes of codes when the samples' bits add up to `budget`: a group of odd size may waste part of a byte.
  T bytes_within(int64_t budget) const {
    const T loose_groups = (group_size % 8 != 0 ? elements / group_size : T(0)) + (elements % group_size % 8 != 0 ? T(1) : T(0));
    return (elements * budget + 7) / 8 + samples * loose_groups;
  }
};

template <typename T, typename Sizes>
GroupLayout<T> group_layout(const char* op, const Sizes& sizes, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size >= group_is_tensor, op, ": group_size must be positive, 0 (one sample) or -1 (the tensor); got ",
                    group_size);
  T numel = 1;
  for (const auto& size : sizes) numel = numel * size;
  const T samples = group_size == group_is_tensor || sizes.size() == 0 ? T(1) : T(sizes[0]);
  const T elements = samples == 0 || numel == 0 ? T(0) : numel / samples;
  T size = elements == 0 ? T(1) : elements;
  if (group_size > 0 && size > group_size) size = group_size;
  return {samples, elements, size, (elements + size - 1) / size};
}

inline at::Tensor packed_memory(const at::Tensor& x) {
  return packed_strides(x.sizes(), x.strides()) == x.strides().vec() ? x : x.contiguous();
}

// Nothing yet, of the sizes and strides that packed_memory gives.
inline at::Tensor empty_packed(const at::Tensor& x) {
  return at::empty_strided_symint(x.sym_sizes(), packed_strides(x.sym_sizes(), x.sym_strides()), x.options());
}

// Contiguous. x: the packed tensor, or the unpacked one.
inline std::optional<at::Tensor> check_sample_bits(const char* op, const std::optional<at::Tensor>& sample_bits, int64_t samples,
                                                   const at::Tensor& x) {
  if (!sample_bits) return std::nullopt;
  check_dtype(op, "sample_bits", *sample_bits, at::kByte);
  check_numel(op, "sample_bits", *sample_bits, samples);
  check_same_device(op, "sample_bits", *sample_bits, x);
  return sample_bits->contiguous();
}

}  // namespace quantize::activation
