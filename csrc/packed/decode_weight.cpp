// decode_weight: CPU and Meta.
#include "decode_weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "../core/grain.h"
#include "decode_kernels.h"

namespace quantize::packed {
namespace {

using at::Tensor;

Tensor decode_weight_cpu(const Tensor& code_tensor, const Tensor& level_tensor, const Tensor& scale_tensor, int64_t bits, int64_t columns) {
  check_decode(code_tensor, level_tensor, scale_tensor, bits, columns);
  const Tensor codes = code_tensor.contiguous(), levels = level_tensor.contiguous(), scales = scale_tensor.contiguous();
  Tensor out = at::empty({codes.size(0), columns}, scales.options());
  const auto* source = codes.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  std::vector<float> table(levels.const_data_ptr<float>(), levels.const_data_ptr<float>() + levels.numel());
  table.resize(std::max<size_t>(table.size(), 16));
  const DecodeRow decode = decode_row();
  float* target = out.data_ptr<float>();
  const int64_t bytes = codes.size(1);
  at::parallel_for(0, codes.size(0), grain_of(8192, columns), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* out_row = target + n * columns;
      if (bits < 16) {
        decode(source + n * bytes, int(bits), columns, table.data(), scale[n], out_row);
        continue;
      }
      for (int64_t k = 0; k < columns; ++k) out_row[k] = scale[n] * table[code_at(source + n * bytes, k, 16)];
    }
  });
  return out;
}

Tensor decode_weight_meta(const Tensor& codes, const Tensor&, const Tensor& scales, int64_t, int64_t columns) {
  return at::empty_symint({codes.sym_size(0), columns}, scales.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) { m.impl("decode_weight", decode_weight_cpu); }
TORCH_LIBRARY_IMPL(quantize, Meta, m) { m.impl("decode_weight", decode_weight_meta); }

}  // namespace quantize::packed
