// The ops that a model's forward calls, to be called again on other inputs of the same sizes without Python in between.
#pragma once

#include <pybind11/pybind11.h>

namespace quantize::packed {

// Tape(inputs): as a context manager it records what add() is told.
//   .add(name, overload, args, kwargs, result, varies): an op that was called so. varies: whatever its arguments are, as noise does.
//   .varies(values) -> bool: whether there is a tensor in these lists that another call may find other values in.
//   .finish(outputs): what is to be given back.
//   (inputs) -> list of outputs, or None where an input is of another kind, size or memory order than that recorded, or autocast is set
//   otherwise. ValueError where a size inside is another, which then depends on values.
void define_tape(pybind11::module_& m);

}  // namespace quantize::packed
