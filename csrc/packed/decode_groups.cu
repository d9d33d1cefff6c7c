// unpack_groups and decode_groups on CUDA. Build: setup.py. Arguments: decode_groups.cpp.
#include "decode_groups.cuh"

#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "../core/launch.h"
#include "decode_groups.h"

namespace quantize::packed {
namespace {

using at::Tensor;

dim3 grid_of(const Launcher& launch, int64_t n) {
  return dim3(unsigned(grid_size(launch.processors(), GroupTraits::blocks, n, GroupTraits::threads)));
}

// int64: the bits of all groups before each one.
Tensor bits_before(const Tensor& group_bits) {
  const Tensor bits = at::stack({group_bits.bitwise_and(15), group_bits.bitwise_right_shift(4)}, 1).flatten().add_(1);
  return at::cumsum(bits, 0, at::kLong).sub_(bits);
}

Tensor unpack_groups_cuda(const Tensor& code_tensor, const Tensor& bits_tensor, int64_t group_size, int64_t numel, int64_t width) {
  check_unpack(code_tensor, bits_tensor, group_size, numel, width);
  check_same_device("unpack_groups", "group_bits", bits_tensor, code_tensor);
  Launcher launch(code_tensor);
  const Tensor codes = code_tensor.contiguous(), group_bits = bits_tensor.contiguous();
  Tensor out = at::empty({numel}, codes.options().dtype(width == 8 ? at::kByte : at::kShort));
  if (numel == 0) return out;
  const Tensor offsets = bits_before(group_bits);
  const auto run = [&](auto* target) {
    launch(unpack_groups<std::remove_pointer_t<decltype(target)>>, grid_of(launch, numel), GroupTraits::threads,
           codes.const_data_ptr<uint8_t>(), codes.numel(), group_bits.const_data_ptr<uint8_t>(), offsets.const_data_ptr<int64_t>(),
           group_size, numel, target);
  };
  if (width == 8)
    run(out.mutable_data_ptr<uint8_t>());
  else
    run(reinterpret_cast<uint16_t*>(out.mutable_data_ptr<int16_t>()));
  return out;
}

Tensor decode_groups_cuda(const Tensor& value_tensor, const Tensor& bits_tensor, const Tensor& scale_tensor, int64_t group_size,
                          int64_t span) {
  check_decode_groups(value_tensor, bits_tensor, scale_tensor, group_size, span);
  check_same_device("decode_groups", "group_bits", bits_tensor, value_tensor);
  check_same_device("decode_groups", "scales", scale_tensor, value_tensor);
  Launcher launch(value_tensor);
  const Tensor values = value_tensor.contiguous(), group_bits = bits_tensor.contiguous(), scales = scale_tensor.contiguous();
  const int64_t numel = values.numel();
  Tensor out = at::empty({numel}, scales.options());
  if (numel == 0) return out;
  const auto run = [&]<typename T>(const T* source) {
    launch(decode_groups<T>, grid_of(launch, numel), GroupTraits::threads, source, group_bits.const_data_ptr<uint8_t>(),
           scales.const_data_ptr<float>(), group_size, span, numel, out.mutable_data_ptr<float>());
  };
  if (values.scalar_type() == at::kByte)
    run(values.const_data_ptr<uint8_t>());
  else
    run(reinterpret_cast<const uint16_t*>(values.const_data_ptr<int16_t>()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("unpack_groups", unpack_groups_cuda);
  m.impl("decode_groups", decode_groups_cuda);
}

}  // namespace quantize::packed
