// A max-pool index as its position within the window: 8 bits instead of 64. Shared by CPU and CUDA.
#pragma once

#include <cstdint>

#include "../core/host_device.h"

namespace quantize::activation {

// Up to three spatial dimensions, missing leading ones of size 1 with a 1-wide window.
struct PoolWindow {
  int64_t input[3], output[3], kernel[3], stride[3], padding[3], dilation[3];

  QUANTIZE_HOST_DEVICE int64_t plane() const { return output[0] * output[1] * output[2]; }

  // `place`: the element's number within its output plane. `index`: flat in the input plane.
  QUANTIZE_HOST_DEVICE uint8_t pack(int64_t place, int64_t index) const {
    int64_t offset = 0, scale = 1;
    for (int d = 2; d >= 0; --d) {
      const int64_t start = place % output[d] * stride[d] - padding[d];
      offset += (index % input[d] - start) / dilation[d] * scale;
      place /= output[d], index /= input[d], scale *= kernel[d];
    }
    return uint8_t(offset);
  }

  QUANTIZE_HOST_DEVICE int64_t unpack(int64_t place, uint8_t offset) const {
    int64_t index = 0, scale = 1, rest = offset;
    for (int d = 2; d >= 0; --d) {
      const int64_t start = place % output[d] * stride[d] - padding[d];
      index += (start + rest % kernel[d] * dilation[d]) * scale;
      place /= output[d], rest /= kernel[d], scale *= input[d];
    }
    return index;
  }
};

}  // namespace quantize::activation
