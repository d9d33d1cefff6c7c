// batch_norm_backward: from the packed normalized input to the gradients. On the CPU in two passes that decode it piece by piece, so that
// the input never exists in full precision again; elsewhere, and for layouts the kernels do not know, by way of the decoded tensor and
// ATen.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

#include "batch_norm_kernels.h"
#include "channel_shape.h"
#include "energy.h"
#include "packed_chunks.h"

namespace quantize::layers {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of input, weight, bias; energies

struct Arguments {
  const Tensor &grad, &codes, &ranges;
  const OptionalTensor& sample_bits;
  int64_t bits, group_size;
  c10::SymIntArrayRef size, stride;
  const Tensor& seed;
  const OptionalTensor& weight;
  const Tensor& inverse_std;
  bool training;
  std::array<bool, 3> mask;
  bool wants_energy;
};

Tensor gain_of(const Arguments& a) {
  const Tensor inverse_std = a.inverse_std.to(at::kFloat);
  return a.weight ? inverse_std * a.weight->to(at::kFloat) : inverse_std;
}

// energy.h's figures from the normalized input x, the output gradient and the input gradient; all means are over samples and positions.
Tensor generic_energy(const Tensor& x, const Arguments& a, const Tensor& grad_input) {
  const int64_t channels = x.size(1);
  const double count = double(x.numel()) / double(channels), positions = count / double(x.size(0));
  std::vector<int64_t> rest;
  for (int64_t d = 2; d < x.dim(); ++d) rest.push_back(d);
  const Tensor g = a.grad.to(at::kFloat);
  const auto per_channel = [&](const Tensor& t) { return rest.empty() ? t : t.sum(rest); };  // [N, C]
  const Tensor g2 = per_channel(g.square()), correlation = per_channel(g * x.to(at::kFloat)).sum(0) / count;
  const Tensor gain = gain_of(a).square();
  const double spread = 1. / (double(channels) * positions);
  Tensor energy = at::empty({x.size(0), 2}, x.options().dtype(at::kFloat));
  // Of the scale's gradient sum g * x, and of the preceding convolution's along x.
  energy.select(1, 0).copy_((g2 * (gain + 1.)).sum(1) * spread);
  // Of the input gradient gain * (g - mean g - x * correlation), in which the noise enters twice.
  const Tensor direct = (gain * correlation.square()).sum() / double(channels), through_mean = (g2 * gain).sum(1) * (spread / count);
  energy.select(1, 1).copy_((direct + through_mean) / grad_input.to(at::kFloat).square().sum().clamp_min(1e-30));
  return energy;
}

// What both ways rely on, and read memory by.
void check_arguments(const Arguments& a) {
  const char* op = "batch_norm_backward";
  const auto size = C10_AS_INTARRAYREF_SLOW(a.size), stride = C10_AS_INTARRAYREF_SLOW(a.stride);
  TORCH_CHECK_VALUE(a.grad.sizes() == size && size.size() >= 2, op, ": grad must have the shape ", size, "; got ", a.grad.sizes());
  TORCH_CHECK_VALUE(stride.size() == size.size() && activation::packed_strides(size, stride) == stride.vec(), op,
                    ": stride must be dense with samples outermost; got ", stride, " for ", size);
  if (a.weight) check_numel(op, "weight", *a.weight, size[1]);
  check_numel(op, "inverse_std", a.inverse_std, size[1]);
}

// ATen's backward for channels whose mean is 0, whose deviation is 1, and whose weight is the gain.
Gradients generic_backward(const Arguments& a) {
  const Tensor x =
      group_dequantize().call(a.codes, a.ranges, a.sample_bits, a.bits, a.group_size, a.size, a.stride, a.grad.scalar_type(), a.seed);
  const Tensor gain = gain_of(a), zeros = at::zeros_like(gain), ones = at::ones_like(gain);
  auto [input, weight, bias] = at::native_batch_norm_backward(a.grad, x, gain, zeros, ones, zeros, ones, a.training, /*eps=*/0., a.mask);
  if (input.defined() && input.strides() != x.strides()) input = at::empty_strided(x.sizes(), x.strides(), x.options()).copy_(input);
  for (Tensor* t : {&weight, &bias})
    if (a.weight && t->defined()) *t = t->to(a.weight->scalar_type());
  return {input, weight, bias, a.wants_energy ? generic_energy(x, a, input) : at::empty({0, 2}, gain.options())};
}

Tensor channel_tensor(const std::vector<double>& values, const Tensor& like) {
  Tensor t = at::empty({int64_t(values.size())}, like.options().dtype(at::kFloat));
  std::copy(values.begin(), values.end(), t.data_ptr<float>());
  return t.to(like.scalar_type());
}

class PackedBackward : PackedChunks {
 public:
  PackedBackward(const Arguments& a, const PackedTensor& packed, at::IntArrayRef size, at::IntArrayRef stride, int64_t inner)
      : PackedChunks(packed, size[1], inner), a_(a), size_(size), stride_(stride) {}

