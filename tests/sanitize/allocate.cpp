// The allocator on small problems of every kind, against every assignment.
#include "mixed_precision/allocate.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/philox.h"
#include "harness.h"

namespace sanitize {
namespace {

using namespace quantize::mixed_precision;

// Uniform in [-1, 1), the same everywhere.
class Noise {
 public:
  explicit Noise(uint32_t seed) : state_(seed) {}
  double operator()() { return double(int32_t(quantize::hash32(++state_ * 2654435761u))) * 0x1p-31; }

 private:
  uint32_t state_;
};

struct Case {
  int layers, choices, constraints;
  std::vector<double> matrix, preference;
  std::vector<std::vector<double>> costs;
  std::vector<double> limits;
  std::vector<uint8_t> allowed;
};

// kind: 0 indefinite, 1 positive semidefinite of rank 2, 2 without cross terms, 3 a dominant diagonal, 4 zero.
Case make(uint32_t seed, int layers, int choices, int constraints, int kind) {
  Noise noise(seed);
  const int n = layers * choices;
  Case c{layers, choices, constraints, std::vector<double>(size_t(n) * n), std::vector<double>(n), {}, {}, std::vector<uint8_t>(n, 1)};
  std::vector<double> vectors(2 * n);
  for (double& v : vectors) v = noise();
  for (int v = 0; v < n; ++v)
    for (int w = 0; w <= v; ++w) {
      double entry = kind == 1 ? vectors[2 * v] * vectors[2 * w] + vectors[2 * v + 1] * vectors[2 * w + 1] : noise();
      if (kind == 4 || (kind == 2 && v != w)) entry = 0;
      if (kind == 3) entry = v == w ? std::abs(entry) + 0.1 : 0.05 * entry;
      c.matrix[size_t(v) * n + w] = c.matrix[size_t(w) * n + v] = entry;
    }
  for (int v = 0; v < n; ++v) c.preference[v] = v % choices;
  for (int q = 0; q < constraints; ++q) {
    std::vector<double> costs(n);
    double low = 0, high = 0;
    for (int v = 0; v < n; ++v) costs[v] = q % 2 ? std::abs(noise()) : std::floor(100 * std::abs(noise()));
    for (int l = 0; l < layers; ++l) {
      const auto [least, most] = std::minmax_element(&costs[l * choices], &costs[l * choices] + choices);
      low += *least, high += *most;
    }
    c.costs.push_back(costs);
    c.limits.push_back(low + std::abs(noise()) * (high - low));
  }
  if (seed % 3 == 0) c.allowed[seed % n] = choices == 1;
  return c;
}

int64_t check(const Case& c, double seconds) {
  const int n = c.layers * c.choices;
  double scale = 0, best = std::numeric_limits<double>::infinity();
  for (const double entry : c.matrix) scale = std::max(scale, std::abs(entry));
  std::vector<int> at(c.layers);
  const auto objective = [&] {
    double sum = 0;
    for (int l = 0; l < c.layers; ++l)
      for (int m = 0; m < c.layers; ++m) sum += c.matrix[size_t(l * c.choices + at[l]) * n + m * c.choices + at[m]];
    return sum;
  };
  const auto fits = [&] {
    for (int l = 0; l < c.layers; ++l)
      if (!c.allowed[l * c.choices + at[l]]) return false;
    for (int q = 0; q < c.constraints; ++q) {
      double sum = 0;
      for (int l = 0; l < c.layers; ++l) sum += c.costs[q][l * c.choices + at[l]];
      if (sum > c.limits[q] * (1 + 1e-14)) return false;
    }
    return true;
  };
  for (int l = 0; l >= 0;) {  // counts through all assignments
    if (fits()) best = std::min(best, objective());
    for (l = c.layers - 1; l >= 0 && ++at[l] == c.choices; --l) at[l] = 0;
  }
  Question ask{c.layers, c.choices, c.matrix.data()};
  for (const auto& costs : c.costs) ask.costs.push_back(costs.data());
  ask.limits = c.limits;
  ask.preference = c.preference.data();
  ask.allowed = c.allowed.data();
  const Answer answer = allocate(ask, seconds, [] { return false; });
  const std::string what =
      std::to_string(c.layers) + " layers, " + std::to_string(c.choices) + " choices, " + std::to_string(c.constraints) + " constraints: ";
  const bool stopped = seconds < 1, none = std::isinf(best);
  if (answer.outcome == Outcome::not_found ? !stopped : (answer.outcome == Outcome::infeasible) != none)
    fail("allocate, " + what + "outcome");
  if (answer.outcome != Outcome::found) return 1;
  at = answer.choice;
  if (!fits() || std::abs(objective() - answer.objective) > 1e-12 * scale) fail("allocate, " + what + "the choice is not what it says");
  if (answer.lower_bound > best + 1e-11 * scale) fail("allocate, " + what + "the bound is above the best");
  if (!stopped && answer.objective > best + 1e-11 * scale) fail("allocate, " + what + "not the best");
  return 3;
}

}  // namespace

int64_t check_allocate() {
  int64_t count = 0;
  uint32_t seed = 0;
  for (const int constraints : {0, 1, 2, 3})
    for (int kind = 0; kind < 5; ++kind)
      for (const auto& [layers, choices] : {std::pair{1, 1}, {1, 3}, {4, 1}, {2, 4}, {6, 3}, {4, 5}, {9, 2}}) {
        const Case c = make(++seed, layers, choices, constraints, kind);
        count += check(c, 100) + check(c, 1e-9);
      }
  return count;
}

}  // namespace sanitize
