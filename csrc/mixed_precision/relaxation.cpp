// Sweeps of coordinate steps within layers. After each the multipliers follow, and choices that cannot lead below the cutoff are closed.
#include "relaxation.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantize::mixed_precision {
namespace {
constexpr double infinity = std::numeric_limits<double>::infinity();
}

Relaxation::Relaxation(const Problem& problem, const Convex& convex)
    : open(problem.size(), 1),
      x(problem.size()),
      multipliers(problem.constraints()),
      bound(-infinity),
      problem_(problem),
      convex_(convex),
      gradient_(problem.size()),
      used_(problem.constraints()),
      slope_(problem.size()),
      reduced_(problem.size()),
      pressure_(problem.constraints()),
      trial_(problem.constraints()),
      peak_(problem.constraints()),
      spent_(problem.constraints()),
      stiffness_(problem.constraints()),
      cheapest_(problem.layers()),
      count_(problem.layers()) {
  const int n = problem.size();
  // A penalty about as stiff as the objective is along a change of use by all layers together.
  for (int q = 0; q < problem.constraints(); ++q) {
    double compliance = 0;
    for (int l = 0; l < problem.layers(); ++l) {
      double most = 0;
      for (int v = problem.first[l]; v < problem.first[l + 1]; ++v)
        for (int w = problem.first[l]; w < v; ++w) {
          const double* m = convex.matrix.data();
          const double bend = m[size_t(v) * n + v] + m[size_t(w) * n + w] - 2 * m[size_t(v) * n + w];
          const double difference = problem.costs[q][v] - problem.costs[q][w];
          if (bend > 0) most = std::max(most, difference * difference / (2 * bend));
        }
      compliance += most;
    }
    stiffness_[q] = compliance > 0 ? 6 / compliance : 1;
  }
}

void Relaxation::copy(const Relaxation& other) {
  open = other.open, x = other.x, multipliers = other.multipliers, bound = other.bound;
  gradient_ = other.gradient_, used_ = other.used_, count_ = other.count_;
}

double Relaxation::pressure(int q) const { return std::max(0., multipliers[q] + stiffness_[q] * (used_[q] - problem_.limits[q])); }

bool Relaxation::decided() const {
  return std::all_of(count_.begin(), count_.end(), [](int count) { return count == 1; });
}

Problem::Assignment Relaxation::rounded() const {
  Problem::Assignment chosen;
  for (int l = 0; l < problem_.layers(); ++l)
    chosen.push_back(int(std::max_element(x.begin() + problem_.first[l], x.begin() + problem_.first[l + 1]) - x.begin()));
  return chosen;
}

void Relaxation::refresh() {
  const int n = problem_.size();
  std::copy(convex_.linear.begin(), convex_.linear.end(), gradient_.begin());
  std::fill(used_.begin(), used_.end(), 0.);
  for (int l = 0; l < problem_.layers(); ++l) {
    const int begin = problem_.first[l], end = problem_.first[l + 1];
    double sum = 0;
    count_[l] = 0;
    for (int v = begin; v < end; ++v) x[v] = open[v] ? std::max(x[v], 0.) : 0, sum += x[v], count_[l] += open[v];
    for (int v = begin; v < end; ++v) {
      if (open[v]) x[v] = sum > 1e-6 ? x[v] / sum : 1. / count_[l];
      if (x[v] == 0) continue;
      const double twice = 2 * x[v], *row = &convex_.matrix[size_t(v) * n];
      for (int w = 0; w < n; ++w) gradient_[w] += twice * row[w];
      for (int q = 0; q < problem_.constraints(); ++q) used_[q] += x[v] * problem_.costs[q][v];
    }
  }
}

void Relaxation::shift(int to, int from, double share) {
  const int n = problem_.size();
  const double *plus = &convex_.matrix[size_t(to) * n], *minus = &convex_.matrix[size_t(from) * n], twice = 2 * share;
  double* g = gradient_.data();
  for (int w = 0; w < n; ++w) g[w] += twice * (plus[w] - minus[w]);
  for (int q = 0; q < problem_.constraints(); ++q) used_[q] += share * (problem_.costs[q][to] - problem_.costs[q][from]);
  x[to] += share;
  x[from] -= share;
}

