// The differentiable ops over diffq_noise, diffq_round and diffq_bits, for every backend.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

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

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A gradient for each tensor among the first arguments, nothing for the rest.
variable_list gradients(size_t arguments) { return variable_list(arguments); }

// A gradient that may be changed: itself where nobody else holds it or its memory.
Tensor to_change(Tensor grad) {
  const bool is_ours = grad.is_contiguous() && grad.has_storage() && grad.use_count() == 1 && grad.storage().use_count() == 1;
  return is_ours ? grad : grad.clone(at::MemoryFormat::Contiguous);
}

// Changes in place so far; tensors of inference mode do not count them.
int64_t version_of(const Tensor& x) { return x.is_inference() ? 0 : int64_t(x._version()); }

// What the backward reads of the weights of a call, or of some of them. In saved_data, not among the saved variables, which a backward
// lets go of: the loss and the size penalty may each have a backward of their own through one forward.
struct Kept {
  Tensors logits, ranges, extremes;
  vector<int64_t> versions, numels, streams, group_sizes, spans;
  vector<double> min_bits, max_bits;

  template <typename Visit>
  static void each_list(const Visit& visit) {
    visit("logits", &Kept::logits), visit("ranges", &Kept::ranges), visit("extremes", &Kept::extremes);
    visit("versions", &Kept::versions), visit("numels", &Kept::numels), visit("streams", &Kept::streams);
    visit("group_sizes", &Kept::group_sizes), visit("spans", &Kept::spans);
    visit("min_bits", &Kept::min_bits), visit("max_bits", &Kept::max_bits);
  }

  void save(AutogradContext* ctx) const {
    each_list([&](const char* name, auto list) { ctx->saved_data[name] = this->*list; });
  }

  static Kept load(AutogradContext* ctx) {
    Kept kept;
    each_list([&](const char* name, auto list) {
      using List = std::remove_reference_t<decltype(kept.*list)>;
      kept.*list = ctx->saved_data[name].to<List>();
    });
    for (size_t i = 0; i < kept.logits.size(); ++i)
      TORCH_CHECK(version_of(kept.logits[i]) == kept.versions[i], "diffq: logits needed for the gradient of weight ", i,
                  " have been modified by an inplace operation since its noise was drawn");
    return kept;
  }

  Kept of(const vector<int64_t>& places) const {
    Kept some;
    each_list([&](const char*, auto list) {
      for (int64_t i : places) (some.*list).push_back((this->*list)[i]);
    });
    return some;
  }
};

struct DiffQ : torch::autograd::Function<DiffQ> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights, at::TensorList logits, const Tensor& seed, Ints streams,
                               Ints group_sizes, Ints spans, Doubles min_bits, Doubles max_bits, Quantiles quantiles) {
    static const auto op = find<tuple<Tensors, Tensors, Tensors, Tensor>(at::TensorList, at::TensorList, const Tensor&, Ints, Ints, Ints,
                                                                         Doubles, Doubles, Quantiles)>("quantize::diffq_noise");
    ctx->set_materialize_grads(false);  // a weight that was not used gets no gradient
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, ranges, extremes, bits] = op.call(weights, logits, seed, streams, group_sizes, spans, min_bits, max_bits, quantiles);
    Kept kept{logits.vec(), ranges, extremes, {}, {}, streams.vec(), group_sizes.vec(), spans.vec(), min_bits.vec(), max_bits.vec()};
    for (const Tensor& own : logits) kept.versions.push_back(version_of(own));
    for (const Tensor& w : weights) kept.numels.push_back(w.sym_numel().guard_int(__FILE__, __LINE__));
    kept.save(ctx);
    ctx->saved_data["seed"] = seed;
    ctx->saved_data["quantiles"] = quantiles;
    y.push_back(bits);
    return y;
  }

  // By reference: a copy would hold the gradients a second time.
  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "diffq: the backward of a quantized weight is not differentiable (create_graph=True)");
    const size_t n = grads.size() - 1;
    const Kept kept = Kept::load(ctx);
    const Tensor grad_bits = grads[n];
    variable_list result = gradients(2 * n + 7);
    vector<int64_t> used, unused;
    for (size_t i = 0; i < n; ++i) (grads[i].defined() ? used : unused).push_back(int64_t(i));
    const auto rows = [&](const vector<int64_t>& places) {
      return places.size() == n ? grad_bits.contiguous()
                                : grad_bits.index_select(0, at::tensor(places, grad_bits.options().dtype(at::kLong)));
    };
    if (!used.empty()) {
      const auto own_bits = grad_bits.defined() ? std::optional<Tensor>(rows(used)) : std::nullopt;
      auto [own, grad_logits] = of_weights(ctx, kept.of(used), used, grads, own_bits);
      for (size_t j = 0; j < used.size(); ++j) result[used[j]] = own[j], result[n + used[j]] = grad_logits[j];
    }
    if (grad_bits.defined() && !unused.empty()) {
      const Tensors own = of_bits(kept.of(unused), rows(unused).sum(1));
      for (size_t j = 0; j < unused.size(); ++j) result[n + unused[j]] = own[j];
    }
    return result;
  }

  // Gradients of the weights in use, in place of `grads` where they may be changed, and of their logits.
  static tuple<Tensors, Tensors> of_weights(AutogradContext* ctx, const Kept& kept, const vector<int64_t>& used, variable_list& grads,
                                            const std::optional<Tensor>& grad_bits) {
    static const auto op = find<tuple<Tensors, Tensors>(at::TensorList, at::TensorList, at::TensorList, at::TensorList, const Tensor&, Ints,
                                                        Ints, Ints, Doubles, Doubles, Quantiles, Quantiles)>("quantize::diffq_backward");
    static const auto in_place = find<Tensors(at::TensorList, at::TensorList, at::TensorList, at::TensorList, const Tensor&, Ints, Ints,
                                              Ints, Doubles, Doubles, Quantiles, Quantiles)>("quantize::diffq_backward_");
    Tensors own;
    for (int64_t i : used) own.push_back(std::move(grads[i]));
    const auto run = [&](const auto& either) {
      return either.call(own, kept.logits, kept.ranges, kept.extremes, ctx->saved_data["seed"].toTensor(), kept.streams, kept.group_sizes,
                         kept.spans, kept.min_bits, kept.max_bits, ctx->saved_data["quantiles"].toOptional<Tensor>(), grad_bits);
    };
    if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return run(op);  // traced
    for (Tensor& grad : own) grad = to_change(std::move(grad));
    Tensors grad_logits = run(in_place);
    return {std::move(own), std::move(grad_logits)};
  }

  // Gradients of logits whose weights have none, by their bits. grad: of each weight's.
  static Tensors of_bits(const Kept& kept, const Tensor& grad) {
    static const auto op = find<Tensors(const Tensor&, at::TensorList, Ints, Ints, Doubles, Doubles)>("quantize::diffq_bits_backward");
    return op.call(grad, kept.logits, kept.numels, kept.group_sizes, kept.min_bits, kept.max_bits);
  }
};

