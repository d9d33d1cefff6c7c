// attention: scaled_dot_product_attention whose query, key and value are kept packed, and nothing else. The backward makes the output
// again, from the unpacked ones, by whichever kernel PyTorch chooses for them, and takes that one's gradients.
//
// Those are linear in the value, so noise in it leaves their means alone. They are not in query and key, through the softmax: whoever
// packs these takes bits enough that what is left of the bias, half the variance of a score's noise, is small.
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <mutex>

#include "packed_inputs.h"

namespace quantize::layers {
namespace {

constexpr int parts = 3;  // query, key, value

struct AttentionArguments {
  double dropout;
  bool causal;
  std::optional<double> scale;
  bool gqa;
};

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, const AttentionArguments& a) {
  return at::scaled_dot_product_attention(query, key, value, mask, a.dropout, a.causal, a.scale, a.gqa);
}

at::Generator generator_of(const Tensor& x) { return at::globalContext().defaultGenerator(x.device()); }

Tensor generator_state(at::Generator generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void set_generator_state(at::Generator generator, const Tensor& state) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

// While it lives the device's generator draws what it drew after `state`.
class Replay {
 public:
  Replay(const Tensor& x, const Tensor& state) : generator_(generator_of(x)), before_(generator_state(generator_)) {
    set_generator_state(generator_, state);
  }
  ~Replay() { set_generator_state(generator_, before_); }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

 private:
  at::Generator generator_;
  Tensor before_;
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
                        const AttentionArguments& arguments, const PackedInputs& packed) {
    NumberWriter numbers(ctx);
    const Tensor* inputs[parts] = {&query, &key, &value};
    variable_list saved{mask.value_or(Tensor())};
    for (int i = 0; i < parts; ++i)
      for (Tensor& t : packed.save(ctx, numbers, *inputs[i], i)) saved.push_back(std::move(t));
    numbers.put(int64_t(arguments.causal)).put(int64_t(arguments.gqa)).save();
    ctx->saved_data["dropout"] = arguments.dropout;
    ctx->saved_data["scale"] = arguments.scale;
    if (arguments.dropout > 0) ctx->saved_data["drawn"] = generator_state(generator_of(query));
    ctx->save_for_backward(std::move(saved));
    at::AutoDispatchBelowADInplaceOrView below;
    return attend(query, key, value, mask, arguments);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("attention");
    variable_list result(6);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    NumberReader numbers(ctx);
    Tensor inputs[parts + 1];
    variable_list wanted;
    std::vector<int> places;
    for (int i = 0; i <= parts; ++i) {
      inputs[i] = i < parts ? SavedActivation(numbers).unpack(&saved[1 + 4 * i]) : saved[0];
      if (!inputs[i].defined()) continue;
      const bool needed = ctx->needs_input_grad(i);
      inputs[i] = inputs[i].detach();
      inputs[i].set_requires_grad(needed);
      if (needed) wanted.push_back(inputs[i]), places.push_back(i);
    }
    AttentionArguments arguments{ctx->saved_data["dropout"].toDouble(), numbers.get_bool(), ctx->saved_data["scale"].toOptional<double>(),
                                 numbers.get_bool()};
    std::optional<Replay> replay;
    if (arguments.dropout > 0) replay.emplace(inputs[0], ctx->saved_data["drawn"].toTensor());
    const at::AutoGradMode recording(true);
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);  // the inputs are what it made of them
    const OptionalTensor mask = inputs[parts].defined() ? OptionalTensor(inputs[parts]) : std::nullopt;
    const Tensor output = attend(inputs[0], inputs[1], inputs[2], mask, arguments);
    const variable_list gradients = torch::autograd::grad({output}, wanted, {grads[0].to(output.scalar_type())});
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = gradients[i];
    return result;
  }
};

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, double dropout, bool causal,
                 std::optional<double> scale, bool gqa, at::TensorList packed, at::IntArrayRef bits, int64_t group_size) {
  const PackedInputs inputs{packed, bits, group_size};
  inputs.check("attention", parts);
  return Attention::apply(query, key, value, mask, AttentionArguments{dropout, causal, scale, gqa}, inputs);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("attention", attention); }

}  // namespace quantize::layers
