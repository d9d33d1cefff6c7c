// Packed layers' calls from Python, bound, watched and chosen without Python's help: bound_op.h.
#include "bound_op.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "watch.h"

namespace quantize::packed {
namespace {

class BoundOp {
 public:
  BoundOp(const std::string& name, const pybind11::tuple& arguments)
      : op_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")) {
    const auto& declared = op_.schema().arguments();
    size_t needed = declared.size();
    while (needed > 1 && declared[needed - 1].default_value()) --needed;
    TORCH_CHECK_VALUE(arguments.size() + 1 >= needed && arguments.size() < declared.size(), "BoundOp: arguments must be the ", needed - 1,
                      " to ", declared.size() - 1, " of ", name, " behind its first; got ", arguments.size());
    for (size_t i = 1; i < declared.size(); ++i)
      rest_.push_back(i <= arguments.size() ? torch::jit::toIValue(arguments[i - 1], declared[i].type()) : *declared[i].default_value());
  }

  at::Tensor operator()(const at::Tensor& x, const pybind11::dict& named = pybind11::dict()) const {
    torch::jit::Stack stack;
    stack.reserve(rest_.size() + 1);
    stack.emplace_back(x);
    stack.insert(stack.end(), rest_.begin(), rest_.end());
    for (const auto& [name, value] : named) {
      const auto place = op_.schema().argumentIndexWithName(pybind11::str(name).cast<std::string>());
      TORCH_CHECK_VALUE(place && *place > 0, "BoundOp: arguments must be those of ", op_.schema().name(), "; got ",
                        std::string(pybind11::str(name)));
      stack[*place] = torch::jit::toIValue(value, op_.schema().arguments()[*place].type());
    }
    const pybind11::gil_scoped_release others;
    op_.callBoxed(stack);
    return stack.front().toTensor();
  }

 private:
  c10::OperatorHandle op_;
  std::vector<c10::IValue> rest_;
};

// Whether x is to be computed with and nothing more: without a derivative, which the kernels have none of, or a transform.
bool value_only(const at::Tensor& x) {
  return !(x.requires_grad() && at::GradMode::is_enabled()) && !x._fw_grad(/*level=*/0).defined() && !in_transform();
}

// Whether this thread is in the forward of one module, for layers inside it that hand on what only that forward knows what to do with.
class Region {
 public:
  Region() : id_(next_id++) {}

  // PyTorch calls no hook behind a forward that KeyboardInterrupt or SystemExit ended: what is left of it lies as deep in the stack as this
  // call, or deeper, where no forward around this one can be.
  void enter() const {
    auto& all = entries();
    const char here = 0;
    const auto place = reinterpret_cast<uintptr_t>(&here);
    while (!all.empty() && all.back().place <= place) all.pop_back();
    all.push_back({id_, place});
  }

  void leave() const {
    auto& all = entries();
    for (size_t i = all.size(); i-- > 0;)
      if (all[i].id == id_) return void(all.erase(all.begin() + int64_t(i)));
  }

  bool is_entered() const {
    const auto& all = entries();
    return std::any_of(all.begin(), all.end(), [&](const Entry& entry) { return entry.id == id_; });
  }

 private:
  struct Entry {
    uint64_t id;
    uintptr_t place;  // in the stack, which grows downwards
  };

  static std::vector<Entry>& entries() {
    thread_local std::vector<Entry> all;
    return all;
  }

  static inline std::atomic<uint64_t> next_id = 0;
  uint64_t id_;
};

// One kind of input that a layer takes, and what is done with it.
struct Case {
  at::ScalarType dtype;
  int64_t dims, axis, size;  // of the input, and of its dimension `axis`
  pybind11::object op;       // a BoundOp
  int64_t most;              // entries of dimension 0
};

// A layer's usual call, whose conditions Python would take longer to look at than small layers take to compute.
class Call {
 public:
  Call(pybind11::object watch, pybind11::object wrap, pybind11::object region) : watch_(watch), wrap_(wrap), region_(region) {}

  void add(at::ScalarType dtype, int64_t dims, int64_t axis, int64_t size, pybind11::object op, int64_t most) {
    cases_.push_back({dtype, dims, axis, size, op, most});
  }

  pybind11::object operator()(const pybind11::object& input) const {
    if (!THPVariable_CheckExact(input.ptr()) || !watch_.cast<const Watch&>().unchanged()) return pybind11::none();
    if (!region_.is_none() && !region_.cast<const Region&>().is_entered()) return pybind11::none();
    const at::Tensor& x = THPVariable_Unpack(input.ptr());
    if (x.numel() == 0 || !value_only(x)) return pybind11::none();
    if (torch::jit::tracer::isTracing()) return pybind11::none();  // which compares the lines of Python that ops come from
    for (const Case& c : cases_) {
      if (x.scalar_type() != c.dtype || x.dim() != c.dims || x.size(c.axis) != c.size || x.size(0) > c.most) continue;
      return wrap_.is_none() ? pybind11::cast(c.op.cast<const BoundOp&>()(x)) : wrap_(c.op, input);
    }
    return pybind11::none();
  }

 private:
  pybind11::object watch_, wrap_, region_;  // nothing that leads back to the layer: Python's collector does not look in here
  std::vector<Case> cases_;
};

}  // namespace

void define_bound_op(pybind11::module_& m) {
  pybind11::class_<BoundOp>(m, "BoundOp", "An op with all its arguments but the first; those named in a call take their places.")
      .def(pybind11::init<const std::string&, const pybind11::tuple&>(), pybind11::arg("name"), pybind11::arg("arguments"))
      .def("__call__", [](const BoundOp& op, const at::Tensor& x, const pybind11::kwargs& named) { return op(x, named); });
  m.def("in_transform", &in_transform, "Whether ops go through a torch.func transform or a mode, as of fake tensors, first.");
  m.def("value_only", &value_only, pybind11::arg("x"), "Whether nobody asks for a derivative by x, and no transform is active.");
  pybind11::class_<Watch>(
      m, "Watch", "Whether dictionaries still hold the same objects, tensors with the same values, and no more where sizes are watched.")
      .def(pybind11::init<const std::vector<Watch::Found>&, const std::vector<pybind11::dict>&>(), pybind11::arg("entries"),
           pybind11::arg("sizes") = std::vector<pybind11::dict>())
      .def("unchanged", &Watch::unchanged);
  pybind11::class_<Region>(m, "Region", "Whether this thread is between enter() and leave(). Copies are other regions.")
      .def(pybind11::init<>())
      .def("enter", &Region::enter)
      .def("leave", &Region::leave)
      .def("is_entered", &Region::is_entered)
      .def(pybind11::pickle([](const Region&) { return pybind11::tuple(); }, [](const pybind11::tuple&) { return Region(); }));
  pybind11::class_<Call>(m, "Call", "A layer's usual call; None where it is not the usual one.")
      .def(pybind11::init<pybind11::object, pybind11::object, pybind11::object>(), pybind11::arg("watch"), pybind11::arg("wrap"),
           pybind11::arg("region"))
      .def("add", &Call::add, pybind11::arg("dtype"), pybind11::arg("dims"), pybind11::arg("axis"), pybind11::arg("size"),
           pybind11::arg("op"), pybind11::arg("most") = std::numeric_limits<int64_t>::max())
      .def("__call__", &Call::operator(), pybind11::arg("x"));
}

}  // namespace quantize::packed