  Gradients run() {
    const auto inverse_std = channel_values(a_.inverse_std, channels_, 1.), weight = channel_values(a_.weight, channels_, 1.);
    reduce();
    const double m = double(p_.layout.elements / channels_ * size_[0]);
    std::vector<double> offset(channels_, 0.), slope(channels_, 0.), gain(channels_);
    for (int64_t c = 0; c < channels_; ++c) {
      gain[c] = inverse_std[c] * weight[c];
      if (a_.training) offset[c] = grad_[c] / m, slope[c] = product_[c] / m;
    }
    Gradients result;
    const Tensor& like = a_.weight ? *a_.weight : a_.inverse_std;
    if (a_.mask[0]) std::get<0>(result) = apply(offset, slope, gain);
    if (a_.mask[1]) std::get<1>(result) = channel_tensor(product_, like);
    if (a_.mask[2]) std::get<2>(result) = channel_tensor(grad_, like);
    std::get<3>(result) = energy(gain, m);
    return result;
  }

 private:
  const BatchNormKernels& kernels() const { return batch_norm_kernels(cpu_isa(), p_.scalar); }

  void fold(const float* slots, double* sums) const {
    if (run_.inner) {
      for (int64_t c = 0; c < channels_; ++c)
        for (int l = 0; l < 16; ++l) sums[c] += double(slots[16 * c + l]);
      return;
    }
    for (int64_t column = 0; column < run_.width; column += channels_)
      for (int64_t c = 0; c < channels_; ++c) sums[c] += double(slots[column + c]);
  }

  // grad_, product_ [channel]; with energies squares_ [sample][channel].
  void reduce() {
    const auto* grad = static_cast<const uint8_t*>(a_.grad.const_data_ptr());
    const int64_t slots = run_.slots(), channels = channels_;
    std::vector<double> sums(units_ * 2 * channels, 0.);
    const int64_t parts = a_.wants_energy ? sample_units_ : 0;
    std::vector<double> squares(p_.layout.samples * parts * channels, 0.);
    for_each_unit([&](int64_t unit, void* buffer) {
      std::vector<float> own(3 * slots, 0.f);
      float* square = a_.wants_energy ? own.data() + 2 * slots : nullptr;
      int64_t current = -1;
      const auto finish = [&] {  // a sample's squares
        if (square && current >= 0) fold(square, squares.data() + (current * parts + unit % sample_units_) * channels);
        if (square) std::fill_n(square, slots, 0.f);
      };
      for_each_chunk(unit, buffer, [&](int64_t sample, const void* x, ChannelRun run) {
        if (sample != current) finish();
        current = sample;
        kernels().reduce(x, grad + bytes_before(sample, run), run, {own.data(), own.data() + slots, square});
      });
      finish();
      fold(own.data(), sums.data() + 2 * unit * channels), fold(own.data() + slots, sums.data() + (2 * unit + 1) * channels);
    });
    grad_.assign(channels, 0.), product_.assign(channels, 0.);
    for (int64_t unit = 0; unit < units_; ++unit)
      for (int64_t c = 0; c < channels; ++c) grad_[c] += sums[2 * unit * channels + c], product_[c] += sums[(2 * unit + 1) * channels + c];
    if (parts <= 1) {
      squares_ = std::move(squares);
      return;
    }
    squares_.assign(p_.layout.samples * channels, 0.);
    for (int64_t i = 0; i < p_.layout.samples * parts; ++i)
      for (int64_t c = 0; c < channels; ++c) squares_[i / parts * channels + c] += squares[i * channels + c];
  }

  Tensor apply(const std::vector<double>& offset, const std::vector<double>& slope, const std::vector<double>& gain) {
    Tensor result = at::empty_strided(size_, stride_, a_.grad.options());
    const auto* grad = static_cast<const uint8_t*>(a_.grad.const_data_ptr());
    auto* target = static_cast<uint8_t*>(result.data_ptr());
    const auto offsets = spread_channels(offset, run_.width), slopes = spread_channels(slope, run_.width);
    const auto gains = spread_channels(gain, run_.width);
    for_each_unit([&](int64_t unit, void* buffer) {
      for_each_chunk(unit, buffer, [&](int64_t sample, const void* x, ChannelRun run) {
        const int64_t at = bytes_before(sample, run);
        kernels().apply(x, grad + at, run, {offsets.data(), slopes.data(), gains.data()}, target + at);
      });
    });
    return result;
  }

