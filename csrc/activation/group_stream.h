// Packing what a kernel makes of a tensor, and unpacking into a kernel that makes the result, a few groups at a time: what is packed is in
// a core's caches then, and nowhere as a whole. CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <optional>
#include <tuple>

namespace quantize::activation {

// n elements of a sample, in memory order from number `first` on.
struct Stretch {
  int64_t first, n;
};

// Both read and write a stretch's elements, of one type.
using Make = c10::function_ref<void(const void* x, Stretch stretch, void* made)>;
using JoinKernel = void (*)(const void* unpacked, const void* other, int64_t n, void* y);

// group_quantize(make(x)), group_quantize_mixed(make(x)), group_variance(make(x)).
std::tuple<at::Tensor, at::Tensor> quantize_made(const char* op, const at::Tensor& x, Make make, int64_t bits, int64_t group_size,
                                                 const at::Tensor& seed);
std::tuple<at::Tensor, at::Tensor> quantize_made_mixed(const char* op, const at::Tensor& x, Make make, const at::Tensor& sample_bits,
                                                       int64_t bit_budget, int64_t group_size, const at::Tensor& seed);
at::Tensor variance_of_made(const char* op, const at::Tensor& x, Make make, int64_t group_size);

// make(x) as a whole.
at::Tensor make_whole(const at::Tensor& x, Make make);

// join(group_dequantize(codes, ...), other), of other's shape and dtype and in its memory order, which must be the packed one.
at::Tensor dequantize_and_join(const char* op, const at::Tensor& codes, const at::Tensor& ranges,
                               const std::optional<at::Tensor>& sample_bits, int64_t bits, int64_t group_size, const at::Tensor& seed,
                               JoinKernel join, const at::Tensor& other);

}  // namespace quantize::activation