void Relaxation::fix(int v) {
  const int l = problem_.layer[v];
  for (int w = problem_.first[l]; w < problem_.first[l + 1]; ++w) {
    open[w] = w == v;
    if (w != v && x[w] > 0) shift(v, w, x[w]);
    if (w != v) x[w] = 0;
  }
  x[v] = 1;
  count_[l] = 1;
}

// Moves shares between pairs of a layer's choices while that pays.
void Relaxation::step(int l) {
  const int begin = problem_.first[l], end = problem_.first[l + 1], n = problem_.size(), limits = problem_.constraints();
  for (int repeat = 0; repeat < end - begin; ++repeat) {
    for (int q = 0; q < limits; ++q) pressure_[q] = pressure(q);
    int to = -1, from = -1;
    double low = infinity, high = -infinity;
    for (int v = begin; v < end; ++v) {
      if (!open[v]) continue;
      double slope = gradient_[v];
      for (int q = 0; q < limits; ++q) slope += pressure_[q] * problem_.costs[q][v];
      if (slope < low) low = slope, to = v;
      if (x[v] > 0 && slope > high) high = slope, from = v;
    }
    if (from < 0 || to == from || high - low <= 1e-14) return;
    const double* m = convex_.matrix.data();
    double bend = 2 * (m[size_t(to) * n + to] + m[size_t(from) * n + from] - 2 * m[size_t(to) * n + from]);
    for (int q = 0; q < limits; ++q) {
      const double difference = problem_.costs[q][to] - problem_.costs[q][from];
      if (pressure_[q] > 0 || difference > 0) bend += stiffness_[q] * difference * difference;
    }
    const double gain = high - low, share = gain >= bend * x[from] ? x[from] : gain / bend;
    const bool all = share == x[from];
    shift(to, from, share);
    if (all) x[from] = 0;
    if (share < 1e-9) return;
  }
}

// The bound at x and these multipliers; spent_: what the tangent's minimum uses of each limit.
double Relaxation::tangent_bound(const std::vector<double>& m) {
  const int limits = problem_.constraints();
  double sum = -curved_;
  for (int q = 0; q < limits; ++q) sum -= m[q] * problem_.limits[q], spent_[q] = 0;
  for (int l = 0; l < problem_.layers(); ++l) {
    double least = infinity;
    int at = -1;
    for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v) {
      if (!open[v]) continue;
      double slope = gradient_[v];
      for (int q = 0; q < limits; ++q) slope += m[q] * problem_.costs[q][v];
      slope_[v] = slope;
      if (slope < least) least = slope, at = v;
      if (count_[l] == 1) break;
    }
    sum += least;
    for (int q = 0; q < limits; ++q) spent_[q] += problem_.costs[q][at];
  }
  return sum;
}