  // As generic_energy. The input gradient's sum of squares follows from the sums: it is gain times g less its projections on 1 and on x.
  Tensor energy(const std::vector<double>& gain, double m) const {
    const int64_t samples = size_[0];
    Tensor result = at::empty({a_.wants_energy ? samples : 0, 2}, a_.grad.options().dtype(at::kFloat));
    if (!a_.wants_energy) return result;
    const double spread = 1. / double(p_.layout.elements);
    double direct = 0, total = 0;
    std::vector<double> square(channels_, 0.);
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t c = 0; c < channels_; ++c) square[c] += squares_[n * channels_ + c];
    for (int64_t c = 0; c < channels_; ++c) {
      const double correlation = product_[c] / m, along = gain[c] * correlation;
      direct += along * along / double(channels_);
      total += gain[c] * gain[c] * std::max(0., square[c] - grad_[c] * grad_[c] / m - correlation * correlation * m);
    }
    for (int64_t n = 0; n < samples; ++n) {
      double own = 0, through_mean = 0;
      for (int64_t c = 0; c < channels_; ++c) {
        const double g2 = squares_[n * channels_ + c], factor = gain[c] * gain[c];
        own += g2 * (factor + 1.), through_mean += g2 * factor;
      }
      float* row = result.data_ptr<float>() + 2 * n;
      row[0] = float(own * spread);
      row[1] = float((direct + through_mean * spread / m) / std::max(total, 1e-30));
    }
    return result;
  }

  const Arguments& a_;
  at::IntArrayRef size_, stride_;
  std::vector<double> grad_, product_, squares_;
};

Gradients packed_backward(const Arguments& a) {
  const char* op = "batch_norm_backward";
  const Scalar scalar = check_scalar(op, "grad", a.grad.scalar_type());
  const auto size = C10_AS_INTARRAYREF_SLOW(a.size), stride = C10_AS_INTARRAYREF_SLOW(a.stride);
  const ChunkLayout layout(op, size, stride, a.group_size, a.codes, a.ranges, a.bits, a.sample_bits);
  if (!layout.inner) return generic_backward(a);
  Tensor grad = a.grad;
  if (grad.strides() != stride) grad = at::empty_strided(size, stride, grad.options()).copy_(grad);
  const Arguments own{grad,     a.codes, a.ranges, a.sample_bits, a.bits,     a.group_size, a.size,
                      a.stride, a.seed,  a.weight, a.inverse_std, a.training, a.mask,       a.wants_energy};
  const PackedTensor packed(op, layout.groups, scalar, a.seed, a.codes, a.ranges, a.bits, a.sample_bits);
  return PackedBackward(own, packed, size, stride, *layout.inner).run();
}

template <Gradients (*backward)(const Arguments&)>
Gradients checked(const Arguments& a) {
  check_arguments(a);
  return backward(a);
}

Gradients meta_backward(const Arguments& a) {
  TORCH_CHECK_VALUE(a.size.size() >= 2, "batch_norm_backward: size must be [N, C, ...]; got ", a.size);
  Gradients result;
  const auto like = (a.weight ? *a.weight : a.inverse_std).options();
  if (a.mask[0]) std::get<0>(result) = at::empty_strided_symint(a.size, a.stride, a.grad.options());
  if (a.mask[1]) std::get<1>(result) = at::empty_symint({a.size[1]}, like);
  if (a.mask[2]) std::get<2>(result) = at::empty_symint({a.size[1]}, like);
  std::get<3>(result) = at::empty_symint({a.wants_energy ? a.size[0] : c10::SymInt(0), 2}, a.inverse_std.options().dtype(at::kFloat));
  return result;
}

template <Gradients (*backward)(const Arguments&)>
Gradients batch_norm_backward(const Tensor& grad, const Tensor& codes, const Tensor& ranges, const OptionalTensor& sample_bits,
                              int64_t bits, int64_t group_size, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, const Tensor& seed,
                              const OptionalTensor& weight, const Tensor& inverse_std, bool training, std::array<bool, 3> mask,
                              bool wants_energy) {
  return backward(
      {grad, codes, ranges, sample_bits, bits, group_size, size, stride, seed, weight, inverse_std, training, mask, wants_energy});
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("batch_norm_backward", batch_norm_backward<checked<packed_backward>>); }
TORCH_LIBRARY_IMPL(quantize, CUDA, m) { m.impl("batch_norm_backward", batch_norm_backward<checked<generic_backward>>); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("batch_norm_backward", batch_norm_backward<meta_backward>); }

}  // namespace quantize::layers
