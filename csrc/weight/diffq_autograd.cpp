// The differentiable ops over diffq_noise, diffq_round and diffq_bits, for every backend.
#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "../core/autograd.h"
#include "../core/dispatch.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using std::tuple;
using std::vector;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors = vector<Tensor>;
using Quantiles = const std::optional<Tensor>&;
using Ints = at::IntArrayRef;
using Doubles = at::ArrayRef<double>;

// A gradient for each tensor among the first arguments, nothing for the rest.
variable_list gradients(size_t arguments) { return variable_list(arguments); }

// A gradient that may be changed: itself where nobody else holds it or its memory.
Tensor to_change(Tensor grad) {
  const bool is_ours = grad.is_contiguous() && grad.has_storage() && grad.use_count() == 1 && grad.storage().use_count() == 1;
  return is_ours ? grad : grad.clone(at::MemoryFormat::Contiguous);
}

struct DiffQ : torch::autograd::Function<DiffQ> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights, at::TensorList logits, const Tensor& seed, Ints streams,
                               Ints group_sizes, Ints spans, Doubles min_bits, Doubles max_bits, Quantiles quantiles) {
    static const auto op = find_op<tuple<Tensors, Tensors, Tensors, Tensor>(at::TensorList, at::TensorList, const Tensor&, Ints, Ints, Ints,
                                                                            Doubles, Doubles, Quantiles)>("quantize::diffq_noise");
    ctx->set_materialize_grads(false);  // a weight that was not used gets no gradient
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, ranges, extremes, bits] = op.call(weights, logits, seed, streams, group_sizes, spans, min_bits, max_bits, quantiles);
    variable_list saved(logits.begin(), logits.end());
    saved.insert(saved.end(), ranges.begin(), ranges.end());
    saved.insert(saved.end(), extremes.begin(), extremes.end());
    saved.push_back(seed);
    saved.push_back(quantiles.value_or(Tensor()));
    ctx->save_for_backward(saved);
    ctx->saved_data["streams"] = streams.vec();
    ctx->saved_data["group_sizes"] = group_sizes.vec();
    ctx->saved_data["spans"] = spans.vec();
    ctx->saved_data["min_bits"] = min_bits.vec();
    ctx->saved_data["max_bits"] = max_bits.vec();
    y.push_back(bits);
    ctx->mark_non_differentiable({bits});  // CountedBits has their gradient
    return y;
  }

  // By reference: a copy would hold the gradients a second time.
  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    static const auto op = find_op<tuple<Tensors, Tensors>(at::TensorList, at::TensorList, at::TensorList, at::TensorList, const Tensor&,
                                                           Ints, Ints, Ints, Doubles, Doubles, Quantiles)>("quantize::diffq_backward");
    static const auto in_place = find_op<Tensors(at::TensorList, at::TensorList, at::TensorList, at::TensorList, const Tensor&, Ints, Ints,
                                                 Ints, Doubles, Doubles, Quantiles)>("quantize::diffq_backward_");
    refuse_double_backward("diffq", "the backward of a quantized weight");
    const size_t n = grads.size() - 1;
    const auto saved = ctx->get_saved_variables();
    const auto streams = ctx->saved_data["streams"].toIntVector(), group_sizes = ctx->saved_data["group_sizes"].toIntVector(),
               spans = ctx->saved_data["spans"].toIntVector();
    const auto min_bits = ctx->saved_data["min_bits"].toDoubleVector(), max_bits = ctx->saved_data["max_bits"].toDoubleVector();
    variable_list result = gradients(2 * n + 7);
    Tensors own, logits, ranges, extremes;
    vector<int64_t> places, own_streams, own_groups, own_spans;
    vector<double> own_min, own_max;
    for (size_t i = 0; i < n; ++i) {
      if (!grads[i].defined()) continue;  // a weight that this forward did not use
      places.push_back(int64_t(i));
      own.push_back(std::move(grads[i])), logits.push_back(saved[i]), ranges.push_back(saved[n + i]), extremes.push_back(saved[2 * n + i]);
      own_streams.push_back(streams[i]), own_groups.push_back(group_sizes[i]), own_spans.push_back(spans[i]);
      own_min.push_back(min_bits[i]), own_max.push_back(max_bits[i]);
    }
    if (own.empty()) return result;
    const Tensor& table = saved[3 * n + 1];
    const auto quantiles = table.defined() ? std::optional<Tensor>(table) : std::nullopt;
    Tensors grad_logits;
    if (c10::impl::TorchDispatchModeTLS::any_modes_set()) {  // traced
      std::tie(own, grad_logits) =
          op.call(own, logits, ranges, extremes, saved[3 * n], own_streams, own_groups, own_spans, own_min, own_max, quantiles);
    } else {
      for (Tensor& grad : own) grad = to_change(std::move(grad));
      grad_logits =
          in_place.call(own, logits, ranges, extremes, saved[3 * n], own_streams, own_groups, own_spans, own_min, own_max, quantiles);
    }
    for (size_t j = 0; j < places.size(); ++j) result[places[j]] = own[j], result[n + places[j]] = grad_logits[j];
    return result;
  }
};

