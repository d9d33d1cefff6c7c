// What a training step asks of a model's modules and gradients: hundreds of them take Python half a millisecond a time, most of it in
// caches that the step itself has emptied.
#pragma once

#include <pybind11/pybind11.h>

namespace quantize::weight {

// modules_of(model, type) -> list: [m for m in model.modules() if isinstance(m, type)].
// held_bytes(model) -> int: of all parameters and buffers, each once.
// all_finite(tensors) -> bool: whether no element is NaN or infinite, nor a tensor's sum. Waits for the device once.
void define_step(pybind11::module_& m);

}  // namespace quantize::weight
