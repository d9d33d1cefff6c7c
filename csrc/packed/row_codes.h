// Codes in rows, the canonical layout that files hold (quantize/packed/layout.py). Torch-free.
#pragma once

#include <cstdint>

#include "../core/host_device.h"

namespace quantize::packed {

QUANTIZE_HOST_DEVICE int code_at(const uint8_t* row, int64_t k, int bits) {
  if (bits == 16) return row[2 * k] | row[2 * k + 1] << 8;
  const int64_t place = k * bits;
  return (row[place / 8] >> (place % 8)) & ((1 << bits) - 1);
}

}  // namespace quantize::packed
