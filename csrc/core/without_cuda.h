// For builds without CUDA.
#pragma once

namespace quantize {

// Gives every op that has a kernel for CPUs and none for CUDA one that says how to build it. After all ops are registered.
void refuse_cuda();

}  // namespace quantize
