// sign_quantize, unit_quantize, grid_backward: CPU and Meta; sign_activation and unit_activation: the differentiable ops over them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "../activation/saved_layout.h"
#include "../core/autograd.h"
#include "../core/dispatch.h"
#include "fixed_grid_call.h"
#include "fixed_grid_kernels.h"

namespace quantize::weight {
namespace {

using activation::empty_packed;
using activation::packed_memory;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Results = std::tuple<Tensor, Tensor>;

constexpr int64_t grain = 16384;  // elements a task; tasks meet on whole bytes

// body(first element, elements), the first a multiple of 16.
template <typename Body>
void for_spans(int64_t n, const Body& body) {
  at::parallel_for(0, (n + 15) / 16, grain / 16, [&](int64_t begin, int64_t end) { body(begin * 16, std::min(n, end * 16) - begin * 16); });
}

// kernel(source, elements, target, kept) over all of the input.
template <typename Kernel>
Results quantize_all(const Tensor& input, bool polynomial, const Kernel& kernel) {
  const Tensor x = packed_memory(input);
  Tensor y = at::empty_strided(x.sizes(), x.strides(), x.options());
  Tensor kept = at::empty({slope_bytes(x.numel(), polynomial)}, x.options().dtype(at::kByte));
  const int64_t item = x.element_size();
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  auto* bits = kept.mutable_data_ptr<uint8_t>();
  for_spans(x.numel(), [&](int64_t first, int64_t n) {
    kernel(source + first * item, n, target + first * item, bits + slope_bytes(first, polynomial));
  });
  return {y, kept};
}

Results sign_quantize_cpu(const Tensor& x, bool polynomial) {
  const auto& kernels = fixed_grid_kernels(cpu_isa(), check_scalar("sign_quantize", "x", x.scalar_type()));
  return quantize_all(x, polynomial, polynomial ? kernels.sign_polynomial : kernels.sign);
}

Results unit_quantize_cpu(const Tensor& x, int64_t levels) {
  const auto& kernels = fixed_grid_kernels(cpu_isa(), check_unit(x, levels));
  const LsqRange range = unit_range(int(levels));
  return quantize_all(x, false,
                      [&](const void* source, int64_t n, void* target, uint8_t* kept) { kernels.unit(source, n, range, target, kept); });
}

Tensor grid_backward_cpu(const Tensor& input, const Tensor& kept, bool polynomial) {
  const Scalar scalar = check_grid_backward(input, kept, polynomial);
  const Tensor grad = packed_memory(input), bits = kept.contiguous();
  Tensor out = at::empty_strided(grad.sizes(), grad.strides(), grad.options());
  const auto& kernels = fixed_grid_kernels(cpu_isa(), scalar);
  const auto kernel = polynomial ? kernels.slope : kernels.pass;
  const int64_t item = grad.element_size();
  const auto* source = static_cast<const uint8_t*>(grad.const_data_ptr());
  auto* target = static_cast<uint8_t*>(out.mutable_data_ptr());
  for_spans(grad.numel(), [&](int64_t first, int64_t n) {
    kernel(source + first * item, bits.const_data_ptr<uint8_t>() + slope_bytes(first, polynomial), n, target + first * item);
  });
  return out;
}

Results sign_quantize_meta(const Tensor& x, bool polynomial) {
  check_scalar("sign_quantize", "x", x.scalar_type());
  const c10::SymInt bytes = polynomial ? (x.sym_numel() + 1) / 2 : (x.sym_numel() + 7) / 8;
  return {empty_packed(x), at::empty_symint({bytes}, x.options().dtype(at::kByte))};
}

Results unit_quantize_meta(const Tensor& x, int64_t levels) {
  check_unit(x, levels);
  return {empty_packed(x), at::empty_symint({(x.sym_numel() + 7) / 8}, x.options().dtype(at::kByte))};
}

Tensor grid_backward_meta(const Tensor& grad, const Tensor&, bool) { return empty_packed(grad); }

void save(AutogradContext* ctx, const Tensor& x, const Tensor& kept, bool polynomial) {
  NumberWriter numbers(ctx);
  activation::save_layout(numbers, x);
  numbers.put(int64_t(polynomial)).save();
  ctx->save_for_backward({kept});
}

variable_list backward_of(const char* name, AutogradContext* ctx, const Tensor& grad) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, bool)>("quantize::grid_backward");
  if (!grad.defined()) return {Tensor(), Tensor()};
  refuse_double_backward(name, "the backward of a quantized activation");
  NumberReader numbers(ctx);
  const activation::SavedLayout layout(numbers);
  return {op.call(layout.ordered(grad), ctx->get_saved_variables()[0], numbers.get_bool()), Tensor()};
}

struct SignActivation : torch::autograd::Function<SignActivation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, bool polynomial) {
    static const auto op = find_op<Results(const Tensor&, bool)>("quantize::sign_quantize");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, kept] = op.call(x, polynomial);
    save(ctx, x, kept, polynomial);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) { return backward_of("sign_activation", ctx, grads[0]); }
};

struct UnitActivation : torch::autograd::Function<UnitActivation> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t levels) {
    static const auto op = find_op<Results(const Tensor&, int64_t)>("quantize::unit_quantize");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, kept] = op.call(x, levels);
    save(ctx, x, kept, false);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) { return backward_of("unit_activation", ctx, grads[0]); }
};

Tensor sign_activation(const Tensor& x, bool polynomial) { return SignActivation::apply(x, polynomial); }
Tensor unit_activation(const Tensor& x, int64_t levels) { return UnitActivation::apply(x, levels); }

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("sign_quantize", sign_quantize_cpu);
  m.impl("unit_quantize", unit_quantize_cpu);
  m.impl("grid_backward", grid_backward_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("sign_quantize", sign_quantize_meta);
  m.impl("unit_quantize", unit_quantize_meta);
  m.impl("grid_backward", grid_backward_meta);
}
TORCH_LIBRARY_IMPL(quantize, CompositeImplicitAutograd, m) {
  m.impl("sign_activation", sign_activation);
  m.impl("unit_activation", unit_activation);
}

}  // namespace quantize::weight
