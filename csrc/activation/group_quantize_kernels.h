// The CPU kernels behind group_quantize: one table per ISA, free of torch headers.
#pragma once

#include "../core/cpu_isa.h"
#include "group_format.h"

namespace quantize::activation {

// Consecutive groups of one sample. `elements` may end in a short group; `first_group` numbers the noise.
struct GroupRun {
  int64_t elements;
  int64_t group_size;
  uint32_t first_group;
};

// A piece of one group that is too long for one thread: elements [begin, begin + elements) of a group of `group_elements`;
// begin is a multiple of two chunks.
struct GroupPiece {
  int64_t begin;
  int64_t elements;
  int64_t group_elements;
  uint32_t group;
};

// x, y: elements of the kernel's type. codes: the run's (group's) first byte. ranges: two words a group.
struct GroupKernels {
  void (*quantize)(const void* x, GroupRun run, Seed seed, uint8_t* codes, uint16_t* ranges);
  void (*dequantize)(const uint8_t* codes, const uint16_t* ranges, GroupRun run, Seed seed, void* y);
  Extent (*extent)(const void* x, int64_t elements);
  void (*quantize_piece)(const void* x, GroupPiece piece, Range range, Seed seed, uint8_t* codes);
  void (*dequantize_piece)(const uint8_t* codes, GroupPiece piece, Range range, Seed seed, void* y);
};

// bits is 1, 2, 4 or 8.
const GroupKernels& group_kernels(Isa isa, Scalar scalar, int bits);

// One definition per ISA, each in a file of its own; indexed [scalar][log2(bits)].
extern const GroupKernels group_kernels_portable[3][4];
extern const GroupKernels group_kernels_avx2[3][4];
extern const GroupKernels group_kernels_avx512[3][4];

}  // namespace quantize::activation
