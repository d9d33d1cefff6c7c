// Ops of layers that train, for Python to call past torch.ops, which takes as long to match and convert a dozen arguments as a small layer
// takes to compute. The same ops by way of the same dispatcher; what the way round it leaves out are overrides of __torch_function__, and
// tracing by torch.compile.
#pragma once

#include <pybind11/pybind11.h>

namespace quantize::layers {

// The submodule `direct`: functions of the ops' names and arguments, the latter by position.
void define_direct(pybind11::module_& m);

}  // namespace quantize::layers
