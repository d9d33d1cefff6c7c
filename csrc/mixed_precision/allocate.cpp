// The allocator from question to answer: what is decided beforehand is left out, a local search finds a good assignment, and a dynamic
// program (without cross terms) or branch and bound finds the best or says how far it may be.
#include "allocate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "branch_and_bound.h"
#include "dynamic_program.h"

namespace quantize::mixed_precision {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double gap_of_proof = 0.5e-5;
// What choices with equal objectives may differ by, relative to the largest entry: the preference weighs as much as that.
constexpr double tie = 1e-12;

// The power of two that brings x below 1: scaling by it changes no digits.
double scale_of(double x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  return x > 0 && std::isfinite(x) ? std::ldexp(1., std::clamp(-exponent, -1000, 1000)) : 1;
}

// The question without what is decided: layers with one choice left, choices beyond a limit, limits that nothing reaches.
struct Reduced {
  Problem problem;
  double scale = 1;          // of the objective
  std::vector<int> origin;   // each variable's place in the question
  std::vector<int> decided;  // choice by layer, -1 where there is one
  bool feasible = true, crossed = false, zero = false;
};

// Which choices leave every limit within reach, were all other layers at their cheapest.
// least: the cheapest of each layer; room: what the limits leave above their sum.
std::vector<uint8_t> affordable(const Question& ask, std::vector<std::vector<double>>& least, std::vector<double>& room) {
  const int K = ask.choices;
  std::vector<uint8_t> open(size_t(ask.layers) * K, 1);
  if (ask.allowed) std::copy(ask.allowed, ask.allowed + open.size(), open.begin());
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t q = 0; q < ask.costs.size(); ++q) {
      // What rounding can add to a sum of so many terms is not held against a choice.
      room[q] = ask.limits[q] + std::abs(ask.limits[q]) * ask.layers * std::numeric_limits<double>::epsilon();
      for (int l = 0; l < ask.layers; ++l) {
        least[q][l] = infinity;
        for (int k = 0; k < K; ++k)
          if (open[l * K + k]) least[q][l] = std::min(least[q][l], ask.costs[q][l * K + k]);
        room[q] -= least[q][l];
      }
      for (int l = 0; l < ask.layers; ++l)
        for (int k = 0; k < K; ++k)
          if (open[l * K + k] && ask.costs[q][l * K + k] - least[q][l] > std::max(room[q], 0.)) open[l * K + k] = 0, changed = true;
    }
  }
  return open;
}

Reduced reduce(const Question& ask) {
  const int K = ask.choices, all = ask.layers * K;
  Reduced r;
  std::vector<std::vector<double>> least(ask.costs.size(), std::vector<double>(ask.layers));
  std::vector<double> room(ask.costs.size());
  const std::vector<uint8_t> open = affordable(ask, least, room);
  for (const double left : room) r.feasible &= left >= 0;
  r.decided.assign(ask.layers, -1);
  if (!r.feasible) return r;

  Problem& p = r.problem;
  p.first = {0};
  for (int l = 0; l < ask.layers; ++l) {
    const int count = int(std::count(&open[l * K], &open[l * K] + K, 1));
    if (count == 0) {  // its choices are beyond one limit or another
      r.feasible = false;
      return r;
    }
    for (int k = 0; k < K; ++k) {
      if (!open[l * K + k]) continue;
      if (count == 1) r.decided[l] = k;
      if (count > 1) r.origin.push_back(l * K + k), p.layer.push_back(p.layers());
    }
    if (count > 1) p.first.push_back(p.size());
  }

  double largest = 0;
  for (size_t i = 0; i < size_t(all) * all; ++i) largest = std::max(largest, std::abs(ask.matrix[i]));
  r.scale = scale_of(largest);
  r.zero = largest == 0;  // then the preference is all there is
  const int n = p.size();
  p.cross.assign(size_t(n) * n, 0.);
  p.linear.assign(n, 0.);
  double constant = 0;
  for (int l = 0; l < ask.layers; ++l)
    for (int m = 0; m < ask.layers; ++m)
      if (r.decided[l] >= 0 && r.decided[m] >= 0)
        constant += r.scale * ask.matrix[size_t(l * K + r.decided[l]) * all + m * K + r.decided[m]];
  for (int v = 0; v < n; ++v) {
    const double* row = ask.matrix + size_t(r.origin[v]) * all;
    p.linear[v] = r.scale * row[r.origin[v]];
    for (int l = 0; l < ask.layers; ++l)
      if (r.decided[l] >= 0) p.linear[v] += 2 * r.scale * row[l * K + r.decided[l]];
    if (p.layer[v] == 0) p.linear[v] += constant;  // every assignment has one of these
    for (int w = 0; w < n; ++w)
      if (p.layer[w] != p.layer[v]) {
        p.cross[size_t(v) * n + w] = r.scale * row[r.origin[w]];
        r.crossed |= row[r.origin[w]] != 0;
      }
  }
  if (ask.preference && n) {
    double range = 0;
    std::vector<double> lowest(p.layers(), infinity), highest(p.layers(), -infinity);
    for (int v = 0; v < n; ++v) {
      const double value = ask.preference[r.origin[v]];
      lowest[p.layer[v]] = std::min(lowest[p.layer[v]], value), highest[p.layer[v]] = std::max(highest[p.layer[v]], value);
    }
    for (int l = 0; l < p.layers(); ++l) range += highest[l] - lowest[l];
    const double weight = range > 0 ? (r.zero ? 1 : tie) / range : 0;
    for (int v = 0; v < n; ++v) p.linear[v] -= weight * (ask.preference[r.origin[v]] - lowest[p.layer[v]]);
  }
  for (size_t q = 0; q < ask.costs.size(); ++q) {
    std::vector<double> costs(n), dearest(p.layers());
    double total = 0;
    for (int v = 0; v < n; ++v) {
      const int l = r.origin[v] / K;
      costs[v] = ask.costs[q][r.origin[v]] - least[q][l];
      dearest[p.layer[v]] = std::max(dearest[p.layer[v]], costs[v]);
    }
    for (const double most : dearest) total += most;
    if (total <= room[q]) continue;
    const double scale = scale_of(room[q]);
    for (double& cost : costs) cost *= scale;
    p.costs.push_back(std::move(costs));
    p.limits.push_back(room[q] * scale);
  }
  return r;
}

