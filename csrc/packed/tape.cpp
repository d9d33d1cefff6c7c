#include "tape.h"

#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../core/checks.h"
#include "watch.h"

namespace quantize::packed {
namespace {

constexpr int nowhere = -1;

// What about an input decides which ops are called, and the casts among them.
struct Kind {
  c10::ScalarType dtype;
  c10::Device device;
  std::vector<int64_t> sizes, strides;
  bool casts;
  c10::ScalarType cast_to;

  explicit Kind(const at::Tensor& x)
      : dtype(x.scalar_type()),
        device(x.device()),
        sizes(x.sizes().vec()),
        strides(x.strides().vec()),
        casts(at::autocast::is_autocast_enabled(device.type())),
        cast_to(at::autocast::get_autocast_dtype(device.type())) {}

  bool is_of(const at::Tensor& x) const {
    return x.scalar_type() == dtype && x.device() == device && x.layout() == at::kStrided && x.sizes() == at::IntArrayRef(sizes) &&
           x.strides() == at::IntArrayRef(strides) && !x.is_conj() && !x.is_neg() &&
           at::autocast::is_autocast_enabled(device.type()) == casts &&
           (!casts || at::autocast::get_autocast_dtype(device.type()) == cast_to);
  }
};

// The tensors in a value, in order; undefined ones too.
template <typename Take>
void each_tensor(const c10::IValue& value, const Take& take) {
  if (value.isTensor()) return take(value.toTensor());
  if (value.isNone()) return take(at::Tensor());
  if (!value.isList()) return;
  for (const c10::IValue& item : value.toListRef()) each_tensor(item, take);
}
template <typename Take>
void each_tensor(pybind11::handle value, const Take& take) {
  if (THPVariable_Check(value.ptr())) return take(THPVariable_Unpack(value.ptr()));
  if (value.is_none()) return take(at::Tensor());
  if (!pybind11::isinstance<pybind11::list>(value) && !pybind11::isinstance<pybind11::tuple>(value)) return;
  for (const auto& item : value) each_tensor(item, take);
}

// As PyTorch's own argument parser has it: numbers may stand for tensors, whose dtype then gives way to other tensors'.
c10::IValue value_of(const pybind11::object& value, const c10::TypePtr& type) {
  const bool number = PyBool_Check(value.ptr()) || PyLong_Check(value.ptr()) || PyFloat_Check(value.ptr()) || PyComplex_Check(value.ptr());
  if (number && type->isSubtypeOf(*c10::TensorType::get()))
    return at::native::wrapped_scalar_tensor(torch::jit::toIValue(value, c10::NumberType::get()).toScalar());
  return torch::jit::toIValue(value, type);
}

class Tape {
 public:
  explicit Tape(std::vector<at::Tensor> inputs) : inputs_(int(inputs.size())), places_(inputs_), varies_(inputs_, true) {
    for (int i = 0; i < inputs_; ++i) {
      kinds_.emplace_back(inputs[i]);
      place_of_[inputs[i].unsafeGetTensorImpl()] = i;
    }
    alive_ = std::move(inputs);
  }

  void add(const std::string& name, const std::string& overload, const pybind11::tuple& args, const pybind11::dict& kwargs,
           const pybind11::object& result, bool varies) {
    Step step{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, {}, {}};
    const auto& declared = step.op.schema().arguments();
    for (size_t i = 0; i < declared.size(); ++i) {
      const pybind11::str own(declared[i].name());
      if (i < args.size())
        step.arguments.push_back(value_of(args[i], declared[i].type()));
      else if (kwargs.contains(own))
        step.arguments.push_back(value_of(kwargs[own], declared[i].type()));
      else
        step.arguments.push_back(declared[i].default_value().value());
      find_places(step, int(i));
    }
    for (const Use& use : step.uses) varies |= varies_[use.place];
    each_tensor(result, [&](const at::Tensor& tensor) { step.results.push_back(result_of(tensor, varies)); });
    steps_.push_back(std::move(step));
  }

  // Whether one of these values is, or holds, a tensor that another call may find other values in.
  bool varies(const pybind11::object& values) const {
    bool found = false;
    each_tensor(values, [&](const at::Tensor& tensor) {
      const int place = place_of(tensor);
      found |= place != nowhere && varies_[place];
    });
    return found;
  }

  void finish(const std::vector<at::Tensor>& outputs) {
    for (const at::Tensor& output : outputs) {
      const auto found = place_of_.find(output.unsafeGetTensorImpl());
      outputs_.emplace_back(found == place_of_.end() ? nowhere : found->second, found == place_of_.end() ? output : at::Tensor());
    }
    std::vector<bool> needed(places_, false);
    for (const auto& [place, _] : outputs_)
      if (place != nowhere) needed[place] = true;
    for (size_t i = steps_.size(); i-- > 0;) {  // what is used here for the last time
      Step& step = steps_[i];
      const auto last = [&](int place) {
        if (place == nowhere || needed[place]) return;
        needed[place] = true;
        step.last.push_back(place);
      };
      for (const Result& result : step.results) last(result.place);
      for (const Use& use : step.uses) last(use.place);
    }
    place_of_.clear();
    alive_.clear();
  }

