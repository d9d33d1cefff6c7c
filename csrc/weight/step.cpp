// Walks over a model's modules by way of their dictionaries, and one wait for all gradients: step.h.
#include "step.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace quantize::weight {
namespace {

using Known = ska::flat_hash_set<const void*>;

// The names of a module's dictionaries, made once: a walk over a model takes a good part of a millisecond with strings made anew.
struct Names {
  PyObject *modules = PyUnicode_InternFromString("_modules"), *parameters = PyUnicode_InternFromString("_parameters"),
           *buffers = PyUnicode_InternFromString("_buffers");
};

const Names& names() {
  static const Names made;
  return made;
}

// visit(value) for the values of a module's dictionary `name`, None left out.
template <typename Visit>
void each_value(PyObject* module, PyObject* name, const Visit& visit) {
  const auto entries = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(module, name));
  if (!entries) throw pybind11::error_already_set();
  PyObject *key, *value;
  Py_ssize_t place = 0;
  if (PyDict_Check(entries.ptr()))
    while (PyDict_Next(entries.ptr(), &place, &key, &value))
      if (value != Py_None) visit(value);
}

// visit(module) for every module of `model`, each once and in the order of model.modules().
template <typename Visit>
void each_module(const pybind11::object& model, const Visit& visit) {
  Known known;
  std::vector<PyObject*> left{model.ptr()}, children;
  while (!left.empty()) {  // nothing here runs Python code, so that what is borrowed stays
    PyObject* module = left.back();
    left.pop_back();
    if (!known.insert(module).second) continue;
    visit(module);
    children.clear();
    each_value(module, names().modules, [&](PyObject* child) { children.push_back(child); });
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
  Known known;
  each_module(model, [&](PyObject* module) {
    for (PyObject* name : {names().parameters, names().buffers})
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

void clamp_all(const std::vector<at::Tensor>& tensors, double bound) {
  const pybind11::gil_scoped_release others;
  const at::NoGradGuard no_grad;
  for (at::Tensor t : tensors) t.clamp_(-bound, bound);
}

}  // namespace

void define_step(pybind11::module_& m) {
  m.def("modules_of", modules_of, pybind11::arg("model"), pybind11::arg("type"),
        "[m for m in model.modules() if isinstance(m, type)], sooner.");
  m.def("held_bytes", held_bytes, pybind11::arg("model"), "Bytes of all parameters and buffers, each once.");
  m.def("all_finite", all_finite, pybind11::arg("tensors"), "Whether no element is NaN or infinite, nor a tensor's sum.");
  m.def("clamp_all", clamp_all, pybind11::arg("tensors"), pybind11::arg("bound"), "Each t.clamp_(-bound, bound), without a gradient.");
}

}  // namespace quantize::weight
