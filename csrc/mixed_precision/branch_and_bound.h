// The proof: the best assignment, or one within `gap` of it, by best-first branch and bound on Relaxation's bounds.
#pragma once

#include <cstdint>

#include "local_search.h"
#include "relaxation.h"

namespace quantize::mixed_precision {

struct Proof {
  double lower_bound;
  int64_t nodes;
};

// Starts from `root`, tightened; improves `search`'s best, or finds one. gap: relative to the best's objective. Having come so near it goes
// on to the very best for as long again. If `search` has none in the end, and the deadline did not stop it, then there is none.
Proof branch_and_bound(const Problem& problem, const Convex& convex, const Relaxation& root, LocalSearch& search, double gap,
                       Deadline& deadline);

}  // namespace quantize::mixed_precision
