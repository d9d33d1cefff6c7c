// What a build without CUDA answers when it is asked for it: which command makes one that has it.
#include "without_cuda.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace quantize {
namespace {

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": tensors must be on the CPU, since this build has no CUDA kernels; got one on CUDA. ",
                              "To build them: CUDA_HOME=<the toolkit> QUANTIZE_CUDA=1 pip install --no-build-isolation .");
}

}  // namespace

void refuse_cuda() {
  static torch::Library library(torch::Library::IMPL, "quantize", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.getNamespace() != "quantize") continue;
    const auto op = dispatcher.findSchema(name);
    if (op && op->hasKernelForDispatchKey(c10::DispatchKey::CPU) && !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA))
      library.impl(name.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace quantize
