// What a packed layer's call from Python would else take longer for than for the layer: torch.ops converts each of a dozen arguments at
// each call, and a loop in Python looks whether the buffers are still those that they were made of.
#pragma once

#include <pybind11/pybind11.h>

namespace quantize::packed {

// BoundOp(name, arguments)(x, **named) -> Tensor: an op with all its arguments but the first, defaults where there are fewer; those named
// in a call take their places.
// Watch([(dictionary, key, object), ...], sizes=[dictionary, ...]).unchanged() -> bool: watch.h
// Region().enter(), .leave(), .is_entered() -> bool: whether this thread is in the forward of some module.
// Call(watch, wrap, region).add(dtype, dims, axis, size, op[, most])...; (x) -> Tensor | None: what `op` gives, or wrap(op, x), if x is as
// one of the cases has it, with no more than `most` rows, `watch` has seen no change, `region`, if any, is entered, and value_only(x).
// in_transform(), value_only(x) -> bool: when layers must step aside, with ops that PyTorch can differentiate and trace.
void define_bound_op(pybind11::module_& m);

}  // namespace quantize::packed
