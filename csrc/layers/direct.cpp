// Python's functions for ops, made from the ops' signatures: direct.h.
#include "direct.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>

#include "../core/dispatch.h"

namespace quantize::layers {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using OptionalTensor = std::optional<Tensor>;

template <typename Signature>
struct Direct;

template <typename Result, typename... Arguments>
struct Direct<Result(Arguments...)> {
  static void define(pybind11::module_& m, const std::string& name) {
    const auto op = find_op<Result(Arguments...)>(("quantize::" + name).c_str());
    m.def(
        name.c_str(), [op](Arguments... arguments) -> std::decay_t<Result> { return op.call(std::forward<Arguments>(arguments)...); },
        pybind11::call_guard<pybind11::gil_scoped_release>());
  }
};

template <typename Signature>
void define(pybind11::module_& m, const char* name) {
  Direct<Signature>::define(m, name);
}

// As each signature ends that takes a packed input: codes, ranges, sample_bits, bits, group_size, seed, energy.
template <typename Result, typename... Arguments>
using Packed = Result(Arguments..., const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t, int64_t,
                      const OptionalTensor&, const OptionalTensor&);

}  // namespace

void define_direct(pybind11::module_& m) {
  auto direct = m.def_submodule("direct", "Ops of layers that train, past torch.ops.");
  using Two = std::tuple<Tensor, Tensor>;
  define<Two(const Tensor&, int64_t, int64_t, const Tensor&)>(direct, "group_quantize");
  define<Two(const Tensor&, const Tensor&, int64_t, int64_t, const Tensor&)>(direct, "group_quantize_mixed");
  define<Tensor(const Tensor&, int64_t)>(direct, "group_variance");
  define<Tensor(const Tensor&, int64_t, int64_t)>(direct, "allocate_bits");
  define<Two(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, const Tensor&)>(direct, "norm_quantize");
  define<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, const Tensor&)>(direct, "norm_quantize_mixed");
  define<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)>(direct, "norm_variance");
  define<Tensor(const Tensor&, c10::string_view)>(direct, "smooth_derivative");
  define<Two(const Tensor&, c10::string_view, int64_t, int64_t, const Tensor&)>(direct, "smooth_quantize");
  define<Packed<Tensor, const Tensor&, const Tensor&, const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool,
                SymIntArrayRef, SymInt>>(direct, "conv");
  define<Packed<Tensor, const Tensor&, const Tensor&, const OptionalTensor&>>(direct, "linear");
  define<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                            const OptionalTensor&, bool, double, double)>(direct, "batch_norm_forward");
  define<Packed<Tensor, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, bool>>(direct,
                                                                                                                          "batch_norm");
  define<Packed<Tensor, const Tensor&, const Tensor&>>(direct, "prelu");
  define<Packed<Tensor, const Tensor&, const Tensor&>>(direct, "mul");
  define<Packed<Tensor&, Tensor&, const Tensor&>>(direct, "mul_");
  define<Packed<Tensor, const Tensor&, at::IntArrayRef, const OptionalTensor&, const OptionalTensor&, double>>(direct, "layer_norm");
  define<Packed<Tensor, const Tensor&, at::IntArrayRef, const OptionalTensor&, std::optional<double>>>(direct, "rms_norm");
  define<Packed<Tensor, const Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&, double>>(direct, "group_norm");
  define<Packed<Tensor, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                double>>(direct, "instance_norm");
  define<Packed<Tensor, const Tensor&, c10::string_view>>(direct, "smooth");
  define<Packed<Tensor&, Tensor&, c10::string_view>>(direct, "smooth_");
  define<Tensor(const Tensor&, double, double, double)>(direct, "clip");
  define<Tensor&(Tensor&, double, double, double)>(direct, "clip_");
  define<Two(const Tensor&, double, double, double)>(direct, "clip_and_mask");
  define<Tensor(Tensor&, double, double, double)>(direct, "clip_and_mask_");
  define<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool, SymIntArrayRef,
                SymInt, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, const OptionalTensor&,
                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double)>(direct,
                                                                                                                     "conv_of_norm");
}

}  // namespace quantize::layers
