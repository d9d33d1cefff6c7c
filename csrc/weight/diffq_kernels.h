// CPU kernels of diffq: one body, compiled once per ISA, the same bits from each.
#pragma once

#include "../core/cpu_isa.h"
#include "../core/philox.h"
#include "diffq.h"

namespace quantize::weight {

// One tensor of a call. Pointers are to the whole tensor.
struct DiffQTensor {
  int64_t n, group_size, span;
  const float* logits;  // [ceil(n / group_size)]
  float* ranges;        // [ceil(n / span), 2]: low, range
  BitsBounds bounds;
  Seed seed;
  uint32_t stream;
  const float* quantiles;    // [65536]; null: uniform noise
  bool past_caches = false;  // noisy weights go to memory at once
};

// The bits of a tensor's elements together: those of the noise, and whole ones as files have them.
struct DiffQBits {
  double learned = 0, rounded = 0;
};

// Where the sums of one piece go. A group or row of ranges that lies within the piece goes to its own place; one that is cut leaves its
// part in `cut`: [0] if it began before the piece, else [1].
struct DiffQSums {
  float* logits;      // the logits' gradient
  float* ranges;      // [rows]: the ranges' gradient
  float* cut_groups;  // [2]
  float* cut_rows;    // [2]
};

struct DiffQExtent {
  float low, range;         // NaN if any weight is NaN or infinite
  int32_t lowest, highest;  // where, the first of equals
};

// Noise on an activation with learned ends and bits (NIPQ, CVPR 2023): clip(x, low, high) + n * scale. One group, one range.
struct ClippedNoise {
  float low, high, scale;
  Seed seed;
};

// Of the gradient g over a piece: of g * n, of g where x is above high, of g where x is below low.
struct ClippedSums {
  float noise, above, below;
};

struct DiffQKernels {
  DiffQExtent (*extent)(const void* w, int64_t n);
  // Elements [begin, end). Returns the sums over the groups (not their elements) that begin there.
  DiffQBits (*noise)(const DiffQTensor& t, const void* w, int64_t begin, int64_t end, void* y);
  void (*round)(const DiffQTensor& t, const void* w, int64_t begin, int64_t end, void* y);
  // The sums of one piece.
  void (*backward)(const DiffQTensor& t, const void* grad, int64_t piece, DiffQSums sums);
  // Elements [begin, end) of an activation.
  void (*clipped)(const ClippedNoise& noise, const void* x, int64_t begin, int64_t end, void* y);
  // One piece of it: grad_x = grad where x is within the ends, else 0.
  ClippedSums (*clipped_backward)(const ClippedNoise& noise, const void* grad, const void* x, int64_t n, int64_t piece, void* grad_x);
  // bits[i] = what is in force for logits[i]; slope: factor times its derivative; either may be null. Returns their sum.
  double (*bits)(const float* logits, int64_t n, BitsBounds bounds, bool rounded, float* bits, float* slope, float factor);
};

// Indexed by Scalar.
extern const DiffQKernels diffq_portable[3];
extern const DiffQKernels diffq_avx2[3];
extern const DiffQKernels diffq_avx512[3];

inline const DiffQKernels& diffq_kernels(Isa isa, Scalar scalar) { return QUANTIZE_BY_ISA(isa, diffq)[int(scalar)]; }

}  // namespace quantize::weight
