// Several packed inputs of one op, in bits that do not adapt, on their way from its forward to its backward.
#pragma once

#include "saved_activation.h"

namespace quantize::layers {

struct PackedInputs {
  at::TensorList tensors;  // codes, ranges and seed of each
  at::IntArrayRef bits;    // of each; 0: it is not kept
  int64_t group_size;

  void check(const char* op, size_t count) const {
    TORCH_CHECK_VALUE(tensors.size() == 3 * count && bits.size() == count, op, ": packed must be codes, ranges and seed of ", count,
                      " inputs, and bits one number for each; got ", tensors.size(), " tensors and ", bits.size(), " numbers");
  }

  // Writes the numbers of input i and returns the four tensors that SavedActivation unpacks.
  variable_list save(AutogradContext* ctx, NumberWriter& numbers, const Tensor& input, int i) const {
    const auto part = [&](int j) { return bits[i] ? OptionalTensor(tensors[3 * i + j]) : std::nullopt; };
    const OptionalTensor codes = part(0), ranges = part(1), seed = part(2), none;
    const PackedArguments own{codes, ranges, none, bits[i], group_size, seed, none};
    save_packed(ctx, numbers, input, own);
    return packed_tensors(own);
  }
};

}  // namespace quantize::layers
