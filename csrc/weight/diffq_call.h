// The arguments of the diffq ops, checked and read: the same for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../core/checks.h"
#include "../core/seed.h"
#include "diffq_kernels.h"

namespace quantize::weight {

// What each tensor of a call has, in lists of equal length.
struct DiffQLists {
  at::TensorList logits;
  at::IntArrayRef streams, group_sizes, spans;
  at::ArrayRef<double> min_bits, max_bits;
};

inline int64_t count_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline BitsBounds bits_bounds(const char* op, double low, double high) {
  TORCH_CHECK_VALUE(1 <= low && low <= high && high <= 16, op, ": min_bits and max_bits must be 1 <= min_bits <= max_bits <= 16; got ", low,
                    " and ", high);
  const float least = float(std::ceil(low)), greatest = float(std::floor(high));
  return {float(low), float(high - low), least, std::max(least, greatest)};
}

inline void check_lists(const char* op, const DiffQLists& lists, size_t tensors) {
  for (size_t length : {lists.logits.size(), lists.streams.size(), lists.group_sizes.size(), lists.spans.size(), lists.min_bits.size(),
                        lists.max_bits.size()})
    TORCH_CHECK_VALUE(length == tensors && tensors > 0, op, ": lists must have an entry for each of the ", tensors, " weights; got ",
                      length);
  for (size_t i = 0; i < tensors; ++i) {
    TORCH_CHECK_VALUE(lists.group_sizes[i] >= 1 && lists.spans[i] >= 1, op, ": group_sizes and spans must be at least 1; got ",
                      lists.group_sizes[i], " and ", lists.spans[i]);
    check_same_device(op, "logits", lists.logits[i], lists.logits[0]);  // one launch takes all of them; weights lie where their logits do
  }
}

inline void check_logits(const char* op, const at::Tensor& logits, int64_t n, int64_t group_size) {
  check_dtype(op, "logits", logits, at::kFloat);
  check_numel(op, "logits", logits, count_of(n, group_size));
  TORCH_CHECK_VALUE(logits.is_contiguous(), op, ": logits must be contiguous; got strides ", logits.strides());
}

// Tensor i of a call; `logits` and `ranges` may be on any device.
inline DiffQTensor diffq_tensor(const char* op, const DiffQLists& lists, size_t i, const at::Tensor& w, float* ranges, Seed seed,
                                const std::optional<at::Tensor>& quantiles) {
  const int64_t n = w.numel(), group_size = std::min(lists.group_sizes[i], n), span = std::min(lists.spans[i], n);
  TORCH_CHECK_VALUE(n > 0 && n < INT32_MAX, op, ": weights must have 1 to 2^31 - 2 elements each; got ", w.sizes());
  check_logits(op, lists.logits[i], n, group_size);
  check_same_device(op, "logits", lists.logits[i], w);
  if (quantiles) {
    check_dtype(op, "quantiles", *quantiles, at::kFloat);
    check_numel(op, "quantiles", *quantiles, 65536);
    check_same_device(op, "quantiles", *quantiles, w);
  }
  return {n,
          group_size,
          span,
          lists.logits[i].const_data_ptr<float>(),
          ranges,
          bits_bounds(op, lists.min_bits[i], lists.max_bits[i]),
          seed,
          uint32_t(lists.streams[i]),
          quantiles ? quantiles->const_data_ptr<float>() : nullptr};
}

// What the forward made, given back to the backward, whose gradients are changed in place.
inline void check_made(const char* op, const DiffQLists& lists, at::TensorList grads, at::TensorList ranges, at::TensorList extremes) {
  TORCH_CHECK_VALUE(ranges.size() == grads.size() && extremes.size() == grads.size(), op,
                    ": ranges and extremes must have an entry for each of the ", grads.size(), " weights; got ", ranges.size(), " and ",
                    extremes.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t rows = count_of(grads[i].numel(), lists.spans[i]);
    TORCH_CHECK_VALUE(grads[i].is_contiguous() && extremes[i].is_contiguous(), op, ": grads and extremes must be contiguous; got strides ",
                      grads[i].strides(), " and ", extremes[i].strides());
    check_dtype(op, "ranges", ranges[i], at::kFloat);
    check_dtype(op, "extremes", extremes[i], at::kInt);
    for (const auto& [name, made] : {std::pair{"ranges", ranges[i]}, std::pair{"extremes", extremes[i]}}) {
      check_numel(op, name, made, 2 * rows);
      check_same_device(op, name, made, grads[i]);
    }
  }
}

inline std::vector<at::Tensor> cloned(at::TensorList tensors) {
  std::vector<at::Tensor> copies;
  for (const at::Tensor& t : tensors) copies.push_back(t.clone(at::MemoryFormat::Contiguous));
  return copies;
}

// The lists of the ops that count bits.
inline void check_bits_lists(const char* op, at::TensorList logits, at::IntArrayRef numels, at::IntArrayRef group_sizes,
                             at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits) {
  check_lists(op, {logits, numels, group_sizes, numels, min_bits, max_bits}, numels.size());
  for (size_t i = 0; i < numels.size(); ++i) check_logits(op, logits[i], numels[i], group_sizes[i]);
}

inline void check_bits_backward(const char* op, const at::Tensor& grad, at::TensorList logits, at::IntArrayRef numels,
                                at::IntArrayRef group_sizes, at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits) {
  check_bits_lists(op, logits, numels, group_sizes, min_bits, max_bits);
  check_dtype(op, "grad", grad, at::kFloat);
  check_numel(op, "grad", grad, numels.size());
  check_same_device(op, "grad", grad, logits[0]);
}

}  // namespace quantize::weight
