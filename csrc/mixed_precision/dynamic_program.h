// Without cross terms: a multiple-choice knapsack, exactly.
#pragma once

#include <optional>

#include "problem.h"

namespace quantize::mixed_precision {

// The best assignment, given one that is feasible, by lists of partial assignments layer by layer. Dropped are those that another is no
// worse than in value and in every cost, and those that Lagrange's bound says cannot end better than `known`. Nothing when a list would be
// longer than memory and time are for (real costs and several limits can do that), or when the deadline stops it.
std::optional<Problem::Assignment> dynamic_program(const Problem& problem, const Problem::Assignment& known, Deadline& deadline);

}  // namespace quantize::mixed_precision
