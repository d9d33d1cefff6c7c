// Every variable's field, what its choice would add to the objective, is kept up to date: a move is looked at without the matrix.
#include "local_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantize::mixed_precision {
LocalSearch::LocalSearch(const Problem& problem, uint64_t seed)
    : problem_(problem), random_(seed), field_(problem.size()), rounding_(problem.size()), used_(problem.constraints()) {
  for (int v = 0; v < problem.size(); ++v) {
    double sum = std::abs(problem.linear[v]);
    for (int w = 0; w < problem.size(); ++w) sum += std::abs(problem.cross_row(v)[w]);
    rounding_[v] = std::numeric_limits<double>::epsilon() * sum;
  }
  for (const double entry : problem.cross) most_ += std::abs(entry);
  for (const double entry : problem.linear) most_ += std::abs(entry);
}

void LocalSearch::place(const Problem::Assignment& chosen) {
  const int n = problem_.size();
  chosen_ = chosen;
  std::copy(problem_.linear.begin(), problem_.linear.end(), field_.begin());
  for (const int v : chosen_) {
    const double* row = problem_.cross_row(v);
    for (int w = 0; w < n; ++w) field_[w] += 2 * row[w];
  }
  for (int q = 0; q < problem_.constraints(); ++q) {
    used_[q] = 0;
    for (const int v : chosen_) used_[q] += problem_.costs[q][v];
  }
  value_ = problem_.objective(chosen_);
}

void LocalSearch::move(int to) {
  int& at = chosen_[problem_.layer[to]];
  value_ += field_[to] - field_[at];
  const double *plus = problem_.cross_row(to), *minus = problem_.cross_row(at);
  for (int w = 0; w < problem_.size(); ++w) field_[w] += 2 * (plus[w] - minus[w]);
  for (int q = 0; q < problem_.constraints(); ++q) used_[q] += problem_.costs[q][to] - problem_.costs[q][at];
  at = to;
}

bool LocalSearch::fits(int v) const {
  const int at = chosen_[problem_.layer[v]];
  for (int q = 0; q < problem_.constraints(); ++q)
    if (used_[q] + (problem_.costs[q][v] - problem_.costs[q][at]) > problem_.limits[q]) return false;
  return true;
}

bool LocalSearch::fits(int v, int w) const {
  const int at = chosen_[problem_.layer[v]], other = chosen_[problem_.layer[w]];
  for (int q = 0; q < problem_.constraints(); ++q) {
    const auto& cost = problem_.costs[q];
    if (used_[q] + (cost[v] - cost[at]) + (cost[w] - cost[other]) > problem_.limits[q]) return false;
  }
  return true;
}

// How far beyond the limits, each in units of its own, the choice would be with v and w in it.
double LocalSearch::excess_after(int v, int w) const {
  const int at = chosen_[problem_.layer[v]], other = chosen_[problem_.layer[w]];
  double sum = 0;
  for (int q = 0; q < problem_.constraints(); ++q) {
    const auto& cost = problem_.costs[q];
    sum += std::max(0., used_[q] + (cost[v] - cost[at]) + (v == w ? 0 : cost[w] - cost[other]) - problem_.limits[q]);
  }
  return sum;
}

void LocalSearch::keep() {
  // Moves add rounding: what may be better is computed afresh.
  if (found() && value_ > best_value_ + 1e-10 * std::max(1., std::abs(best_value_))) return;
  if (!problem_.feasible(chosen_)) return;
  const double value = problem_.objective(chosen_);
  if (!found() || value < best_value_) best_ = chosen_, best_value_ = value;
}

// Makes the choice feasible by the moves that cost least per unit of what they save.
bool LocalSearch::repair() {
  for (int step = 0; step < 4 * problem_.layers(); ++step) {
    const double before = excess_after(chosen_[0], chosen_[0]);
    if (before <= 0) return problem_.feasible(chosen_);
    double best = std::numeric_limits<double>::infinity();
    int to = -1;
    for (int v = 0; v < problem_.size(); ++v) {
      const int at = chosen_[problem_.layer[v]];
      const double relief = v == at ? 0 : before - excess_after(v, v);
      if (!(relief > 1e-14 * before)) continue;
      const double change = field_[v] - field_[at];
      const double ratio = (change > 0 ? change / relief : change * relief) * (1 + 0.3 * uniform());
      if (ratio < best) best = ratio, to = v;
    }
    if (to < 0) return false;
    move(to);
  }
  return false;
}

