// Good choices quickly: descents by changes of one and of two layers, and kicks out of the minima they end in.
#pragma once

#include <optional>
#include <random>

#include "problem.h"

namespace quantize::mixed_precision {

class LocalSearch {
 public:
  LocalSearch(const Problem& problem, uint64_t seed);

  // A start that meets every limit, by descent on what exceeds them; false if `tries` kicks find none.
  bool start(int tries, Deadline& deadline);
  // Kicks from the current minimum; keeps the best in `best`. Stops after `patience` kicks without a better one.
  void search(int patience, Deadline& deadline);
  // A descent from `chosen`, repaired first.
  void improve(const Problem::Assignment& chosen, Deadline& deadline);

  bool found() const { return !best_.empty(); }
  const Problem::Assignment& best() const { return best_; }
  double best_value() const { return best_value_; }
  // What a better assignment has less than; more than any has, while none is found.
  double ceiling() const { return found() ? best_value_ : most_; }

 private:
  void place(const Problem::Assignment& chosen);
  void move(int to);
  double excess_after(int v, int w) const;
  bool fits(int v) const;
  bool fits(int v, int w) const;
  bool repair();
  void descend(Deadline& deadline);
  bool pair_move(int v);
  bool single_moves(Deadline& deadline);
  void keep();
  int random(int n) { return int(random_() % uint64_t(n)); }
  double uniform() { return double(random_() >> 11) * 0x1p-53; }

  const Problem& problem_;
  std::mt19937_64 random_;
  Problem::Assignment chosen_, best_;
  double value_ = 0, best_value_ = 0, most_ = 1;
  std::vector<double> field_;     // what the objective would change by, but for a constant of the layer, were a variable chosen
  std::vector<double> rounding_;  // that a field may have gathered: less is no change for the better
  std::vector<double> used_;      // of each limit
};

}  // namespace quantize::mixed_precision
