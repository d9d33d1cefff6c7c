// Lower bounds: the convex objective over shares (each layer's sum to one) of the choices that are still open, under the limits.
//
// For any shares x and multipliers m >= 0, feasible or not, nothing open and feasible has an objective below
//     -x' Q x + sum_l min over open v of (2 Q x + c + m' A)_v - m' b,
// the objective's tangent at x less the multipliers' due: a multiple-choice knapsack relaxed by Lagrange. So x need not be found exactly:
// it comes from coordinate steps within layers on an augmented Lagrangian, and each bound on the way counts.
#pragma once

#include "convexify.h"
#include "problem.h"

namespace quantize::mixed_precision {

class Relaxation {
 public:
  Relaxation(const Problem& problem, const Convex& convex);

  // The node: what is open, where the steps begin, and what has been proven of it.
  std::vector<uint8_t> open;
  std::vector<double> x, multipliers;
  double bound;

  // The node of another relaxation of the same problem.
  void copy(const Relaxation& other);
  // After x was written to: makes it shares of what is open, and the rest consistent.
  void refresh();
  // Leaves the layer of v no other choice.
  void fix(int v);
  // Up to `sweeps` over the layers. Closes what cannot lead below `cutoff`; true when that is everything.
  bool tighten(int sweeps, double cutoff, Deadline& deadline);
  // The bound at x, and reduced costs; tighten() does it as it goes.
  void evaluate() { raise_bound(0); }
  // How much a choice would raise the bound at the least, were it made and nothing else changed.
  double reduced_cost(int v) const { return reduced_[v]; }
  // Of the last bound.
  const std::vector<double>& best_multipliers() const { return peak_; }
  // The largest share of each layer.
  Problem::Assignment rounded() const;
  int open_in(int layer) const { return count_[layer]; }
  bool decided() const;

 private:
  void step(int layer);
  void shift(int to, int from, double share);
  double tangent_bound(const std::vector<double>& multipliers);
  void raise_bound(double enough);  // until no more than that can be gained
  template <typename Beyond, typename Rank>
  bool close(int layer, Beyond beyond, Rank rank);
  bool close_bad(double cutoff);
  bool close_dear();
  double pressure(int q) const;

  const Problem& problem_;
  const Convex& convex_;
  std::vector<double> gradient_, used_, slope_, reduced_, pressure_, trial_, peak_, spent_;
  std::vector<double> stiffness_;  // of each limit's penalty
  std::vector<double> cheapest_;
  std::vector<int> count_;
  double curved_ = 0, last_ = 0;  // x' Q x; the bound at the last tangent
};

}  // namespace quantize::mixed_precision