  std::optional<std::vector<at::Tensor>> operator()(const std::vector<at::Tensor>& inputs) const {
    if (int(inputs.size()) != inputs_ || in_transform() || torch::jit::tracer::isTracing()) return std::nullopt;
    for (int i = 0; i < inputs_; ++i)
      if (!kinds_[i].is_of(inputs[i])) return std::nullopt;
    const pybind11::gil_scoped_release others;
    const c10::AutoGradMode no_gradients(false);
    const at::AutoDispatchBelowADInplaceOrView values_only;
    const c10::impl::ExcludeDispatchKeyGuard cast_already(c10::autocast_dispatch_keyset);
    std::vector<at::Tensor> held(inputs);
    held.resize(places_);
    torch::jit::Stack stack;
    for (const Step& step : steps_) {
      call(step, held, stack);
      for (const int place : step.last) held[place].reset();
    }
    std::vector<at::Tensor> outputs;
    for (const auto& [place, constant] : outputs_) outputs.push_back(place == nowhere ? constant : held[place]);
    return outputs;
  }

 private:
  struct Use {
    int argument, item, place;  // item: of a list
  };
  struct Result {
    int place;
    std::optional<std::vector<int64_t>> sizes;  // none of nested tensors, whose parts have their own
  };
  struct Step {
    c10::OperatorHandle op;
    std::vector<c10::IValue> arguments;  // without what has a place
    std::vector<Use> uses;
    std::vector<Result> results;
    std::vector<int> last;
  };

  int place_of(const at::Tensor& tensor) const {
    const auto found = tensor.defined() ? place_of_.find(tensor.unsafeGetTensorImpl()) : place_of_.end();
    return found == place_of_.end() ? nowhere : found->second;
  }

  void find_places(Step& step, int argument) {
    c10::IValue& value = step.arguments[argument];
    if (value.isTensor()) {
      const int place = place_of(value.toTensor());
      if (place == nowhere) return;
      step.uses.push_back({argument, nowhere, place});
      value = at::Tensor();
    } else if (value.isList()) {
      int item = 0;
      for (const c10::IValue& each : value.toListRef()) {
        const int place = each.isTensor() ? place_of(each.toTensor()) : nowhere;
        if (place != nowhere) step.uses.push_back({argument, item, place});
        ++item;
      }
      for (const Use& use : step.uses)
        if (use.argument == argument) set_item(value, use.item, at::Tensor());
    }
  }

  static void set_item(c10::IValue& list, int item, const at::Tensor& tensor) {
    if (list.isTensorList())
      list.toTensorList().set(item, tensor);
    else
      list.toOptionalTensorList().set(item, tensor.defined() ? std::optional(tensor) : std::nullopt);
  }

  static c10::IValue copied(const c10::IValue& list) {
    return list.isTensorList() ? c10::IValue(list.toTensorList().copy()) : c10::IValue(list.toOptionalTensorList().copy());
  }

  Result result_of(const at::Tensor& tensor, bool varies) {
    if (!tensor.defined()) return {nowhere, std::nullopt};
    const auto [found, fresh] = place_of_.try_emplace(tensor.unsafeGetTensorImpl(), places_);
    if (fresh) {
      ++places_;
      varies_.push_back(varies);
      alive_.push_back(tensor);  // or another tensor might come to lie where it did
    }
    if (varies) varies_[found->second] = true;
    return {found->second, tensor.is_nested() ? std::nullopt : std::optional(tensor.sizes().vec())};
  }

  static void call(const Step& step, std::vector<at::Tensor>& held, torch::jit::Stack& stack) {
    stack.assign(step.arguments.begin(), step.arguments.end());
    int own = nowhere;  // the last list that is no longer the tape's
    for (const Use& use : step.uses) {
      if (use.item == nowhere) {
        stack[use.argument] = held[use.place];
        continue;
      }
      if (own != use.argument) stack[use.argument] = copied(stack[use.argument]);
      own = use.argument;
      set_item(stack[use.argument], use.item, held[use.place]);
    }
    step.op.callBoxed(stack);
    size_t next = 0;
    for (const c10::IValue& value : stack)
      each_tensor(value, [&](const at::Tensor& tensor) {
        const Result& result = step.results.at(next++);
        if (result.place == nowhere) return;
        TORCH_CHECK_VALUE(!result.sizes || tensor.sizes() == at::IntArrayRef(*result.sizes),
                          "capture: model must have sizes that depend on its inputs' sizes alone; ", step.op.schema().name(), " gave ",
                          at::IntArrayRef(*result.sizes), " when it was captured, and ", tensor.sizes(), " now");
        held[result.place] = tensor;
      });
  }

  int inputs_, places_;
  std::vector<Kind> kinds_;
  std::vector<Step> steps_;
  std::vector<std::pair<int, at::Tensor>> outputs_;  // a place, or what is no op's result
  // While it records:
  std::unordered_map<c10::TensorImpl*, int> place_of_;
  std::vector<bool> varies_;  // by places
  std::vector<at::Tensor> alive_;
};

}  // namespace

void define_tape(pybind11::module_& m) {
  pybind11::class_<Tape>(m, "Tape", "The ops that a forward calls, to be called again.")
      .def(pybind11::init<std::vector<at::Tensor>>(), pybind11::arg("inputs"))
      .def("add", &Tape::add, pybind11::arg("name"), pybind11::arg("overload"), pybind11::arg("args"), pybind11::arg("kwargs"),
           pybind11::arg("result"), pybind11::arg("varies"))
      .def("varies", &Tape::varies, pybind11::arg("values"))
      .def("finish", &Tape::finish, pybind11::arg("outputs"))
      .def("__enter__", [](Tape&) { begin_recording(); })
      .def("__exit__", [](Tape&, const pybind11::args&) { end_recording(); })
      .def("__call__", &Tape::operator(), pybind11::arg("inputs"));
}

}  // namespace quantize::packed
