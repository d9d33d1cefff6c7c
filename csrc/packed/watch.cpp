#include "watch.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/equal.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <string>

#include "../core/checks.h"

namespace quantize::packed {
namespace {

thread_local int recordings = 0;

// Inference tensors count none.
int64_t version(const at::Tensor& tensor) { return tensor.is_inference() ? -1 : int64_t(tensor._version()); }

bool same(const at::Tensor& tensor, const at::Tensor& before) {
  return tensor.dtype() == before.dtype() && tensor.sizes() == before.sizes() && (tensor.is_meta() || at::equal(tensor, before));
}

}  // namespace

Watch::Watch(const std::vector<Found>& entries, const std::vector<pybind11::dict>& sizes) {
  for (const auto& [owner, key, value] : entries) {
    TORCH_CHECK_VALUE(PyDict_GetItemWithError(owner.ptr(), key.ptr()) == value.ptr(), "Watch: ", std::string(pybind11::str(key)),
                      " must be in its dictionary");
    Entry entry{owner, key, value, -1, {}};
    if (THPVariable_Check(value.ptr())) {
      const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
      entry.version = version(tensor);
      if (tensor.is_inference()) entry.before = tensor.clone();
    }
    entries_.push_back(entry);
  }
  for (const auto& of : sizes) sizes_.push_back({of, PyDict_Size(of.ptr())});
}

bool Watch::unchanged() const {
  for (const Entry& entry : entries_) {
    PyObject* object = PyDict_GetItemWithError(entry.owner.ptr(), entry.key.ptr());
    if (object != entry.value.ptr()) return false;
    if (entry.version < 0 && !entry.before.defined()) continue;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (version(tensor) != entry.version || (entry.before.defined() && !same(tensor, entry.before))) return false;
  }
  return std::all_of(sizes_.begin(), sizes_.end(), [](const Size& size) { return PyDict_Size(size.of.ptr()) == size.entries; });
}

void begin_recording() { ++recordings; }
void end_recording() { --recordings; }

bool in_transform() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::TorchDispatchModeTLS::stack_len() > recordings;
}

}  // namespace quantize::packed
