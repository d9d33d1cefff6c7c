// Which lane of a warp holds what, where the CUDA kernels keep a bundle of elements in registers.
//
// A bundle is eight rows; a row is one 16-byte load a lane: 128 fp32 or 256 16-bit elements, V of them consecutive in a lane. So a lane's
// elements share their place within the chunk of 128 but for e % 8: `octet` = e % 128 / 8 says half (octet % 2) and j (octet / 2) of
// group_format.h, and e % 8 is the residue. Hence
//   noise   the chunk's eight draws lie in shared memory word by word, so that a lane reads four residues' words in one 16-byte load, and
//           picks its half and byte order with one selector that never changes;
//   codes   a word of codes holds one residue of all octets: a transposition between 16 (or 32) lanes and the fields of a register,
//           done in butterflies of one shuffle each.
// Everything here is host and device code without any torch header; tests/cuda_on_host proves it against group_format.h.
#pragma once

#include "group_format.h"

namespace quantize::activation {

struct UnitTraits {
  static constexpr int elements = 2 * GroupTraits::chunk;  // the least that is whole blocks of codes at every width
  static constexpr int code_bytes(int bits) { return elements / 8 * bits; }
};
static_assert(UnitTraits::elements % block_elements(1) == 0 && UnitTraits::elements % block_elements(2) == 0);

QUANTIZE_HOST_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, selector);
#else
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
#endif
}

QUANTIZE_HOST_DEVICE uint32_t rotate_left(uint32_t x, int n) {  // 0 < n < 32
#ifdef __CUDA_ARCH__
  return __funnelshift_l(x, x, n);
#else
  return x << n | x >> (32 - n);
#endif
}

template <int V>
struct Lanes {
  static_assert(V == 4 || V == 8);
  static constexpr int rows = 8, row_elements = 32 * V, elements = rows * row_elements;
  static constexpr int units = elements / UnitTraits::elements, chunks = elements / GroupTraits::chunk, quads = V / 4;

  // Element i of a lane in a row is element row * row_elements + lane * V + i of the bundle.
  static constexpr int octet(int lane) { return V == 4 ? lane / 2 : lane % 16; }
  static constexpr int residue(int lane, int i) { return V == 4 ? 4 * (lane % 2) + i : i; }
  static constexpr int chunk(int row, int lane) { return V == 4 ? row : 2 * row + lane / 16; }
  static constexpr int unit(int row) { return V == 4 ? row / 2 : row; }
  static constexpr int octet_mask(int bit) {
    return (V == 4 ? 2 : 1) << bit;
  }  // the lane's bit that is the octet's; V = 8: bit 4 is the chunk's
};

struct NoiseLayout {
  static constexpr int stride = 40;  // words from chunk to chunk: four chunks are written at once, to 32 different banks
  static constexpr int word(int chunk, int output, int residue) { return chunk * stride + output * 8 + residue; }
  // byte_permute(draw's word, magic, selector) is the float 2^23 + u.
  static constexpr uint32_t magic = 0x4b000000u;
  static constexpr uint32_t selector(int octet) {
    const uint32_t half = octet % 2, swap = octet / 8;
    return 0x7600u | (2 * half + 1 - swap) << 4 | (2 * half + swap);
  }
  static constexpr int output(int octet) { return octet / 2 % 4; }
};

// A register of codes: 32/bits fields. Before the exchange they are one lane's elements, after it the 32 bits that go to memory.
template <int V, int bits>
struct CodeLayout {
  using L = Lanes<V>;
  static constexpr int registers = L::rows * V * bits / 32, fields = 8 / bits;  // fields: of a byte
  static constexpr bool rows_in_bytes = V == 4 && bits == 1;                    // there a word of codes spans two rows of the same lane

  // Where an element's code lies in the bundle's codes: 32-bit word, and bit in it.
  static constexpr int dword(int lane, int row, int i) { return place(lane, row) / per_word * 8 + L::residue(lane, i); }
  static constexpr int shift(int lane, int row) { return L::octet(lane) % 2 * 16 + place(lane, row) % per_word * bits; }

  struct Source {
    int row, i;
  };
  // The element that fills field `field` of byte `byte` of register `reg` before the exchange.
  static constexpr Source source(int reg, int byte, int field) {
    if (rows_in_bytes) return {field / 2 * 2 + byte % 2, byte / 2 * 2 + field % 2};
    if (bits == 1) return {reg * 4 + field % 4, field / 4 * 4 + byte};
    return {reg / L::quads * fields + field, reg % L::quads * 4 + byte};
  }

  // The butterflies: lanes that differ in bit `mask` swap fields `distance` bits apart.
  struct Step {
    int mask, distance;
  };
  static constexpr int steps = 1 + (bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 3 : 4) - (rows_in_bytes ? 1 : 0);
  static constexpr Step step(int s) { return {L::octet_mask(s), s == 0 ? 16 : bits << (s - 1)}; }

  // Where the register goes after the exchange.
  static constexpr int target(int lane, int reg) {
    int position = 0;
    for (int s = 0; s < steps; ++s)
      if (lane & step(s).mask) position += step(s).distance;
    const Source from = source(reg, position / 8, position % 8 / bits);
    return dword(lane, from.row, from.i);
  }

 private:
  static constexpr int per_word = 16 / bits;
  static constexpr int place(int lane, int row) { return L::chunk(row, lane) * 8 + L::octet(lane) / 2; }
};

// Four codes, each in the upper bits of its word's second byte, into the four bytes of one.
QUANTIZE_HOST_DEVICE uint32_t gather_codes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return byte_permute(byte_permute(a, b, 0x0051), byte_permute(c, d, 0x0051), 0x5410);
}

// Puts a gathered word's codes into their field of every byte. Field 0 comes first and may leave anything in the others.
template <int bits, int field>
QUANTIZE_HOST_DEVICE uint32_t merge_field(uint32_t word, uint32_t gathered) {
  if constexpr (field == 0) return gathered >> (8 - bits);
  constexpr uint32_t mask = (((1u << bits) - 1) << (bits * field)) * 0x01010101u;
  return (word & ~mask) | (gathered >> (8 - bits - bits * field) & mask);
}

// One side of a butterfly. `upper`: this lane's bit is set.
template <int distance>
QUANTIZE_HOST_DEVICE uint32_t exchange_fields(uint32_t own, uint32_t partner, bool upper) {
  if constexpr (distance == 16) return byte_permute(own, partner, upper ? 0x3276u : 0x5410u);
  if constexpr (distance == 8) return byte_permute(own, partner, upper ? 0x3715u : 0x6240u);
  constexpr uint32_t low = distance == 4 ? 0x0f0f0f0fu : distance == 2 ? 0x33333333u : 0x55555555u;
  const uint32_t keep = upper ? ~low : low;
  return (own & keep) | (rotate_left(partner, upper ? 32 - distance : distance) & ~keep);
}

}  // namespace quantize::activation
