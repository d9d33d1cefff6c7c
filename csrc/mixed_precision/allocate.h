// The allocator: choices of bits for layers, from a matrix of sensitivities, costs and their limits.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace quantize::mixed_precision {

// Minimise sum over layers l, m of matrix[l * choices + x_l][m * choices + x_m] over one choice x_l per layer, subject to
// sum_l costs[q][l * choices + x_l] <= limits[q] for each q. All values must be finite, limits may be infinite.
struct Question {
  int layers, choices;
  const double* matrix;  // symmetric
  std::vector<const double*> costs;
  std::vector<double> limits;
  const double* preference = nullptr;  // [layers, choices], larger is better: decides between equal objectives
  const uint8_t* allowed = nullptr;    // [layers, choices]; at least one for each layer
};

enum class Outcome { found, infeasible, not_found };  // not_found: stopped before either was known

struct Answer {
  Outcome outcome;
  std::vector<int> choice;  // of each layer, if found
  double objective = 0;
  double lower_bound = 0;  // no feasible choice has a lower objective, by more than 4e-12 of the largest entry
  bool interrupted = false;
  int64_t nodes = 0;  // of the branch and bound
};

// The best choice, proven to a gap of 1e-5 or better, or what there is after `seconds` or when `interrupted` (asked every 20 ms) says so.
// The same question has the same answer, unless time ended the search.
Answer allocate(const Question& question, double seconds, std::function<bool()> interrupted);

}  // namespace quantize::mixed_precision
