// group_stream.h: parts of a run go through a buffer that the first cache holds.
#include "group_stream.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <memory>

#include "../core/dispatch.h"
#include "group_dequantize_call.h"
#include "group_variance_kernels.h"
#include "packed_tensor.h"

namespace quantize::activation {
namespace {

using at::Tensor;
using std::tuple;

// Groups of a part: whole batches of group_variance_run.h's, where there are several.
int64_t part_groups(int64_t group_size) {
  constexpr int64_t elements = 4096;
  return group_size > elements / 4 ? 1 : elements / group_size / 4 * 4;
}

// body(elements before them in the run, groups before them, smaller run, buffer for their elements, not initialized).
template <typename F>
void for_each_part(GroupRun run, Scalar scalar, const F& body) {
  const int64_t groups = part_groups(run.group_size), elements = groups * run.group_size;
  const std::unique_ptr<uint8_t[]> buffer(new uint8_t[std::min(elements, run.elements) * item_bytes(scalar)]);
  for (int64_t done = 0, before = 0; done < run.elements; done += elements, before += groups)
    body(done, before, GroupRun{std::min(elements, run.elements - done), run.group_size, run.first_group + uint32_t(before)}, buffer.get());
}

// The range of a long group, and of one that holds samples, is known only when all of it is made.
bool is_made_whole(const char* op, const Tensor& x, int64_t group_size) {
  return group_size == group_is_tensor || group_layout<int64_t>(op, x.sizes(), group_size).group_size > piece_elements;
}

tuple<Tensor, Tensor> pack_made(const char* op, const Tensor& input, Make make, int64_t bytes, int64_t group_size, const Tensor& seed,
                                int64_t bits, const std::optional<Tensor>& sample_bits) {
  const Scalar scalar = check_scalar(op, "input", input.scalar_type());
  const auto l = group_layout<int64_t>(op, input.sizes(), group_size);
  const Tensor x = packed_memory(input), codes = at::empty({bytes}, x.options().dtype(at::kByte));
  const Tensor ranges = at::empty({l.total_groups(), 2}, x.options().dtype(at::kShort));
  const PackedTensor p(op, l, scalar, seed, codes, ranges, bits, sample_bits);
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  if (l.elements == 0) return {codes, ranges};
  for_each_run(p, [&](const GroupKernels& k, int64_t sample, int64_t group, GroupRun run) {
    const int64_t first = group * l.group_size, group_bytes = code_bytes(l.group_size, int(p.bits[sample]));
    for_each_part(run, scalar, [&](int64_t done, int64_t before, GroupRun part, uint8_t* buffer) {
      make(source + (sample * l.elements + first + done) * item_bytes(scalar), {first + done, part.elements}, buffer);
      k.quantize(buffer, part, p.seed, p.codes + p.offsets[sample] + (group + before) * group_bytes,
                 p.ranges + 2 * (sample * l.groups + group + before));
    });
  });
  return {codes, ranges};
}

}  // namespace

Tensor make_whole(const Tensor& input, Make make) {
  const Tensor x = packed_memory(input), made = at::empty_strided(x.sizes(), x.strides(), x.options());
  if (x.numel() == 0) return made;
  const int64_t elements = x.numel() / x.size(0), item = x.element_size();
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = static_cast<uint8_t*>(made.mutable_data_ptr());
  at::parallel_for(0, x.numel(), grain_elements, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % elements, n = std::min(elements - first, end - begin);
      make(source + begin * item, {first, n}, target + begin * item);
      begin += n;
    }
  });
  return made;
}

tuple<Tensor, Tensor> quantize_made(const char* op, const Tensor& x, Make make, int64_t bits, int64_t group_size, const Tensor& seed) {
  check_bits(op, bits);
  static const auto whole = find_op<tuple<Tensor, Tensor>(const Tensor&, int64_t, int64_t, const Tensor&)>("quantize::group_quantize");
  if (is_made_whole(op, x, group_size)) return whole.call(make_whole(x, make), bits, group_size, seed);
  const int64_t bytes = group_layout<int64_t>(op, x.sizes(), group_size).bytes(bits);
  return pack_made(op, x, make, bytes, group_size, seed, bits, std::nullopt);
}

