// pad: reflecting and replicating pads, of which only the input's shape is kept.
#include <ATen/ops/pad.h>
#include <ATen/ops/reflection_pad1d_backward.h>
#include <ATen/ops/reflection_pad2d_backward.h>
#include <ATen/ops/reflection_pad3d_backward.h>
#include <ATen/ops/replication_pad1d_backward.h>
#include <ATen/ops/replication_pad2d_backward.h>
#include <ATen/ops/replication_pad3d_backward.h>
#include <torch/library.h>

#include "saved_activation.h"

namespace quantize::layers {
namespace {

using Backward = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef);
constexpr Backward* backwards[2][3] = {
    {at::reflection_pad1d_backward_symint, at::reflection_pad2d_backward_symint, at::reflection_pad3d_backward_symint},
    {at::replication_pad1d_backward_symint, at::replication_pad2d_backward_symint, at::replication_pad3d_backward_symint}};

struct Pad : torch::autograd::Function<Pad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, c10::SymIntArrayRef padding, bool replicate) {
    at::AutoDispatchBelowADInplaceOrView below;
    NumberWriter numbers(ctx);
    save_layout(numbers, input);
    numbers.put_list(padding).put(int64_t(replicate)).save();
    return at::pad_symint(input, padding, replicate ? "replicate" : "reflect");
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("pad");
    variable_list result(3);
    if (!grads[0].defined()) return result;
    NumberReader numbers(ctx);
    const SavedLayout layout(numbers);
    const auto padding = numbers.get_list();
    const auto backward = backwards[numbers.get_bool()][padding.size() / 2 - 1];
    result[0] = backward(grads[0], layout.empty(grads[0].options()), padding);
    return result;
  }
};

Tensor pad(const Tensor& input, c10::SymIntArrayRef padding, c10::string_view mode) {
  TORCH_CHECK_VALUE(mode == "reflect" || mode == "replicate", "pad: mode must be reflect or replicate; got ", mode);
  TORCH_CHECK_VALUE(padding.size() == 2 || padding.size() == 4 || padding.size() == 6, "pad: padding must have 2, 4 or 6 numbers; got ",
                    padding.size());
  return Pad::apply(input, padding, mode == "replicate");
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("pad", pad); }

}  // namespace quantize::layers
