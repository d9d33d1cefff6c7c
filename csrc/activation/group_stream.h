// Packing what a kernel makes of a tensor, and unpacking into a kernel that makes the result, a few groups at a time: what is packed is in
// a core's caches then, and nowhere as a whole. CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace quantize::activation {

// Both read and write n elements of one type.
using MakeKernel = void (*)(const void* x, int64_t n, void* made);
using JoinKernel = void (*)(const void* unpacked, const void* other, int64_t n, void* y);

// group_quantize(make(x)).
std::tuple<at::Tensor, at::Tensor> quantize_made(const char* op, const at::Tensor& x, MakeKernel make, int64_t bits, int64_t group_size,
                                                 const at::Tensor& seed);

// join(group_dequantize(codes, ...), other), of other's shape and dtype and in its memory order, which must be the packed one.
at::Tensor dequantize_and_join(const char* op, const at::Tensor& codes, const at::Tensor& ranges,
                               const std::optional<at::Tensor>& sample_bits, int64_t bits, int64_t group_size, const at::Tensor& seed,
                               JoinKernel join, const at::Tensor& other);

}  // namespace quantize::activation
