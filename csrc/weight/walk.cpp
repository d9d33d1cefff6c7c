#include "walk.h"

#include <torch/csrc/autograd/python_variable.h>

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

pybind11::list every_module(const pybind11::object& model) {
  pybind11::list found;
  std::unordered_set<PyObject*> known;
  std::vector<PyObject*> left{model.ptr()}, children;
  while (!left.empty()) {  // nothing here runs Python code, so that what is borrowed stays
    PyObject* module = left.back();
    left.pop_back();
    if (!known.insert(module).second) continue;
    found.append(pybind11::handle(module));
    children.clear();
    each_value(module, "_modules", [&](PyObject* child) { children.push_back(child); });
    left.insert(left.end(), children.rbegin(), children.rend());
  }
  return found;
}

int64_t held_bytes(const pybind11::object& model) {
  int64_t bytes = 0;
  std::unordered_set<c10::TensorImpl*> known;
  for (const pybind11::handle module : every_module(model))
    for (const char* name : {"_parameters", "_buffers"})
      each_value(module, name, [&](PyObject* value) {
        if (!THPVariable_Check(value)) return;
        const at::Tensor& tensor = THPVariable_Unpack(value);
        if (known.insert(tensor.unsafeGetTensorImpl()).second) bytes += int64_t(tensor.nbytes());
      });
  return bytes;
}

}  // namespace

void define_walk(pybind11::module_& m) {
  m.def("every_module", every_module, pybind11::arg("model"), "list(model.modules()), sooner.");
  m.def("held_bytes", held_bytes, pybind11::arg("model"), "Bytes of all parameters and buffers, each once.");
}

}  // namespace quantize::weight