// Changes in place so far; tensors of inference mode do not count them.
int64_t version_of(const Tensor& x) { return x.is_inference() ? 0 : int64_t(x._version()); }

// Bits that were counted, with the noise or by themselves, as a function of the logits alone: the weights take no part in the size.
// bits: [weights], or [weights, 2] with rounded ones, through which the gradient goes straight. What it needs is in saved_data, not among
// the saved variables, which a backward lets go of: bits that are counted once may be differentiated again.
struct CountedBits : torch::autograd::Function<CountedBits> {
  static Tensor forward(AutogradContext* ctx, at::TensorList logits, const Tensor& bits, Ints numels, Ints group_sizes, Doubles min_bits,
                        Doubles max_bits) {
    ctx->set_materialize_grads(false);
    vector<int64_t> versions;
    for (const Tensor& own : logits) versions.push_back(version_of(own));
    ctx->saved_data["logits"] = logits.vec();
    ctx->saved_data["versions"] = versions;
    ctx->saved_data["numels"] = numels.vec();
    ctx->saved_data["group_sizes"] = group_sizes.vec();
    ctx->saved_data["min_bits"] = min_bits.vec();
    ctx->saved_data["max_bits"] = max_bits.vec();
    return bits.detach();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<Tensors(const Tensor&, at::TensorList, Ints, Ints, Doubles, Doubles)>("quantize::diffq_bits_backward");
    refuse_double_backward("diffq", "the backward of the bits");
    const Tensors logits = ctx->saved_data["logits"].toTensorVector();
    const auto versions = ctx->saved_data["versions"].toIntVector();
    variable_list result = gradients(logits.size() + 5);
    if (!grads[0].defined()) return result;
    for (size_t i = 0; i < logits.size(); ++i)
      TORCH_CHECK(version_of(logits[i]) == versions[i], "diffq: the logits of weight ", i,
                  " have been modified by an inplace operation since their bits were counted");
    const Tensor grad = grads[0].dim() == 2 ? grads[0].sum(1) : grads[0];
    auto own = op.call(grad, logits, ctx->saved_data["numels"].toIntVector(), ctx->saved_data["group_sizes"].toIntVector(),
                       ctx->saved_data["min_bits"].toDoubleVector(), ctx->saved_data["max_bits"].toDoubleVector());
    std::move(own.begin(), own.end(), result.begin());
    return result;
  }
};

struct OnGrid : torch::autograd::Function<OnGrid> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights, at::TensorList logits, Ints group_sizes, Ints spans,
                               Doubles min_bits, Doubles max_bits) {
    static const auto op =
        find_op<tuple<Tensors, Tensors>(at::TensorList, at::TensorList, Ints, Ints, Doubles, Doubles)>("quantize::diffq_round");
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    return std::get<0>(op.call(weights, logits, group_sizes, spans, min_bits, max_bits));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {  // straight through, to the weights alone
    variable_list result = gradients(2 * grads.size() + 4);
    std::copy(grads.begin(), grads.end(), result.begin());
    return result;
  }
};

tuple<Tensors, Tensor> diffq(at::TensorList weights, at::TensorList logits, const Tensor& seed, Ints streams, Ints group_sizes, Ints spans,
                             Doubles min_bits, Doubles max_bits, Quantiles quantiles) {
  Tensors y = DiffQ::apply(weights, logits, seed, streams, group_sizes, spans, min_bits, max_bits, quantiles);
  const Tensor bits = std::move(y.back());
  y.pop_back();
  vector<int64_t> numels;
  for (const Tensor& w : weights) numels.push_back(w.sym_numel().guard_int(__FILE__, __LINE__));
  return {std::move(y), CountedBits::apply(logits, bits, Ints(numels), group_sizes, min_bits, max_bits)};
}

Tensors diffq_on_grid(at::TensorList weights, at::TensorList logits, Ints group_sizes, Ints spans, Doubles min_bits, Doubles max_bits) {
  return OnGrid::apply(weights, logits, group_sizes, spans, min_bits, max_bits);
}

Tensor diffq_total_bits(at::TensorList logits, Ints numels, Ints group_sizes, Doubles min_bits, Doubles max_bits, bool rounded) {
  static const auto op = find_op<Tensor(at::TensorList, Ints, Ints, Doubles, Doubles, bool)>("quantize::diffq_bits");
  Tensor bits;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    bits = op.call(logits, numels, group_sizes, min_bits, max_bits, rounded);
  }
  return CountedBits::apply(logits, bits, numels, group_sizes, min_bits, max_bits);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("diffq", diffq);
  m.impl("diffq_on_grid", diffq_on_grid);
  m.impl("diffq_total_bits", diffq_total_bits);
}

}  // namespace quantize::weight