// The least that each layer can bring, whatever the others do: a bound at once.
double first_bound(const Problem& p) {
  double bound = 0;
  for (int l = 0; l < p.layers(); ++l) {
    double least = infinity;
    for (int v = p.first[l]; v < p.first[l + 1]; ++v) {
      double sum = p.linear[v];
      for (int m = 0; m < p.layers(); ++m)
        if (m != l) sum += *std::min_element(p.cross_row(v) + p.first[m], p.cross_row(v) + p.first[m + 1]);
      least = std::min(least, sum);
    }
    bound += least;
  }
  return bound;
}

// Branch and bound from the best of a few convexifications, each for where the last one's relaxation came to rest.
Proof prove(const Problem& p, bool crossed, LocalSearch& search, int patience, Deadline& deadline) {
  const double size = p.size(), first = first_bound(p);
  const int sweeps = int(std::clamp(3e7 / (size * size), 20., 200.));
  std::vector<double> x(p.size());
  for (int v = 0; v < p.size(); ++v) x[v] = 1. / (p.first[p.layer[v] + 1] - p.first[p.layer[v]]);
  Convex convex;
  std::optional<Relaxation> root;
  for (int round = 0; round < (crossed ? 4 : 1); ++round) {
    Convex next = crossed ? convexify(p, x, sweeps, deadline) : Convex{std::vector<double>(p.cross.size()), p.linear};
    if (next.matrix.empty()) break;
    Relaxation relaxation(p, next);
    relaxation.x = x;
    relaxation.refresh();
    relaxation.tighten(400, search.ceiling(), deadline);
    search.improve(relaxation.rounded(), deadline);
    x = relaxation.x;
    const double gained = root ? relaxation.bound - root->bound : infinity;
    if (gained > 0) {
      convex = std::move(next);
      root.emplace(p, convex);
      root->copy(relaxation);
    }
    if (gained < 0.02 * (search.ceiling() - root->bound)) break;
  }
  if (!root) return {first, 0};
  search.search(patience, deadline);
  const Proof proof = branch_and_bound(p, convex, *root, search, gap_of_proof, deadline);
  return {std::max(first, proof.lower_bound), proof.nodes};
}

}  // namespace

Answer allocate(const Question& ask, double seconds, std::function<bool()> interrupted) {
  Deadline deadline(seconds, std::move(interrupted));
  Answer answer{Outcome::infeasible};
  Reduced r = reduce(ask);
  if (!r.feasible) return answer;
  const Problem& p = r.problem;
  answer.choice = r.decided;
  double lower = -infinity;
  if (p.layers()) {
    LocalSearch search(p, 1);
    search.start(200, deadline);
    const int patience = int(std::clamp(2.5e7 / (double(p.size()) * p.size()), 20., 150.));
    std::optional<Problem::Assignment> exact;
    if (search.found()) {
      search.search(patience, deadline);
      if (!r.crossed) exact = dynamic_program(p, search.best(), deadline);
    }
    Problem::Assignment best;
    if (exact) {
      best = *exact;
      lower = p.objective(best);
    } else {
      const Proof proof = prove(p, r.crossed, search, patience, deadline);
      answer.nodes = proof.nodes;
      lower = proof.lower_bound;
      if (!search.found()) {
        answer.interrupted = deadline.was_interrupted();
        answer.outcome = deadline.stop() ? Outcome::not_found : Outcome::infeasible;
        return answer;
      }
      best = search.best();
    }
    for (const int v : best) answer.choice[r.origin[v] / ask.choices] = r.origin[v] % ask.choices;
  }
  answer.outcome = Outcome::found;
  answer.interrupted = deadline.was_interrupted();
  const int all = ask.layers * ask.choices;
  for (int l = 0; l < ask.layers; ++l)
    for (int m = 0; m < ask.layers; ++m)
      answer.objective += ask.matrix[size_t(l * ask.choices + answer.choice[l]) * all + m * ask.choices + answer.choice[m]];
  // What the preference's weight and rounding amount to is a tie.
  const bool equal = p.layers() == 0 || r.zero || answer.objective - lower / r.scale <= 4 * tie / r.scale;
  answer.lower_bound = equal ? answer.objective : std::min(answer.objective, lower / r.scale);
  return answer;
}

}  // namespace quantize::mixed_precision