struct OnGrid : torch::autograd::Function<OnGrid> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights, at::TensorList logits, Ints group_sizes, Ints spans,
                               Doubles min_bits, Doubles max_bits) {
    static const auto op =
        find<tuple<Tensors, Tensors>(at::TensorList, at::TensorList, Ints, Ints, Doubles, Doubles)>("quantize::diffq_round");
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

struct TotalBits : torch::autograd::Function<TotalBits> {
  static Tensor forward(AutogradContext* ctx, at::TensorList logits, Ints numels, Ints group_sizes, Doubles min_bits, Doubles max_bits,
                        bool rounded) {
    static const auto op = find<Tensor(at::TensorList, Ints, Ints, Doubles, Doubles, bool)>("quantize::diffq_bits");
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward(logits.vec());
    ctx->saved_data["numels"] = numels.vec();
    ctx->saved_data["group_sizes"] = group_sizes.vec();
    ctx->saved_data["min_bits"] = min_bits.vec();
    ctx->saved_data["max_bits"] = max_bits.vec();
    return op.call(logits, numels, group_sizes, min_bits, max_bits, rounded);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {  // of rounded bits: straight through
    static const auto op = find<Tensors(const Tensor&, at::TensorList, Ints, Ints, Doubles, Doubles)>("quantize::diffq_bits_backward");
    TORCH_CHECK(!at::GradMode::is_enabled(), "diffq_total_bits: the backward is not differentiable (create_graph=True)");
    const auto logits = ctx->get_saved_variables();
    variable_list result = gradients(logits.size() + 5);
    if (!grads[0].defined()) return result;
    auto own = op.call(grads[0], logits, ctx->saved_data["numels"].toIntVector(), ctx->saved_data["group_sizes"].toIntVector(),
                       ctx->saved_data["min_bits"].toDoubleVector(), ctx->saved_data["max_bits"].toDoubleVector());
    std::move(own.begin(), own.end(), result.begin());
    return result;
  }
};

tuple<Tensors, Tensor> diffq(at::TensorList weights, at::TensorList logits, const Tensor& seed, Ints streams, Ints group_sizes, Ints spans,
                             Doubles min_bits, Doubles max_bits, Quantiles quantiles) {
  Tensors y = DiffQ::apply(weights, logits, seed, streams, group_sizes, spans, min_bits, max_bits, quantiles);
  Tensor bits = std::move(y.back());
  y.pop_back();
  return {std::move(y), std::move(bits)};
}

Tensors diffq_on_grid(at::TensorList weights, at::TensorList logits, Ints group_sizes, Ints spans, Doubles min_bits, Doubles max_bits) {
  return OnGrid::apply(weights, logits, group_sizes, spans, min_bits, max_bits);
}

Tensor diffq_total_bits(at::TensorList logits, Ints numels, Ints group_sizes, Doubles min_bits, Doubles max_bits, bool rounded) {
  return TotalBits::apply(logits, numels, group_sizes, min_bits, max_bits, rounded);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("diffq", diffq);
  m.impl("diffq_on_grid", diffq_on_grid);
  m.impl("diffq_total_bits", diffq_total_bits);
}

}  // namespace quantize::weight
