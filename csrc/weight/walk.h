// Walks over a model's modules, in a training step: hundreds of them take Python half a millisecond, most of it in cold caches.
#pragma once

#include <pybind11/pybind11.h>

namespace quantize::weight {

// every_module(model) -> list: what list(model.modules()) is, each once and in its order.
// held_bytes(model) -> int: of all parameters and buffers, each once.
void define_walk(pybind11::module_& m);

}  // namespace quantize::weight
