// A tensor's sizes and memory order, kept beside what a backward needs of it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include "../core/saved_numbers.h"
#include "packed_strides.h"

namespace quantize::activation {

struct SavedLayout {
  c10::SymDimVector size, stride;

  explicit SavedLayout(NumberReader& numbers) : size(numbers.get_list()), stride(numbers.get_list()) {}

  // For backward formulas of ATen that read no more of their input than its shape: memory that is never touched.
  at::Tensor empty(const at::TensorOptions& options) const { return at::empty_strided_symint(size, stride, options); }

  // What was kept element by element is in the forward's memory order, and so must the gradient be.
  at::Tensor ordered(const at::Tensor& grad) const {
    return grad.sym_strides() == c10::SymIntArrayRef(stride) ? grad : empty(grad.options()).copy_(grad);
  }
};

inline void save_layout(NumberWriter& numbers, const at::Tensor& x) {
  numbers.put_list(x.sym_sizes());
  numbers.put_list(c10::SymIntArrayRef(packed_strides(x.sym_sizes(), x.sym_strides())));
}

}  // namespace quantize::activation
