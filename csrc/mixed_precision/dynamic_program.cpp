#include "dynamic_program.h"

#include <algorithm>

#include "relaxation.h"

namespace quantize::mixed_precision {
namespace {

struct Partial {
  double value,
      cost;  // cost: of the first limit; the others' are in a table beside
  int before,
      chosen;  // its place in the list of the layers before, its last variable
};

// Comparisons of each with each: several limits have no order to sort by.
constexpr size_t kLongest = 400000, kLongestOfSeveral = 4000;

}  // namespace

std::optional<Problem::Assignment> dynamic_program(const Problem& problem, const Problem::Assignment& known, Watch& watch) {
  const int layers = problem.layers(), limits = problem.constraints();
  const double best = problem.objective(known);
  // Without cross terms the tangent is the objective itself, and the relaxation finds the multipliers at any x.
  const Convex same{std::vector<double>(size_t(problem.size()) * problem.size()), problem.linear};
  Relaxation lagrange(problem, same);
  lagrange.refresh();
  if (lagrange.tighten(1, best, watch)) return known;
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

  std::vector<std::vector<Partial>> lists(layers + 1);
  lists[0] = {{0, 0, -1, -1}};
  std::vector<double> used(limits), costs(limits),
      grown_costs;  // used: [partials, limits]
  const size_t longest = limits > 1 ? kLongestOfSeveral : kLongest;
  for (int l = 0; l < layers; ++l) {
    std::vector<Partial> grown;
    grown_costs.clear();
    for (size_t p = 0; p < lists[l].size(); ++p) {
      if (p % 1024 == 0 && watch.stop()) return std::nullopt;
      for (int v = problem.first[l]; v < problem.first[l + 1]; ++v) {
        if (!lagrange.open[v]) continue;
        const double value = lists[l][p].value + problem.linear[v];
        double bound = value + rest[l + 1];
        bool fits = true;
        for (int q = 0; q < limits; ++q) {
          costs[q] = used[p * limits + q] + problem.costs[q][v];
          bound += multipliers[q] * costs[q];
          fits &= costs[q] <= problem.limits[q];
        }
        if (!fits || bound >= best) continue;
        // Their place among the costs stands where the first cost will.
        grown.push_back({value, double(grown.size()), int(p), v});
        grown_costs.insert(grown_costs.end(), costs.begin(), costs.end());
      }
    }
    std::vector<Partial>& next = lists[l + 1];
    const auto costs_of = [&](const Partial& p) { return &grown_costs[size_t(p.cost) * limits]; };
    std::sort(grown.begin(), grown.end(), [&](const Partial& a, const Partial& b) {
      if (limits == 0) return a.value < b.value;
      const double *one = costs_of(a), *other = costs_of(b);
      return *one != *other ? *one < *other : a.value < b.value;
    });
    std::vector<double> kept;
    for (size_t g = 0; g < grown.size(); ++g) {
      const double* own = limits ? costs_of(grown[g]) : nullptr;
      bool dominated = false;
      if (limits < 2) {
        dominated = !next.empty() && next.back().value <= grown[g].value;
      } else {
        if (g % 256 == 0 && watch.stop()) return std::nullopt;
        for (size_t k = 0; k < next.size() && !dominated; ++k) {
          dominated = next[k].value <= grown[g].value;
          for (int q = 0; q < limits && dominated; ++q) dominated = kept[k * limits + q] <= own[q];
        }
      }
      if (dominated) continue;
      if (next.size() == longest) return std::nullopt;
      next.push_back({grown[g].value, limits ? own[0] : 0, grown[g].before, grown[g].chosen});
      kept.insert(kept.end(), own, own + limits);
    }
    used = std::move(kept);
  }
  if (lists[layers].empty()) return known;
  auto last =
      std::min_element(lists[layers].begin(), lists[layers].end(), [](const Partial& a, const Partial& b) { return a.value < b.value; });
  Problem::Assignment chosen(layers);
  int at = int(last - lists[layers].begin());
  for (int l = layers; l > 0; --l) {
    chosen[l - 1] = lists[l][at].chosen;
    at = lists[l][at].before;
  }
  return problem.feasible(chosen) && problem.objective(chosen) < best ? chosen : known;
}

}  // namespace quantize::mixed_precision
