// What differentiable ops share.
#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

namespace quantize {

// ATen's own error for a second derivative of a custom function is about leaves and views; this one says what happened. For backwards.
inline void refuse_double_backward(const char* op, const char* what, const char* advice = "") {
  TORCH_CHECK(!at::GradMode::is_enabled(), op, ": ", what, " is not differentiable (create_graph=True)", advice);
}

}  // namespace quantize
