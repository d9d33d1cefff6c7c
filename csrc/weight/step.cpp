// Walks over a model's modules by way of their dictionaries, and one wait for all gradients: step.h.
#include "step.h"

#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <unordered_set>
#include <vector>

namespace quantize::weight {
namespace {

// visit(value) for the values of a module's dictionary `name`, None left out.
template <typename Visit>
void each_value(pybind11::handle module, const char* name, const Visit& visit) {
  const pybind11::object entries = module.attr(name);
  PyObject *key, *value;
  Py_ssize_t place = 0;
  if (PyDict_Check(entries.ptr()))
    while (PyDict_Next(entries.ptr(), &place, &key, &value))
      if (value != Py_None) visit(value);
}

// visit(module) for every module of `model`, each once and in the order of model.modules().
template <typename Visit>
void each_module(const pybind11::object& model, const Visit& visit) {
  std::unordered_set<PyObject*> known;
  std::vector<PyObject*> left{model.ptr()}, children;
  while (!left.empty()) {  // nothing here runs Python code, so that what is borrowed stays
    PyObject* module = left.back();
    left.pop_back();
    if (!known.insert(module).second) continue;
    visit(module);
    children.clear();
    each_value(module, "_modules", [&](PyObject* child) { children.push_back(child); });
    left.insert(left.end(), children.rbegin(), children.rend());
  }
}

pybind11::list modules_of(const pybind11::object& model, const pybind11::type& type) {
  pybind11::list found;
  each_module(model, [&](PyObject* module) {
    if (PyType_IsSubtype(Py_TYPE(module), reinterpret_cast<PyTypeObject*>(type.ptr()))) found.append(pybind11::handle(module));
  });
  return found;
}

int64_t held_bytes(const pybind11::object& model) {
  int64_t bytes = 0;
  std::unordered_set<c10::TensorImpl*> known;
  each_module(model, [&](PyObject* module) {
    for (const char* name : {"_parameters", "_buffers"})
      each_value(module, name, [&](PyObject* value) {
        if (!THPVariable_Check(value)) return;
        const at::Tensor& tensor = THPVariable_Unpack(value);
        if (known.insert(tensor.unsafeGetTensorImpl()).second) bytes += int64_t(tensor.nbytes());
      });
  });
  return bytes;
}

bool all_finite(const std::vector<at::Tensor>& tensors) {
  if (tensors.empty()) return true;
  const pybind11::gil_scoped_release others;
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> sums;
  for (const at::Tensor& t : tensors) {
    const at::Tensor values = t.is_sparse() ? t._values() : t;
    sums.push_back(values.sum(at::kFloat).to(tensors[0].device()));
  }
  return at::stack(sums).isfinite().all().item<bool>();
}

}  // namespace

void define_step(pybind11::module_& m) {
  m.def("modules_of", modules_of, pybind11::arg("model"), pybind11::arg("type"),
        "[m for m in model.modules() if isinstance(m, type)], sooner.");
  m.def("held_bytes", held_bytes, pybind11::arg("model"), "Bytes of all parameters and buffers, each once.");
  m.def("all_finite", all_finite, pybind11::arg("tensors"), "Whether no element is NaN or infinite, nor a tensor's sum.");
}

}  // namespace quantize::weight
