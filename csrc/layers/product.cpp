// product: a * b of equal sizes, or a @ b, of two activations. Each is kept packed where the other's gradient needs it; that gradient is
// linear in it, so its mean is exact. softmax: keeps its output packed.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/softmax.h>
#include <torch/library.h>

#include "packed_inputs.h"

namespace quantize::layers {
namespace {

struct Product : torch::autograd::Function<Product> {
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& b, bool matrices, const PackedInputs& packed) {
    NumberWriter numbers(ctx);
    variable_list saved = packed.save(ctx, numbers, a, 0);
    for (Tensor& t : packed.save(ctx, numbers, b, 1)) saved.push_back(std::move(t));
    numbers.put(int64_t(matrices)).save();
    ctx->save_for_backward(std::move(saved));
    at::AutoDispatchBelowADInplaceOrView below;
    return matrices ? at::matmul(a, b) : at::mul(a, b);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("product");
    variable_list result(4);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    NumberReader numbers(ctx);
    const SavedActivation a(numbers), b(numbers);
    const bool matrices = numbers.get_bool();
    if (ctx->needs_input_grad(0)) {
      const Tensor other = b.unpack(&saved[4]);
      result[0] = at::sum_to(matrices ? grad.matmul(other.mT()) : grad * other, a.layout.size);
    }
    if (ctx->needs_input_grad(1)) {
      const Tensor other = a.unpack(&saved[0]);
      result[1] = at::sum_to(matrices ? other.mT().matmul(grad) : grad * other, b.layout.size);
    }
    return result;
  }
};

Tensor product(const Tensor& a, const Tensor& b, bool matrices, at::TensorList packed, at::IntArrayRef bits, int64_t group_size) {
  const PackedInputs operands{packed, bits, group_size};
  operands.check("product", 2);
  return Product::apply(a, b, matrices, operands);
}

struct Softmax : torch::autograd::Function<Softmax> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, int64_t dim, int64_t bits, int64_t group_size, const Tensor& seed) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor output = at::softmax(input, dim);
    static const auto quantize =
        find_op<std::tuple<Tensor, Tensor>(const Tensor&, int64_t, int64_t, const Tensor&)>("quantize::group_quantize");
    auto [codes, ranges] = quantize.call(output, bits, group_size, seed);
    const OptionalTensor own_codes = codes, own_ranges = ranges, own_seed = seed, none;
    const PackedArguments packed{own_codes, own_ranges, none, bits, group_size, own_seed, none};
    NumberWriter numbers(ctx);
    save_packed(ctx, numbers, output, packed);
    numbers.put(dim).save();
    ctx->save_for_backward(packed_tensors(packed));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("softmax");
    variable_list result(5);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    NumberReader numbers(ctx);
    const SavedActivation kept(numbers);
    const Tensor p = kept.unpack(saved.data()), weighed = p * grads[0].to(kept.dtype);
    const int64_t dim = numbers.get_int();
    // p * (g - sum(g * p)), with a mean in place of the sum: noise in p leaves it a mean, whatever g's own mean is.
    const Tensor total = p.sum(dim, /*keepdim=*/true, at::kFloat).clamp_min_(1e-30);
    const Tensor mean = weighed.sum(dim, /*keepdim=*/true, at::kFloat).div_(total);
    result[0] = weighed.sub_(p * mean.to(kept.dtype));
    return result;
  }
};

Tensor softmax(const Tensor& input, int64_t dim, int64_t bits, int64_t group_size, const Tensor& seed) {
  return Softmax::apply(input, dim, bits, group_size, seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("product", product);
  m.impl("softmax", softmax);
}

}  // namespace quantize::layers