// The best change of v's layer to v together with one other; true if it was one for the better.
bool LocalSearch::pair_move(int v) {
  const int at = chosen_[problem_.layer[v]];
  if (v == at) return false;
  const double *plus = problem_.cross_row(v), *minus = problem_.cross_row(at);
  const double own = field_[v] - field_[at] + rounding_[v] + rounding_[at];
  // The first limit is looked at here, which spares most calls of fits().
  const double* cost = problem_.constraints() ? problem_.costs[0].data() : nullptr;
  const double room = cost ? problem_.limits[0] - used_[0] - (cost[v] - cost[at]) : 0;
  double best = 0;
  int other = -1;
  for (int l = 0; l < problem_.layers(); ++l) {
    const int from = chosen_[l];
    if (from == at) continue;
    const double base = own - field_[from] + rounding_[from] - 2 * (plus[from] - minus[from]), within = cost ? room + cost[from] : 0;
    for (int w = problem_.first[l]; w < problem_.first[l + 1]; ++w) {
      const double change = base + field_[w] + rounding_[w] + 2 * (plus[w] - minus[w]);
      if (change >= best || w == from || (cost && cost[w] > within) || !fits(v, w)) continue;
      best = change, other = w;
    }
  }
  if (other < 0) return false;
  move(v);
  move(other);
  return true;
}

bool LocalSearch::single_moves(Deadline& deadline) {
  bool moved = false;
  while (!deadline.stop()) {
    double best = 0;
    int to = -1;
    for (int v = 0; v < problem_.size(); ++v) {
      const int at = chosen_[problem_.layer[v]];
      if (v == at) continue;
      const double change = field_[v] - field_[at] + rounding_[v] + rounding_[at];
      if (change < best && fits(v)) best = change, to = v;
    }
    if (to < 0) break;
    move(to);
    moved = true;
  }
  return moved;
}

// Until no change of one layer helps, and none of two.
void LocalSearch::descend(Deadline& deadline) {
  const int n = problem_.size();
  single_moves(deadline);
  for (int v = random(n), since = 0; since < n && !deadline.stop(); v = (v + 1) % n, ++since)
    if (pair_move(v)) {
      single_moves(deadline);
      since = 0;
    }
}

bool LocalSearch::start(int tries, Deadline& deadline) {
  const int layers = problem_.layers();
  Problem::Assignment cheapest(layers);
  for (int l = 0; l < layers; ++l) {
    double least = std::numeric_limits<double>::infinity();
    for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v) {
      double sum = 0;
      for (int q = 0; q < problem_.constraints(); ++q) sum += problem_.costs[q][v] / std::max(problem_.limits[q], 1e-300);
      if (sum < least) least = sum, cheapest[l] = v;
    }
  }
  place(cheapest);
  for (int t = 0; !problem_.feasible(chosen_); ++t) {
    if (t > tries || deadline.stop()) return false;
    if (t)
      for (int k = 2 + random(4); k > 0; --k) move(random(problem_.size()));
    for (bool better = true; better;) {  // one change, or else two, that lessen the excess
      better = false;
      double least = excess_after(chosen_[0], chosen_[0]) * (1 - 1e-12);
      if (least <= 0) break;
      int one = -1, two = -1;
      for (int v = 0; v < problem_.size(); ++v)
        if (const double excess = excess_after(v, v); excess < least) least = excess, one = two = v;
      if (one < 0)
        for (int v = 0; v < problem_.size(); ++v)
          for (int w = problem_.first[problem_.layer[v] + 1]; w < problem_.size(); ++w)
            if (const double excess = excess_after(v, w); excess < least) least = excess, one = v, two = w;
      if (one < 0) break;
      better = true;
      move(one);
      if (two != one) move(two);
    }
  }
  place(chosen_);
  keep();
  descend(deadline);
  keep();
  return true;
}

void LocalSearch::improve(const Problem::Assignment& chosen, Deadline& deadline) {
  place(chosen);
  if (!repair()) return;
  keep();
  descend(deadline);
  keep();
}

void LocalSearch::search(int patience, Deadline& deadline) {
  if (!found()) return;
  place(best_);
  descend(deadline);
  keep();
  Problem::Assignment from = chosen_;
  double from_value = value_;
  for (int since = 0, kicks = 0; since < patience && !deadline.stop(); ++since, ++kicks) {
    for (int k = 2 + random(6); k > 0; --k) move(random(problem_.size()));
    const double before = best_value_;
    if (repair()) {
      descend(deadline);
      keep();
      if (best_value_ < before - 1e-12 * std::abs(before)) since = 0;
      if (value_ <= from_value + (random(4) == 0 ? 0.01 * std::abs(from_value) * uniform() : 0)) from = chosen_, from_value = value_;
    }
    if (kicks % 100 == 99) from = best_, from_value = best_value_;
    place(from);
  }
}

}  // namespace quantize::mixed_precision