tuple<Tensor, Tensor> quantize_made_mixed(const char* op, const Tensor& x, Make make, const Tensor& sample_bits, int64_t bit_budget,
                                          int64_t group_size, const Tensor& seed) {
  static const auto whole =
      find_op<tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, int64_t, const Tensor&)>("quantize::group_quantize_mixed");
  if (is_made_whole(op, x, group_size)) return whole.call(make_whole(x, make), sample_bits, bit_budget, group_size, seed);
  const int64_t bytes = group_layout<int64_t>(op, x.sizes(), group_size).bytes_within(bit_budget);
  return pack_made(op, x, make, bytes, group_size, seed, 0, sample_bits);
}

Tensor variance_of_made(const char* op, const Tensor& input, Make make, int64_t group_size) {
  static const auto whole = find_op<Tensor(const Tensor&, int64_t)>("quantize::group_variance");
  if (is_made_whole(op, input, group_size)) return whole.call(make_whole(input, make), group_size);
  const Scalar scalar = check_scalar(op, "input", input.scalar_type());
  const auto l = group_layout<int64_t>(op, input.sizes(), group_size);
  const Tensor x = packed_memory(input), variance = at::empty({l.samples, 4}, x.options().dtype(at::kFloat));
  const GroupVarianceKernel kernel = group_variance_kernel(cpu_isa(), scalar);
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* target = variance.data_ptr<float>();
  at::parallel_for(0, l.samples, grain_of(4096, l.elements), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      double sum[4] = {};
      for_each_part(GroupRun{l.elements, l.group_size, 0}, scalar, [&](int64_t done, int64_t, GroupRun part, uint8_t* buffer) {
        make(source + (n * l.elements + done) * item_bytes(scalar), {done, part.elements}, buffer);
        kernel(buffer, part.elements, l.group_size, sum);
      });
      std::copy_n(sum, 4, target + 4 * n);
    }
  });
  return variance;
}

Tensor dequantize_and_join(const char* op, const Tensor& codes, const Tensor& ranges, const std::optional<Tensor>& sample_bits,
                           int64_t bits, int64_t group_size, const Tensor& seed, JoinKernel join, const Tensor& other) {
  const Scalar scalar = check_scalar(op, "grad", other.scalar_type());
  const auto l = check_dequantize(op, codes, ranges, sample_bits, bits, group_size, other.sizes());
  TORCH_INTERNAL_ASSERT(packed_strides(other.sizes(), other.strides()) == other.strides().vec());
  const int64_t item = item_bytes(scalar);
  const auto* source = static_cast<const uint8_t*>(other.const_data_ptr());
  if (l.group_size > piece_elements) {
    static const auto whole =
        find_op<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t, int64_t, c10::SymIntArrayRef,
                       c10::SymIntArrayRef, at::ScalarType, const Tensor&)>("quantize::group_dequantize");
    Tensor y = whole.call(codes, ranges, sample_bits, bits, group_size, other.sym_sizes(), other.sym_strides(), other.scalar_type(), seed);
    auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
    at::parallel_for(0, y.numel(), grain_elements, [&](int64_t begin, int64_t end) {
      join(target + begin * item, source + begin * item, end - begin, target + begin * item);
    });
    return y;
  }
  Tensor y = at::empty_strided(other.sizes(), other.strides(), other.options());
  if (y.numel() == 0) return y;
  const PackedTensor p(op, l, scalar, seed, codes, ranges, bits, sample_bits);
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  for_each_run(p, [&](const GroupKernels& k, int64_t sample, int64_t group, GroupRun run) {
    const int64_t first = (sample * l.elements + group * l.group_size) * item, bytes = code_bytes(l.group_size, int(p.bits[sample]));
    for_each_part(run, scalar, [&](int64_t done, int64_t before, GroupRun part, uint8_t* buffer) {
      k.dequantize(p.codes + p.offsets[sample] + (group + before) * bytes, p.ranges + 2 * (sample * l.groups + group + before), part,
                   p.seed, buffer);
      join(buffer, source + first + done * item, part.elements, target + first + done * item);
    });
  });
  return y;
}

}  // namespace quantize::activation
