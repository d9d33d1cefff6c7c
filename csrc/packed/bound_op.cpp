#include "bound_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <string>

namespace quantize::packed {
namespace {

class BoundOp {
 public:
  BoundOp(const std::string& name, const pybind11::tuple& arguments)
      : op_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")) {
    const auto& declared = op_.schema().arguments();
    TORCH_CHECK_VALUE(arguments.size() + 1 == declared.size(), "BoundOp: arguments must be the ", declared.size() - 1, " of ", name,
                      " behind its first; got ", arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) rest_.push_back(torch::jit::toIValue(arguments[i], declared[i + 1].type()));
  }

  at::Tensor operator()(const at::Tensor& x) const {
    torch::jit::Stack stack;
    stack.reserve(rest_.size() + 1);
    stack.emplace_back(x);
    stack.insert(stack.end(), rest_.begin(), rest_.end());
    const pybind11::gil_scoped_release others;
    op_.callBoxed(stack);
    return stack.front().toTensor();
  }

 private:
  c10::OperatorHandle op_;
  std::vector<c10::IValue> rest_;
};

}  // namespace

void define_bound_op(pybind11::module_& m) {
  pybind11::class_<BoundOp>(m, "BoundOp", "An op with all its arguments but the first.")
      .def(pybind11::init<const std::string&, const pybind11::tuple&>(), pybind11::arg("name"), pybind11::arg("arguments"))
      .def("__call__", &BoundOp::operator(), pybind11::arg("x"));
}

}  // namespace quantize::packed
