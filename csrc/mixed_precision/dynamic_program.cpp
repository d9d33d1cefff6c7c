// Lists of partial assignments: grown by a layer, sorted by cost, and thinned out.
#include "dynamic_program.h"

#include <algorithm>
#include <numeric>

#include "relaxation.h"

namespace quantize::mixed_precision {
namespace {

// A list of partial assignments, over the first layers.
struct Partials {
  std::vector<double> values, used;  // used: [size, limits]
  std::vector<int> before, chosen;   // the place in the list before this one, and the last variable
  size_t size() const { return values.size(); }

  void add(double value, const double* costs, int limits, int from, int variable) {
    values.push_back(value);
    used.insert(used.end(), costs, costs + limits);
    before.push_back(from);
    chosen.push_back(variable);
  }
};

// Several limits have no order to sort by: each is compared with each.
constexpr size_t longest = 400000, longest_of_several = 4000;

// Whether a partial assignment is worth no less than one that is kept. `kept` are those of less cost, of several limits of the first cost.
bool dominated(const Partials& kept, double value, const double* costs, int limits) {
  if (limits < 2) return kept.size() && kept.values.back() <= value;
  for (size_t k = 0; k < kept.size(); ++k) {
    bool better = kept.values[k] <= value;
    for (int q = 0; q < limits && better; ++q) better = kept.used[k * limits + q] <= costs[q];
    if (better) return true;
  }
  return false;
}

}  // namespace

std::optional<Problem::Assignment> dynamic_program(const Problem& problem, const Problem::Assignment& known, Deadline& deadline) {
  const int layers = problem.layers(), limits = problem.constraints();
  const double best = problem.objective(known);
  // Without cross terms the tangent is the objective itself, and the relaxation finds the multipliers at any x.
  const Convex same{std::vector<double>(size_t(problem.size()) * problem.size()), problem.linear};
  Relaxation lagrange(problem, same);
  lagrange.refresh();
  if (lagrange.tighten(1, best, deadline)) return known;
  const std::vector<double>& multipliers = lagrange.best_multipliers();

  // What the layers from l on bring at the least, the multipliers' due included.
  std::vector<double> rest(layers + 1);
  for (int q = 0; q < limits; ++q) rest[layers] -= multipliers[q] * problem.limits[q];
  for (int l = layers - 1; l >= 0; --l) {
    double least = 0;
    for (int v = problem.first[l]; v < problem.first[l + 1]; ++v) {
      double slope = problem.linear[v];
      for (int q = 0; q < limits; ++q) slope += multipliers[q] * problem.costs[q][v];
      least = v == problem.first[l] ? slope : std::min(least, slope);
    }
    rest[l] = rest[l + 1] + least;
  }

  std::vector<Partials> lists(layers + 1);
  const std::vector<double> nothing(limits);
  lists[0].add(0, nothing.data(), limits, -1, -1);
  for (int l = 0; l < layers; ++l) {
    Partials grown;
    std::vector<double> costs(limits);
    for (size_t p = 0; p < lists[l].size(); ++p) {
      if (p % 1024 == 0 && deadline.stop()) return std::nullopt;
      for (int v = problem.first[l]; v < problem.first[l + 1]; ++v) {
        if (!lagrange.open[v]) continue;
        const double value = lists[l].values[p] + problem.linear[v];
        double bound = value + rest[l + 1];
        bool fits = true;
        for (int q = 0; q < limits; ++q) {
          costs[q] = lists[l].used[p * limits + q] + problem.costs[q][v];
          bound += multipliers[q] * costs[q];
          fits &= costs[q] <= problem.limits[q];
        }
        if (fits && bound < best) grown.add(value, costs.data(), limits, int(p), v);
      }
    }
    std::vector<size_t> order(grown.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      const double one = limits ? grown.used[a * limits] : 0, other = limits ? grown.used[b * limits] : 0;
      return one != other ? one < other : grown.values[a] < grown.values[b];
    });
    Partials& next = lists[l + 1];
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t g = order[i];
      const double* own = grown.used.data() + g * limits;
      if (i % 256 == 0 && deadline.stop()) return std::nullopt;
      if (dominated(next, grown.values[g], own, limits)) continue;
      if (next.size() == (limits > 1 ? longest_of_several : longest)) return std::nullopt;
      next.add(grown.values[g], own, limits, grown.before[g], grown.chosen[g]);
    }
    lists[l].values.clear();
    lists[l].used.clear();
  }
  const std::vector<double>& ends = lists[layers].values;
  if (ends.empty()) return known;
  Problem::Assignment chosen(layers);
  int at = int(std::min_element(ends.begin(), ends.end()) - ends.begin());
  for (int l = layers; l > 0; --l) {
    chosen[l - 1] = lists[l].chosen[at];
    at = lists[l].before[at];
  }
  return problem.feasible(chosen) && problem.objective(chosen) < best ? chosen : known;
}

}  // namespace quantize::mixed_precision
