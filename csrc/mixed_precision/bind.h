// The allocator for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace quantize::mixed_precision {

// allocate(matrix, costs, limits, preference, allowed, seconds) -> dict
void define_allocate(pybind11::module_& m);

}  // namespace quantize::mixed_precision
