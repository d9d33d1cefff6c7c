// What the CPU multiplies in the packed ops, checked where packed_call.h does not.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/checks.h"
#include "gemm_kernels.h"

namespace quantize::packed {

// panels: uint8 [groups, tiles, bytes] as quantize/packed/panels.py lays them out. levels: float32 [2^bits], whole numbers within +-127.
struct Panels {
  int64_t groups, tiles, bytes, quads;
  int bits;
  int steps;  // Weights'
  alignas(16) int8_t levels[16] = {};
  const uint8_t* codes;

  Panels(const char* op, const at::Tensor& panels, const at::Tensor& table, int64_t storage_bits) : bits(int(storage_bits)) {
    check_dtype(op, "panels", panels, at::kByte);
    TORCH_CHECK_VALUE(panels.dim() == 3 && panels.is_contiguous() && panels.size(2) % GemmTraits::quad_bytes == 0, op,
                      ": panels must be contiguous [groups, tiles, bytes], bytes a multiple of 64; got ", panels.sizes());
    groups = panels.size(0), tiles = panels.size(1), bytes = panels.size(2);
    quads = bytes / GemmTraits::quad_bytes * (8 / bits);
    codes = panels.const_data_ptr<uint8_t>();
    const float* values = table.const_data_ptr<float>();
    float largest = 1;
    for (int64_t i = 0; i < table.numel(); ++i) {
      if (std::isnan(values[i])) continue;  // a code that does not occur
      TORCH_CHECK_VALUE(values[i] == std::nearbyint(values[i]) && std::fabs(values[i]) <= 127, op,
                        ": levels must be whole numbers within +-127; got ", values[i]);
      largest = std::max(largest, std::fabs(values[i]));
      if (bits < 8) levels[i] = int8_t(values[i]);
    }
    steps = 32767 / (2 * 255 * int(largest));
    TORCH_CHECK_VALUE(bits < 8 || values[255] == -1.f, op, ": levels must be two's complement at 8 bits");
  }

  Weights tile(int64_t group, int64_t index) const { return {codes + (group * tiles + index) * bytes, quads, bits, levels, steps}; }
};

// What output channels multiply and add after the integer products.
class Epilogue {
 public:
  Epilogue(const char* op, const at::Tensor& scales, const std::optional<at::Tensor>& bias, const at::Tensor& sums, float step,
           int zero_point)
      : step_(step), zero_point_(zero_point) {
    const int64_t n = scales.numel();
    check_dtype(op, "sums", sums, at::kInt);
    check_numel(op, "sums", sums, n);
    check_contiguous(op, "sums", sums);
    scales_ = scales.const_data_ptr<float>(), sums_ = sums.const_data_ptr<int32_t>();
    if (bias && bias->defined()) bias_ = bias->const_data_ptr<float>();
  }

  // Of the channels of some panels.
  struct Part {
    static constexpr int64_t most = std::max(GemmTraits::streams, 2) * GemmTraits::columns;
    float gain[most], bias[most];
    int32_t correction[most];

    Part(const Epilogue& all, int64_t first, int64_t count) {
      for (int64_t c = 0; c < count; ++c) {
        gain[c] = all.step_ * all.scales_[first + c], correction[c] = all.zero_point_ * all.sums_[first + c];
        bias[c] = all.bias_ ? all.bias_[first + c] : 0.f;
      }
    }
  };

 private:
  float step_;
  int32_t zero_point_;
  const float *scales_, *bias_ = nullptr;
  const int32_t* sums_;
};

}  // namespace quantize::packed
