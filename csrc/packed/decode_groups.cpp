// unpack_groups and decode_groups: CPU and Meta.
#include "decode_groups.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../core/grain.h"
#include "decode_kernels.h"

namespace quantize::packed {
namespace {

using at::Tensor;

constexpr int64_t grain = 8192;  // elements that a thread takes at least

at::ScalarType value_type(int64_t width) { return width == 8 ? at::kByte : at::kShort; }

template <typename T>
void unpack(const Tensor& codes, const uint8_t* group_bits, int64_t group_size, int64_t numel, int64_t groups, T* out) {
  const auto* stream = codes.const_data_ptr<uint8_t>();
  const int64_t bytes = codes.numel();
  std::vector<int64_t> offsets(groups);
  for (int64_t g = 0, place = 0; g < groups; place += group_size * bits_of_group(group_bits, g++)) offsets[g] = place;
  at::parallel_for(0, groups, grain_of(grain, group_size), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int bits = bits_of_group(group_bits, g);
      int64_t place = offsets[g];
      for (int64_t i = g * group_size; i < std::min(numel, (g + 1) * group_size); ++i, place += bits)
        out[i] = T(stream_code(stream, bytes, place, bits));
    }
  });
}

Tensor unpack_groups_cpu(const Tensor& code_tensor, const Tensor& bits_tensor, int64_t group_size, int64_t numel, int64_t width) {
  const int64_t groups = check_unpack(code_tensor, bits_tensor, group_size, numel, width);
  const Tensor codes = code_tensor.contiguous(), group_bits = bits_tensor.contiguous();
  Tensor out = at::empty({numel}, codes.options().dtype(value_type(width)));
  const auto* bits = group_bits.const_data_ptr<uint8_t>();
  if (width == 8)
    unpack(codes, bits, group_size, numel, groups, out.mutable_data_ptr<uint8_t>());
  else
    unpack(codes, bits, group_size, numel, groups, reinterpret_cast<uint16_t*>(out.mutable_data_ptr<int16_t>()));
  return out;
}

Tensor unpack_groups_meta(const Tensor& codes, const Tensor&, int64_t, int64_t numel, int64_t width) {
  return at::empty({numel}, codes.options().dtype(value_type(width)));
}

Tensor decode_groups_cpu(const Tensor& value_tensor, const Tensor& bits_tensor, const Tensor& scale_tensor, int64_t group_size,
                         int64_t span) {
  check_decode_groups(value_tensor, bits_tensor, scale_tensor, group_size, span);
  const Tensor values = value_tensor.contiguous(), group_bits = bits_tensor.contiguous(), scales = scale_tensor.contiguous();
  Tensor out = at::empty({values.numel()}, scales.options());
  const auto* bits = group_bits.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  const void* codes = values.const_data_ptr();
  float* weights = out.mutable_data_ptr<float>();
  const DecodeGroups decode = decode_groups(int(values.element_size()));
  const int64_t numel = values.numel(), block = 4096;  // a multiple of the kernels' vectors
  at::parallel_for(0, (numel + block - 1) / block, grain / block, [&](int64_t begin, int64_t end) {
    decode(codes, bits, scale, begin * block, std::min(numel, end * block), group_size, span, weights);
  });
  return out;
}

Tensor decode_groups_meta(const Tensor& values, const Tensor&, const Tensor& scales, int64_t, int64_t) {
  return at::empty_symint({values.sym_numel()}, scales.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("unpack_groups", unpack_groups_cpu);
  m.impl("decode_groups", decode_groups_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("unpack_groups", unpack_groups_meta);
  m.impl("decode_groups", decode_groups_meta);
}

}  // namespace quantize::packed
