// A packed tensor on the CPU, as the kernels see it.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "../core/grain.h"
#include "group_layout.h"
#include "group_quantize_kernels.h"

namespace quantize::activation {

constexpr int64_t piece_elements = 65536;  // a longer group is shared between threads

inline int64_t item_bytes(Scalar scalar) { return scalar == Scalar::f32 ? 4 : 2; }

// What the kernels need to know of one call, whichever the direction.
struct PackedTensor {
  at::Tensor held_codes, held_ranges;
  GroupLayout<int64_t> layout;
  Scalar scalar;
  Seed seed;
  uint8_t* codes;
  uint16_t* ranges;
  std::vector<int64_t> bits, offsets;  // of each sample

  PackedTensor(const char* op, GroupLayout<int64_t> layout, Scalar scalar, const at::Tensor& seed, const at::Tensor& codes,
               const at::Tensor& ranges, int64_t fixed_bits, const std::optional<at::Tensor>& sample_bits)
      : held_codes(codes.contiguous()),
        held_ranges(ranges.contiguous()),
        layout(layout),
        scalar(scalar),
        seed(read_seed(op, seed)),
        codes(held_codes.data_ptr<uint8_t>()),
        ranges(reinterpret_cast<uint16_t*>(held_ranges.data_ptr<int16_t>())),
        bits(layout.samples, fixed_bits),
        offsets(layout.samples + 1, 0) {
    TORCH_CHECK_VALUE(layout.total_groups() <= 0xffffffffll, op, ": x has ", layout.total_groups(), " groups; expected less than 2^32");
    if (const auto own = check_sample_bits(op, sample_bits, layout.samples, codes))
      for (int64_t n = 0; n < layout.samples; ++n) check_bits(op, bits[n] = own->const_data_ptr<uint8_t>()[n]);
    for (int64_t n = 0; n < layout.samples; ++n)
      offsets[n + 1] = offsets[n] + sample_code_bytes(layout.elements, layout.group_size, int(bits[n]));
    TORCH_CHECK_VALUE(offsets.back() <= codes.numel(), op, ": the samples' bits need ", offsets.back(), " bytes of codes; there are ",
                      codes.numel());
  }

  const GroupKernels& kernels(int64_t sample) const { return group_kernels(cpu_isa(), scalar, int(bits[sample])); }
};

constexpr int64_t grain_elements = 16384;  // per task: about ten microseconds of work

// body(kernels, sample, first group in the sample, run), on all threads.
template <typename F>
void for_each_run(const PackedTensor& p, const F& body) {
  const auto& l = p.layout;
  at::parallel_for(0, l.total_groups(), grain_of(grain_elements, l.group_size), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / l.groups, group = begin % l.groups, stop = std::min(l.groups, group + end - begin);
      const int64_t elements = std::min(l.elements, stop * l.group_size) - group * l.group_size;
      body(p.kernels(sample), sample, group, GroupRun{elements, l.group_size, uint32_t(begin)});
      begin += stop - group;
    }
  });
}

}  // namespace quantize::activation
