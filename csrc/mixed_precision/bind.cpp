// The allocator for Python: tensors checked, the search without the interpreter's lock, and Ctrl-C looked for meanwhile.
#include "bind.h"

#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <exception>

#include "allocate.h"

namespace quantize::mixed_precision {
namespace {

namespace py = pybind11;

// Asks Python whether a signal came, as the interpreter would between two lines. Ctrl-C ends the search and is told in the answer; what
// other handlers raise is raised when the search has ended.
class Signals {
 public:
  bool pending() {
    const py::gil_scoped_acquire python;
    if (PyErr_CheckSignals() == 0) return false;
    if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt))
      PyErr_Clear();
    else
      raised_ = std::make_exception_ptr(py::error_already_set());
    return true;
  }
  void raise() const {
    if (raised_) std::rethrow_exception(raised_);
  }

 private:
  std::exception_ptr raised_;
};

void check_table(const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.is_contiguous() && t.scalar_type() == dtype && t.sizes() == sizes, "allocate: ", name,
                    " must be a contiguous CPU tensor ", sizes, " of ", dtype, "; got ", t.sizes(), " of ", t.scalar_type(), " on ",
                    t.device());
}

py::dict allocate_tensors(const at::Tensor& matrix, const at::Tensor& costs, const std::vector<double>& limits,
                          const at::Tensor& preference, const at::Tensor& allowed, double seconds) {
  TORCH_CHECK_VALUE(allowed.dim() == 2 && allowed.numel() > 0, "allocate: allowed must be [layers, choices]; got ", allowed.sizes());
  const int64_t layers = allowed.size(0), choices = allowed.size(1), size = layers * choices;
  check_table("allowed", allowed, at::kBool, {layers, choices});
  check_table("matrix", matrix, at::kDouble, {size, size});
  check_table("preference", preference, at::kDouble, {layers, choices});
  check_table("costs", costs, at::kDouble, {int64_t(limits.size()), layers, choices});
  Question ask{int(layers), int(choices), matrix.const_data_ptr<double>()};
  for (size_t q = 0; q < limits.size(); ++q) ask.costs.push_back(costs.const_data_ptr<double>() + int64_t(q) * size);
  ask.limits = limits;
  ask.preference = preference.const_data_ptr<double>();
  ask.allowed = reinterpret_cast<const uint8_t*>(allowed.const_data_ptr<bool>());
  Signals signals;
  Answer answer;
  {
    const py::gil_scoped_release others;
    answer = allocate(ask, seconds, [&] { return signals.pending(); });
  }
  signals.raise();
  constexpr const char* outcomes[] = {"found", "infeasible", "not_found"};
  py::dict result;
  result["outcome"] = outcomes[int(answer.outcome)];
  result["choice"] = answer.choice;
  result["objective"] = answer.objective;
  result["lower_bound"] = answer.lower_bound;
  result["interrupted"] = answer.interrupted;
  result["nodes"] = answer.nodes;
  return result;
}

}  // namespace

void define_allocate(py::module_& m) {
  m.def("allocate", &allocate_tensors, py::arg("matrix"), py::arg("costs"), py::arg("limits"), py::arg("preference"), py::arg("allowed"),
        py::arg("seconds"),
        "One choice per layer of the least matrix sum whose costs are within "
        "the limits; quantize.allocate explains.");
}

}  // namespace quantize::mixed_precision
