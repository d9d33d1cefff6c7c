// Nodes wait in the order of their bounds. The layer to branch on is the one whose children promise the smallest subtrees.
#include "branch_and_bound.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

namespace quantize::mixed_precision {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
// Over the layers, in a child: most are closed or as good as they get sooner.
constexpr int child_sweeps = 12;

struct Node {
  std::vector<float> x;  // where to begin
  std::vector<double> multipliers;
  std::vector<uint8_t> open;
};

class Tree {
 public:
  Tree(const Problem& problem, const Convex& convex, LocalSearch& search, Deadline& deadline)
      : problem_(problem),
        convex_(convex),
        search_(search),
        deadline_(deadline),
        node_(problem, convex),
        child_(problem, convex),
        guesses_(problem.size()),
        ratios_(problem.size(), 1.),
        learnt_(problem.size(), 1) {}

  Proof grow(const Relaxation& root, double gap) {
    // 256 MiB of nodes; with more, the ones nearest to their end go first.
    const size_t most = (size_t(1) << 28) / (5 * size_t(problem_.size()) + 256);
    int64_t near = 0;
    push(root);
    while (!waiting_.empty() && !deadline_.stop()) {
      if (search_.found() && waiting_.begin()->first >= search_.best_value() - gap * std::abs(search_.best_value())) {
        if (near == 0) near = 2 * nodes_ + 1000;
        if (nodes_ >= near) break;
      }
      const auto place = waiting_.size() > most ? std::prev(waiting_.end()) : waiting_.begin();
      const double bound = place->first;
      const Node node = std::move(place->second);
      waiting_.erase(place);
      if (bound >= cutoff()) continue;
      load(node, bound);
      branch();
    }
    double lower = std::min(unfinished_, cutoff());
    if (!waiting_.empty()) lower = std::min(lower, waiting_.begin()->first);
    return {lower, nodes_};
  }

 private:
  // Less the rounding of bounds. A tie that the preference decides is wider.
  double cutoff() const { return search_.ceiling() - std::max(1e-14, 1e-13 * std::abs(search_.ceiling())); }

  void push(const Relaxation& r) { waiting_.emplace(r.bound, Node{{r.x.begin(), r.x.end()}, r.multipliers, r.open}); }

  void load(const Node& node, double bound) {
    node_.open = node.open;
    std::copy(node.x.begin(), node.x.end(), node_.x.begin());
    node_.multipliers = node.multipliers;
    node_.bound = bound;
    node_.refresh();
    node_.evaluate();
  }

  // What fixing v raises the bound by: its reduced cost and half of what the objective bends on the way there, times what such a guess of
  // this variable came to so far.
  double guess(int v) const {
    const int n = problem_.size(), l = problem_.layer[v], begin = problem_.first[l], end = problem_.first[l + 1];
    double bend = 0;  // (e_v - x_l)' Q (e_v - x_l)
    for (int a = begin; a < end; ++a)
      for (int b = begin; b < end; ++b) bend += ((a == v) - node_.x[a]) * ((b == v) - node_.x[b]) * convex_.matrix[size_t(a) * n + b];
    return std::max(node_.reduced_cost(v) + bend / 2, 0.);
  }

  void learn(int v, double guessed, double came) {
    if (guessed > 0) ratios_[v] += std::min(came / guessed, 10.), ++learnt_[v];
  }

  // The layer whose children promise the smallest subtrees; -1 when all are decided. A child whose bound rises by a share r of the room
  // below the cutoff is taken to have a subtree of exp(-4 r).
  int most_telling(double room) {
    double least = infinity;
    int layer = -1;
    for (int l = 0; l < problem_.layers(); ++l) {
      if (node_.open_in(l) < 2) continue;
      double size = 0;
      for (int v = problem_.first[l]; v < problem_.first[l + 1]; ++v) {
        if (!node_.open[v]) continue;
        guesses_[v] = guess(v);
        size += std::exp(-4 * guesses_[v] * ratios_[v] / learnt_[v] / room);
      }
      if (size < least) least = size, layer = l;
    }
    return layer;
  }

  void branch() {
    const double room = cutoff() - node_.bound;
    const int layer = most_telling(room);
    if (layer < 0) return leaf(node_);
    std::vector<int> choices;
    for (int v = problem_.first[layer]; v < problem_.first[layer + 1]; ++v)
      if (node_.open[v]) choices.push_back(v);
    std::sort(choices.begin(), choices.end(), [&](int v, int w) { return node_.x[v] > node_.x[w]; });
    for (const int v : choices) {
      if (deadline_.stop()) {
        unfinished_ = std::min(unfinished_, node_.bound);
        return;
      }
      ++nodes_;
      child_.copy(node_);
      child_.fix(v);
      const bool closed = child_.tighten(child_sweeps, cutoff(), deadline_);
      learn(v, guesses_[v], closed ? std::max(room, child_.bound - node_.bound) : child_.bound - node_.bound);
      if (closed) continue;
      if (nodes_ % 64 == 1) search_.improve(child_.rounded(), deadline_);
      if (child_.decided())
        leaf(child_);
      else
        push(child_);
    }
  }

  void leaf(const Relaxation& r) {
    const Problem::Assignment chosen = r.rounded();
    if (problem_.feasible(chosen)) search_.improve(chosen, deadline_);
  }

  const Problem& problem_;
  const Convex& convex_;
  LocalSearch& search_;
  Deadline& deadline_;
  Relaxation node_, child_;
  std::multimap<double, Node> waiting_;
  std::vector<double> guesses_, ratios_;  // of each variable; ratios: what guesses came to, summed, beginning with a 1
  std::vector<int> learnt_;
  double unfinished_ = infinity;
  int64_t nodes_ = 0;
};

}  // namespace

Proof branch_and_bound(const Problem& problem, const Convex& convex, const Relaxation& root, LocalSearch& search, double gap,
                       Deadline& deadline) {
  return Tree(problem, convex, search, deadline).grow(root, gap);
}

}  // namespace quantize::mixed_precision
