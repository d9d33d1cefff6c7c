// An op with all its arguments but the first, for Python: torch.ops converts each argument of each call, which for a dozen tensors and
// lists takes longer than a small layer.
#pragma once

#include <pybind11/pybind11.h>

namespace quantize::packed {

// BoundOp(name, arguments)(x) -> Tensor
void define_bound_op(pybind11::module_& m);

}  // namespace quantize::packed
