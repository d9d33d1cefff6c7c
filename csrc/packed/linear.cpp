// packed_linear, packed_linear_float: CPU and Meta.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <memory>

#include "activation.h"
#include "packed_call.h"
#include "products.h"

namespace quantize::packed {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor packed_linear_cpu(const Tensor& input, const Tensor& step, const Tensor& zero_point, int64_t activation_bits, const Tensor& codes,
                         const Tensor& panel_tensor, const Tensor& levels, const Tensor& scales, const Tensor& sums,
                         const OptionalTensor& bias, int64_t storage_bits) {
  const char* op = "packed_linear";
  check_rows(op, input);
  const Activation act = activation(op, input, step, zero_point, activation_bits);
  check_weight(op, input, codes, levels, scales, bias, input.size(1), storage_bits);
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const Epilogue epilogue(op, scales, bias, sums, act.range.step, act.zero_point);
  const int64_t batch = input.size(0), channels = input.size(1), out_channels = scales.numel();
  const int64_t row = panels.quads * GemmTraits::quad;
  TORCH_CHECK_VALUE(panels.groups == 1 && panels.tiles * GemmTraits::columns >= out_channels && row >= channels, op, ": panels must hold ",
                    out_channels, " channels of ", channels, "; got ", panel_tensor.sizes());
  const Tensor x = input.contiguous();
  Tensor out = at::empty({batch, out_channels}, x.options());
  if (out.numel() == 0) return out;
  const bool tiles = tile_kernels() && batch >= fewest_tile_rows;
  const int64_t behind = 64 + (tiles ? TileRows::slack * row : 0);
  std::unique_ptr<uint8_t[]> image(new uint8_t[batch * row + behind]);
  if (row != channels) std::memset(image.get(), 0, batch * row);
  at::parallel_for(0, batch, 16, [&](int64_t begin, int64_t end) {
    image_kernels().from_rows(x.const_data_ptr<float>() + begin * channels, channels, channels, end - begin, act.range, act.zero_point,
                              image.get() + begin * row, row);
  });
  const Output target(out.data_ptr<float>(), true, out_channels, batch);
  const auto multiply = [&](const auto& product, int64_t first) {
    share_out(product.parts(),
              [&](int64_t part, std::vector<int8_t>& scratch) { product(image.get() + first * row, 0, part, scratch, target, 0, first); });
  };
  if (tiles) {
    const int64_t one[] = {1, 1};
    multiply(TileProduct{panels, epilogue, TileRows(1, batch, row, row, one), TileTaps(one, 1, panels.quads), {0}, out_channels}, 0);
    return out;
  }
  std::vector<int32_t> rows(1, 0), taps(1, 0);
  // Rows are numbered from the first of a block, so that 32 bits suffice.
  const int64_t block = std::min<int64_t>(batch, std::max<int64_t>(1, (int64_t(1) << 30) / std::max<int64_t>(1, row)));
  for (int64_t i = 1; i < block; ++i) rows.push_back(int32_t(i * row));
  for (int64_t first = 0; first < batch; first += block) {
    if (batch - first < block) rows.resize(batch - first);
    multiply(Product{panels, epilogue, rows, taps, row / GemmTraits::quad, out_channels}, first);
  }
  return out;
}

Tensor packed_linear_float_cpu(const Tensor& input, const Tensor& codes, const Tensor& panel_tensor, const Tensor& levels,
                               const Tensor& scales, const OptionalTensor& bias, int64_t storage_bits) {
  const char* op = "packed_linear_float";
  check_rows(op, input);
  check_weight(op, input, codes, levels, scales, bias, input.size(1), storage_bits);
  const Panels panels(op, panel_tensor, levels, storage_bits);
  const int64_t batch = input.size(0), channels = input.size(1), out_channels = scales.numel();
  const int64_t row = panels.quads * GemmTraits::quad;
  TORCH_CHECK_VALUE(panels.groups == 1 && panels.tiles * GemmTraits::columns >= out_channels && row >= channels, op, ": panels must hold ",
                    out_channels, " channels of ", channels, "; got ", panel_tensor.sizes());
  const float* shift = bias && bias->defined() ? bias->const_data_ptr<float>() : nullptr;
  Tensor out = at::empty({batch, out_channels}, input.options());
  std::vector<float> x(batch * row);
  const Tensor dense = input.contiguous();
  for (int64_t n = 0; n < batch; ++n) std::copy_n(dense.const_data_ptr<float>() + n * channels, channels, &x[n * row]);
  float* target = out.data_ptr<float>();
  const float* gain = scales.const_data_ptr<float>();
  at::parallel_for(0, panels.tiles, 8, [&](int64_t begin, int64_t end) {
    float acc[GemmTraits::columns];
    for (int64_t t = begin; t < end; ++t)
      for (int64_t n = 0; n < batch; ++n) {
        gemm_kernels().multiply_row_float(&x[n * row], panels.tile(0, t), acc);
        for (int64_t c = t * GemmTraits::columns; c < std::min(out_channels, (t + 1) * GemmTraits::columns); ++c)
          target[n * out_channels + c] = acc[c % GemmTraits::columns] * gain[c] + (shift ? shift[c] : 0.f);
      }
  });
  return out;
}

Tensor packed_linear_meta(const Tensor& x, const Tensor&, const Tensor&, int64_t, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor& scales, const Tensor&, const OptionalTensor&, int64_t) {
  return at::empty_symint({x.sym_size(0), scales.sym_numel()}, x.options());
}

Tensor packed_linear_float_meta(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const Tensor& scales, const OptionalTensor&,
                                int64_t) {
  return at::empty_symint({x.sym_size(0), scales.sym_numel()}, x.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("packed_linear", packed_linear_cpu);
  m.impl("packed_linear_float", packed_linear_float_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("packed_linear", packed_linear_meta);
  m.impl("packed_linear_float", packed_linear_float_meta);
}

}  // namespace quantize::packed