// The best multipliers for the tangent at x, one limit after the other: the bound is concave in each.
void Relaxation::raise_bound(double enough) {
  const int limits = problem_.constraints();
  curved_ = 0;
  for (int v = 0; v < problem_.size(); ++v) curved_ += (gradient_[v] - convex_.linear[v]) * x[v];
  curved_ /= 2;
  for (int q = 0; q < limits; ++q) trial_[q] = pressure(q);
  double best = tangent_bound(trial_);
  peak_ = trial_;
  for (int round = 0; round < (limits > 1 ? 3 : 1); ++round)
    for (int q = 0; q < limits; ++q) {
      // Tangents from both sides; the next point is where they meet. Until there are two, ever longer strides.
      double value = tangent_bound(trial_), rise = spent_[q] - problem_.limits[q], stride = 2;
      double low = -1, low_value = 0, low_rise = 0, high = -1, high_value = 0, high_rise = 0;
      for (int step = 0; step < 40; ++step) {
        if (value > best) best = value, peak_ = trial_;
        if (rise > 0)
          low = trial_[q], low_value = value, low_rise = rise;
        else if (trial_[q] == 0)
          break;
        else
          high = trial_[q], high_value = value, high_rise = rise;
        double next;
        if (low >= 0 && high >= 0) {
          next = (high_value - low_value + low_rise * low - high_rise * high) / (low_rise - high_rise);
          const double meet = low_value + low_rise * (next - low);
          if (!(next > low && next < high) || meet <= best + enough + 1e-13 * std::abs(best)) break;
        } else {
          next = low >= 0 ? std::max(stride * low, 1e-12) : high / stride;
          if (next < 1e-18) next = 0;
          if (next > 1e15) break;
          stride = std::min(stride * stride, 1e6);
        }
        trial_[q] = next;
        value = tangent_bound(trial_), rise = spent_[q] - problem_.limits[q];
      }
      trial_ = peak_;
    }
  last_ = tangent_bound(peak_);
  bound = std::max(bound, last_);
  for (int l = 0; l < problem_.layers(); ++l) {
    double least = infinity;
    for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v)
      if (open[v]) least = std::min(least, slope_[v]);
    for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v) reduced_[v] = open[v] ? slope_[v] - least : infinity;
  }
}

// Closes the choices of a layer for which `beyond` is true, and gives their shares to the one of the least `rank` that is left. True when
// none is.
template <typename Beyond, typename Rank>
bool Relaxation::close(int l, Beyond beyond, Rank rank) {
  if (count_[l] < 2) return false;
  int to = -1;
  bool moved = false;
  for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v)
    if (open[v] && beyond(v)) {
      open[v] = 0, moved |= x[v] > 0;
      if (--count_[l] == 0) return true;
    } else if (open[v] && (to < 0 || rank(v) < rank(to))) {
      to = v;
    }
  if (moved)
    for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v)
      if (!open[v] && x[v] > 0) shift(to, v, x[v]), x[v] = 0;
  if (count_[l] == 1) x[to] = 1;
  return false;
}

// What would raise the bound to the cutoff.
bool Relaxation::close_bad(double cutoff) {
  if (bound >= cutoff) return true;
  for (int l = 0; l < problem_.layers(); ++l)
    if (close(
            l, [&](int v) { return last_ + reduced_[v] >= cutoff; }, [&](int v) { return reduced_[v]; }))
      return true;
  return false;
}

// What does not fit with the others at their cheapest.
bool Relaxation::close_dear() {
  for (int q = 0; q < problem_.constraints(); ++q) {
    const std::vector<double>& cost = problem_.costs[q];
    double room = problem_.limits[q] * (1 + 1e-13);
    for (int l = 0; l < problem_.layers(); ++l) {
      double least = infinity;
      for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v)
        if (open[v]) least = std::min(least, cost[v]);
      cheapest_[l] = least, room -= least;
    }
    if (room < 0) return true;
    for (int l = 0; l < problem_.layers(); ++l)
      if (close(
              l, [&](int v) { return cost[v] - cheapest_[l] > room; }, [&](int v) { return cost[v]; }))
        return true;
  }
  return false;
}

bool Relaxation::tighten(int sweeps, double cutoff, Deadline& deadline) {
  if (close_dear()) return true;
  double checked = bound;
  for (int s = 0; s < sweeps; ++s) {
    for (int l = 0; l < problem_.layers(); ++l)
      if (count_[l] > 1) step(l);
    for (int q = 0; q < problem_.constraints(); ++q) multipliers[q] = pressure(q);
    if (s % 2 && s + 1 != sweeps) continue;
    raise_bound(1e-3 * std::max(cutoff - bound, 0.));  // finer multipliers are not worth their time
    if (close_bad(cutoff)) return true;
    if (deadline.stop()) return false;
    // Near its best, as far as it matters: go on to the children.
    if (s >= 4 && s % 4 == 0) {
      if (bound - checked < 0.02 * (cutoff - bound)) break;
      checked = bound;
    }
  }
  return false;
}

}  // namespace quantize::mixed_precision
