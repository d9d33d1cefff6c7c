// round_power_of_two: CPU and Meta; power_of_two: straight through.
#include "power_of_two.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <bit>

#include "../core/checks.h"
#include "../core/dense.h"
#include "../core/dispatch.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using weight::round_power_of_two;

double round_power_of_two(double x, bool plus) {
  return std::bit_cast<double>(round_power_of_two_bits<Float64Format>(std::bit_cast<uint64_t>(x), plus));
}

template <typename T>
void round_all(const Tensor& x, const Tensor& y, bool plus) {
  const T* source = static_cast<const T*>(x.const_data_ptr());
  T* target = static_cast<T*>(y.mutable_data_ptr());
  at::parallel_for(0, x.numel(), 8192, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = round_power_of_two(source[i], plus);
  });
}

Tensor round_power_of_two_cpu(const Tensor& input, bool plus) {
  const Tensor x = dense(input);
  Tensor y = at::empty_like(x);
  if (x.scalar_type() == at::kDouble) {
    round_all<double>(x, y, plus);
    return y;
  }
  switch (check_scalar("power_of_two", "x", x.scalar_type())) {
    case Scalar::f32:
      round_all<F32>(x, y, plus);
      break;
    case Scalar::f16:
      round_all<F16>(x, y, plus);
      break;
    case Scalar::bf16:
      round_all<BF16>(x, y, plus);
  }
  return y;
}

Tensor round_power_of_two_meta(const Tensor& x, bool) { return at::empty_like(x); }

struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static Tensor forward(AutogradContext*, const Tensor& x, bool plus) {
    static const auto op = find_op<Tensor(const Tensor&, bool)>("quantize::round_power_of_two");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(x, plus);
  }

  static variable_list backward(AutogradContext*, variable_list grads) { return {grads[0], Tensor()}; }
};

Tensor power_of_two(const Tensor& x, bool plus) { return StraightThrough::apply(x, plus); }

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("round_power_of_two", round_power_of_two_cpu); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("round_power_of_two", round_power_of_two_meta); }
TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) { m.impl("power_of_two", power_of_two); }

}  // namespace quantize::weight
