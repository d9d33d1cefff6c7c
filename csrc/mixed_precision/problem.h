// One choice per layer: minimise sum_vw cross[v][w] x_v x_w + sum_v linear[v] x_v over one variable v of each layer, subject to
// sum_v costs[q][v] x_v <= limits[q] for each constraint q. A variable is one choice of one layer; a layer's variables are neighbours.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace quantize::mixed_precision {

struct Problem {
  std::vector<int> first;                  // layer l owns the variables first[l] .. first[l + 1] - 1
  std::vector<int> layer;                  // of each variable
  std::vector<double> cross;               // [size, size], symmetric, zero within a layer
  std::vector<double> linear;              // [size]
  std::vector<std::vector<double>> costs;  // [constraints][size]; the cheapest variable of each layer costs nothing
  std::vector<double> limits;              // [constraints]

  int layers() const { return int(first.size()) - 1; }
  int size() const { return int(layer.size()); }
  int constraints() const { return int(limits.size()); }
  const double* cross_row(int v) const { return &cross[size_t(v) * size_t(size())]; }

  // A variable of each layer.
  using Assignment = std::vector<int>;

  double objective(const Assignment& chosen) const {
    double total = 0;
    for (const int v : chosen) {
      double row = linear[v];
      for (const int w : chosen) row += cross_row(v)[w];
      total += row;
    }
    return total;
  }

  bool feasible(const Assignment& chosen) const {
    for (int q = 0; q < constraints(); ++q) {
      double sum = 0;
      for (const int v : chosen) sum += costs[q][v];
      if (!(sum <= limits[q])) return false;
    }
    return true;
  }
};

// Says when to stop: at a time, or when someone asks for it. Once it has said so it says nothing else.
class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  Deadline(double seconds, std::function<bool()> interrupted)
      : begin_(Clock::now()), seconds_(seconds), interrupted_(std::move(interrupted)) {}

  double seconds() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

  bool stop() {
    if (stopped_) return true;
    const double now = seconds();
    if (now >= seconds_) return stopped_ = true;
    if (now < asked_ + 0.02) return false;
    asked_ = now;
    if (interrupted_ && interrupted_()) stopped_ = was_interrupted_ = true;
    return stopped_;
  }

  bool was_interrupted() const { return was_interrupted_; }

 private:
  Clock::time_point begin_;
  double seconds_, asked_ = 0;
  std::function<bool()> interrupted_;
  bool stopped_ = false, was_interrupted_ = false;
};

}  // namespace quantize::mixed_precision
