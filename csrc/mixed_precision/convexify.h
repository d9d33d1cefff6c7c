// The same objective on assignments, convex between them.
//
// On one-hot blocks x_l' B x_l = sum_v B[v][v] x_v for any symmetric B, so cross + blockdiag(B) with linear - diag(B) is the same
// objective, whichever the B. Between assignments it is less by sum_l trace(B_l (diag(x_l) - x_l x_l')). Convex is asked for only where
// blocks sum to one: cross + B >= 0 on directions whose blocks sum to zero. (Billionnet, Elloumi, Plateau, "Improving the performance of
// standard solvers for quadratic 0-1 programs by a tight convex reformulation", 2009, has diagonal B.)
#pragma once

#include "problem.h"

namespace quantize::mixed_precision {

struct Convex {
  std::vector<double> matrix;  // [size, size]
  std::vector<double> linear;  // [size]
};

// The B that loses least at x: of all that make the objective convex, the one of least trace(B_l (diag(x_l) - x_l x_l')), up to what
// `sweeps` leave. Its dual, max -trace(cross Z) over Z >= 0 with blocks diag(x_l) - x_l x_l', is solved by the mixing method (Wang, Chang,
// Kolter, arXiv 1706.00476) with a block of vectors in place of one. Certified by a Cholesky factorisation. Empty when the deadline stops
// it.
Convex convexify(const Problem& problem, const std::vector<double>& x, int sweeps, Deadline& deadline);

}  // namespace quantize::mixed_precision
