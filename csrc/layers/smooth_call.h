// The arguments of smooth_derivative, the same for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include "smooth.h"

namespace quantize::layers {

// The number of a function's name, in the order of Smooth.
inline Smooth parse_smooth(c10::string_view name) {
  constexpr c10::string_view names[] = {"silu", "hardswish", "mish", "gelu", "gelu_tanh"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return Smooth(i);
  TORCH_CHECK_VALUE(false, "smooth: function must be silu, hardswish, mish, gelu or gelu_tanh; got ", name);
}

}  // namespace quantize::layers
