// norm_dequantize: what a batch norm, and a (leaky) ReLU behind it, made of the norm's packed normalized input. On the CPU in one pass over
// pieces that a cache holds; elsewhere, and for layouts the kernels do not know, by way of the decoded tensor and ATen.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "../activation/sign_mask_kernels.h"
#include "channel_shape.h"
#include "norm_input.h"
#include "packed_chunks.h"

namespace quantize::layers {
namespace {

struct Arguments {
  const Tensor &codes, &ranges;
  const OptionalTensor& sample_bits;
  int64_t bits, group_size;
  c10::SymIntArrayRef size, stride;
  at::ScalarType dtype;
  const Tensor& seed;
  const OptionalTensor &weight, &bias, &mask;
  double slope;
};

Tensor masked(const Tensor& y, const OptionalTensor& mask, double slope) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, double, double)>("quantize::apply_mask");
  return mask ? op.call(y, *mask, 1., slope) : y;
}

Tensor generic(const Arguments& a) {
  const Tensor x = group_dequantize().call(a.codes, a.ranges, a.sample_bits, a.bits, a.group_size, a.size, a.stride, a.dtype, a.seed);
  const auto shape = channel_shape(x);
  Tensor y = x.to(at::kFloat);
  if (a.weight) y = y.mul(a.weight->to(at::kFloat).view(shape));
  if (a.bias) y = y.add(a.bias->to(at::kFloat).view(shape));
  return masked(y.to(a.dtype), a.mask, a.slope);
}

class Normalized : PackedChunks {
 public:
  Normalized(const Arguments& a, const PackedTensor& packed, int64_t inner) : PackedChunks(packed, a.size[1].expect_int(), inner), a_(a) {}

  void run(void* target) const {
    const auto gain = spread_channels(channel_values(a_.weight, channels_, 1.), run_.width);
    const auto offset = spread_channels(channel_values(a_.bias, channels_, 0.), run_.width);
    const uint8_t* mask = a_.mask ? a_.mask->const_data_ptr<uint8_t>() : nullptr;
    for_each_unit([&](int64_t unit, void* buffer) {
      for_each_chunk(unit, buffer, [&](int64_t sample, const void* x, ChannelRun run) {
        void* y = static_cast<uint8_t*>(target) + bytes_before(sample, run);
        batch_norm_kernels(cpu_isa(), p_.scalar).scale(x, run, {offset.data(), nullptr, gain.data()}, mask ? buffer : y);
        const int64_t bit = sample * p_.layout.elements + run.first;  // of a byte the first: groups are eights
        if (mask) activation::mask_kernels(cpu_isa(), p_.scalar).apply(buffer, mask + bit / 8, run.count, 1.f, float(a_.slope), y);
      });
    });
  }

 private:
  const Arguments& a_;
};

Tensor packed(const Arguments& a) {
  const char* op = "norm_dequantize";
  const Scalar scalar = check_scalar(op, "dtype", a.dtype);
  const auto size = C10_AS_INTARRAYREF_SLOW(a.size), stride = C10_AS_INTARRAYREF_SLOW(a.stride);
  const ChunkLayout layout(op, size, stride, a.group_size, a.codes, a.ranges, a.bits, a.sample_bits);
  const auto& groups = layout.groups;  // masks go on from byte to byte
  const bool eights = groups.elements % 8 == 0 && (groups.groups == 1 || groups.group_size % 8 == 0);
  if (!layout.inner || (a.mask && !eights)) return generic(a);
  Tensor y = at::empty_strided(size, stride, a.codes.options().dtype(a.dtype));
  const PackedTensor own(op, groups, scalar, a.seed, a.codes, a.ranges, a.bits, a.sample_bits);
  Normalized(a, own, *layout.inner).run(y.data_ptr());
  return y;
}

template <Tensor (*run)(const Arguments&)>
Tensor checked(const Arguments& a) {
  const char* op = "norm_dequantize";
  const auto size = C10_AS_INTARRAYREF_SLOW(a.size), stride = C10_AS_INTARRAYREF_SLOW(a.stride);
  TORCH_CHECK_VALUE(size.size() >= 2 && stride.size() == size.size() && activation::packed_strides(size, stride) == stride.vec(), op,
                    ": size must be [N, C, ...] and stride dense with samples outermost; got ", size, " and ", stride);
  const std::pair<const char*, const OptionalTensor&> per_channel[] = {{"weight", a.weight}, {"bias", a.bias}};
  for (const auto& [name, t] : per_channel)
    if (t) check_numel(op, name, *t, size[1]);
  if (a.mask) {
    check_dtype(op, "mask", *a.mask, at::kByte);
    check_numel(op, "mask", *a.mask, activation::mask_bytes(c10::multiply_integers(size)));
    check_contiguous(op, "mask", *a.mask);
  }
  return run(a);
}

Tensor meta(const Arguments& a) { return at::empty_strided_symint(a.size, a.stride, a.codes.options().dtype(a.dtype)); }

template <Tensor (*run)(const Arguments&)>
Tensor norm_dequantize(const Tensor& codes, const Tensor& ranges, const OptionalTensor& sample_bits, int64_t bits, int64_t group_size,
                       c10::SymIntArrayRef size, c10::SymIntArrayRef stride, at::ScalarType dtype, const Tensor& seed,
                       const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mask, double slope) {
  return run({codes, ranges, sample_bits, bits, group_size, size, stride, dtype, seed, weight, bias, mask, slope});
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("norm_dequantize", norm_dequantize<checked<packed>>); }
TORCH_LIBRARY_IMPL(quantize, CUDA, m) { m.impl("norm_dequantize", norm_dequantize<checked<generic>>); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("norm_dequantize", norm_dequantize<meta>); }

}  // namespace quantize::layers
