// norm_quantize, norm_quantize_mixed, norm_variance: packing what a batch norm makes of its input before weight and bias. On the CPU in one
// pass over pieces that a cache holds; elsewhere, and for layouts the kernels do not know, by way of the normalized tensor and ATen.
#include <torch/library.h>

#include "../activation/group_stream.h"
#include "channel_shape.h"
#include "packed_chunks.h"
#include "saved_activation.h"

namespace quantize::layers {
namespace {

using std::tuple;

struct Arguments {
  const char* op;
  const Tensor &x, &mean, &inverse_std;
};

// In the memory order that x is packed in.
Tensor generic_normalize(const Arguments& a) {
  const auto shape = channel_shape(a.x);
  const Tensor y = a.x.to(at::kFloat).sub(a.mean.view(shape)).mul_(a.inverse_std.view(shape)).to(a.x.scalar_type());
  const auto strides = activation::packed_strides(a.x.sym_sizes(), a.x.sym_strides());
  return y.sym_strides() == c10::SymIntArrayRef(strides) ? y : activation::empty_packed(a.x).copy_(y);
}

const auto& group_quantize() {
  static const auto op = find_op<tuple<Tensor, Tensor>(const Tensor&, int64_t, int64_t, const Tensor&)>("quantize::group_quantize");
  return op;
}

const auto& group_quantize_mixed() {
  static const auto op =
      find_op<tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, int64_t, const Tensor&)>("quantize::group_quantize_mixed");
  return op;
}

const auto& group_variance() {
  static const auto op = find_op<Tensor(const Tensor&, int64_t)>("quantize::group_variance");
  return op;
}

void check(const Arguments& a) {
  TORCH_CHECK_VALUE(a.x.dim() >= 2, a.op, ": x must be [N, C, ...]; got ", a.x.sizes());
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"mean", a.mean}, {"inverse_std", a.inverse_std}}) {
    check_dtype(a.op, name, t, at::kFloat);
    check_numel(a.op, name, t, a.x.size(1));
  }
}

// Calls pack(x, make) with what normalizes a stretch, or generic(normalized x) where no kernel does.
template <typename Pack, typename Generic>
auto packed(const Arguments& a, const Pack& pack, const Generic& generic) {
  check(a);
  const Scalar scalar = check_scalar(a.op, "x", a.x.scalar_type());
  const Tensor x = activation::packed_memory(a.x);
  const auto inner = elements_together(x.sizes(), x.strides());
  if (!inner || x.numel() == 0) return generic(generic_normalize(a));
  const int64_t channels = x.size(1), width = *inner ? channels : row_width(channels);
  const auto mean = spread_channels(channel_values(a.mean, channels, 0.), width);
  const auto inverse_std = spread_channels(channel_values(a.inverse_std, channels, 1.), width);
  const auto normalize = batch_norm_kernels(cpu_isa(), scalar).normalize;
  const ChannelTerms terms{mean.data(), nullptr, inverse_std.data()};
  return pack(x, [&](const void* source, activation::Stretch stretch, void* made) {
    normalize(source, {stretch.first, stretch.n, *inner, width}, terms, made);
  });
}

tuple<Tensor, Tensor> norm_quantize_cpu(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, int64_t bits, int64_t group_size,
                                        const Tensor& seed) {
  const Arguments a{"norm_quantize", x, mean, inverse_std};
  return packed(
      a, [&](const Tensor& x, auto make) { return activation::quantize_made(a.op, x, make, bits, group_size, seed); },
      [&](const Tensor& x) { return group_quantize().call(x, bits, group_size, seed); });
}

tuple<Tensor, Tensor> norm_quantize_mixed_cpu(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, const Tensor& sample_bits,
                                              int64_t bit_budget, int64_t group_size, const Tensor& seed) {
  const Arguments a{"norm_quantize_mixed", x, mean, inverse_std};
  return packed(
      a,
      [&](const Tensor& x, auto make) { return activation::quantize_made_mixed(a.op, x, make, sample_bits, bit_budget, group_size, seed); },
      [&](const Tensor& x) { return group_quantize_mixed().call(x, sample_bits, bit_budget, group_size, seed); });
}

Tensor norm_variance_cpu(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, int64_t group_size) {
  const Arguments a{"norm_variance", x, mean, inverse_std};
  return packed(
      a, [&](const Tensor& x, auto make) { return activation::variance_of_made(a.op, x, make, group_size); },
      [&](const Tensor& x) { return group_variance().call(x, group_size); });
}

// Of other backends, and of traces: as two ops.
tuple<Tensor, Tensor> norm_quantize(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, int64_t bits, int64_t group_size,
                                    const Tensor& seed) {
  return group_quantize().call(generic_normalize({"norm_quantize", x, mean, inverse_std}), bits, group_size, seed);
}

tuple<Tensor, Tensor> norm_quantize_mixed(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, const Tensor& sample_bits,
                                          int64_t bit_budget, int64_t group_size, const Tensor& seed) {
  const Tensor normalized = generic_normalize({"norm_quantize_mixed", x, mean, inverse_std});
  return group_quantize_mixed().call(normalized, sample_bits, bit_budget, group_size, seed);
}

Tensor norm_variance(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, int64_t group_size) {
  return group_variance().call(generic_normalize({"norm_variance", x, mean, inverse_std}), group_size);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("norm_quantize", norm_quantize_cpu);
  m.impl("norm_quantize_mixed", norm_quantize_mixed_cpu);
  m.impl("norm_variance", norm_variance_cpu);
}

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("norm_quantize", norm_quantize);
  m.impl("norm_quantize_mixed", norm_quantize_mixed);
  m.impl("norm_variance", norm_variance);
}

TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("norm_quantize", norm_quantize);
  m.impl("norm_quantize_mixed", norm_quantize_mixed);
  m.impl("norm_variance", norm_variance);
}

}  // namespace quantize::layers
