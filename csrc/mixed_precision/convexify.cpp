// The mixing method's blocks turn by turn, each from the eigenvectors of a small matrix; then enlarged until what they make of the
// objective has a Cholesky factorisation.
#include "convexify.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace quantize::mixed_precision {
namespace {

using Vector = std::vector<double>;

// Small symmetric matrices: a = vectors diag(values) vectors', by Jacobi rotations.
void eigen(int k, Vector& a, Vector& vectors) {
  vectors.assign(size_t(k) * k, 0.);
  for (int i = 0; i < k; ++i) vectors[i * k + i] = 1;
  for (int sweep = 0; sweep < 30; ++sweep) {
    double off = 0, all = 0;
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j) (i == j ? all : off) += a[i * k + j] * a[i * k + j];
    if (off <= 1e-30 * all) return;
    for (int i = 0; i < k; ++i)
      for (int j = i + 1; j < k; ++j) {
        if (a[i * k + j] == 0) continue;
        const double theta = (a[j * k + j] - a[i * k + i]) / (2 * a[i * k + j]);
        const double t = (theta < 0 ? -1 : 1) / (std::abs(theta) + std::hypot(theta, 1.));
        const double c = 1 / std::hypot(t, 1.), s = t * c;
        for (int m = 0; m < k; ++m) {
          const double x = a[m * k + i], y = a[m * k + j];
          a[m * k + i] = c * x - s * y, a[m * k + j] = s * x + c * y;
        }
        for (int m = 0; m < k; ++m) {
          const double x = a[i * k + m], y = a[j * k + m];
          a[i * k + m] = c * x - s * y, a[j * k + m] = s * x + c * y;
        }
        for (int m = 0; m < k; ++m) {
          const double x = vectors[m * k + i], y = vectors[m * k + j];
          vectors[m * k + i] = c * x - s * y, vectors[m * k + j] = s * x + c * y;
        }
      }
  }
}

// diag(p) - p p' = T T' with T = diag(sqrt p) N, N an orthonormal basis of what is orthogonal to sqrt p. With S = diag(1 / sqrt p) N,
// S' T = 1: a matrix H of the reduced space is S H S' in the layer's.
struct Block {
  int begin, size, reduced;  // reduced: the place of its size - 1 coordinates
  Vector to, from;           // T, S: [size, size - 1]
};

Block make_block(const Problem& problem, const Vector& x, int l, int reduced) {
  // Mixed with equal shares, so that no choice is beyond reach further down the tree.
  constexpr double even = 0.05;
  const int begin = problem.first[l], k = problem.first[l + 1] - begin;
  Block block{begin, k, reduced, Vector(size_t(k) * (k - 1)), Vector(size_t(k) * (k - 1))};
  Vector root(k), mirror(k);
  for (int i = 0; i < k; ++i) root[i] = std::sqrt((1 - even) * x[begin + i] + even / k);
  const double length = std::sqrt(std::inner_product(root.begin(), root.end(), root.begin(), 0.));
  for (double& r : root) r /= length;
  mirror = root;  // the reflection that takes the last unit vector to root takes the others to N
  mirror[k - 1] -= 1;
  const double norm = std::inner_product(mirror.begin(), mirror.end(), mirror.begin(), 0.);
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k - 1; ++j) {
      const double entry = (i == j) - (norm > 0 ? 2 * mirror[i] * mirror[j] / norm : 0);
      block.to[i * (k - 1) + j] = root[i] * entry;
      block.from[i * (k - 1) + j] = entry / root[i];
    }
  return block;
}

// T' cross T
Vector reduce(const Problem& problem, const std::vector<Block>& blocks, int d) {
  const int n = problem.size();
  Vector half(size_t(n) * d), all(size_t(d) * d);
  for (int v = 0; v < n; ++v)
    for (const Block& b : blocks)
      for (int i = 0; i < b.size; ++i)
        for (int j = 0; j < b.size - 1; ++j)
          half[size_t(v) * d + b.reduced + j] += problem.cross_row(v)[b.begin + i] * b.to[i * (b.size - 1) + j];
  for (const Block& b : blocks)
    for (int i = 0; i < b.size; ++i)
      for (int j = 0; j < b.size - 1; ++j) {
        const double* from = &half[size_t(b.begin + i) * d];
        double *to = &all[size_t(b.reduced + j) * d], weight = b.to[i * (b.size - 1) + j];
        for (int m = 0; m < d; ++m) to[m] += weight * from[m];
      }
  return all;
}

// The mixing method. vectors: [d, rank]; a block's are orthonormal. Returns the blocks H with cross + H >= 0, nearly.
class Mixing {
 public:
  Mixing(const Vector& matrix, const std::vector<Block>& blocks, int d, int rank)
      : matrix_(matrix), blocks_(blocks), d_(d), rank_(rank), vectors_(size_t(d) * rank) {
    std::mt19937_64 random(1);
    for (double& v : vectors_) v = double(random() >> 11) * 0x1p-52 - 1;
    for (const Block& b : blocks_) h_.emplace_back(size_t(b.size - 1) * (b.size - 1));
  }

  // The sum of the blocks' traces: the less it moves, the nearer the end.
  double sweep(Deadline& deadline) {
    double trace = 0;
    for (size_t l = 0; l < blocks_.size() && !deadline.stop(); ++l) trace += update(blocks_[l], h_[l]);
    return trace;
  }

  const std::vector<Vector>& blocks() const { return h_; }

 private:
  double update(const Block& b, Vector& h) {
    const int k = b.size - 1;
    pull_.assign(size_t(k) * rank_, 0.);
    for (int i = 0; i < k; ++i) {
      const double* row = &matrix_[size_t(b.reduced + i) * d_];
      double* pull = &pull_[size_t(i) * rank_];
      for (int j = 0; j < d_; ++j) {
        if (row[j] == 0) continue;
        const double *v = &vectors_[size_t(j) * rank_], weight = row[j];
        for (int r = 0; r < rank_; ++r) pull[r] += weight * v[r];
      }
    }
    gram_.assign(size_t(k) * k, 0.);
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j)
        for (int r = 0; r < rank_; ++r) gram_[i * k + j] += pull_[i * rank_ + r] * pull_[j * rank_ + r];
    eigen(k, gram_, axes_);
    double trace = 0, largest = 0;
    for (int i = 0; i < k; ++i) largest = std::max(largest, gram_[i * k + i]);
    h.assign(size_t(k) * k, 0.);
    inverse_.assign(size_t(k) * k, 0.);
    for (int m = 0; m < k; ++m) {
      const double root = std::sqrt(std::max(gram_[m * k + m], 0.));
      trace += root;
      const double inverse = gram_[m * k + m] > 1e-24 * largest ? 1 / root : 0;
      for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
          const double outer = axes_[i * k + m] * axes_[j * k + m];
          h[i * k + j] += root * outer, inverse_[i * k + j] += inverse * outer;
        }
    }
    if (largest > 0)
      for (int i = 0; i < k; ++i) {
        double* v = &vectors_[size_t(b.reduced + i) * rank_];
        std::fill(v, v + rank_, 0.);
        for (int j = 0; j < k; ++j)
          for (int r = 0; r < rank_; ++r) v[r] -= inverse_[i * k + j] * pull_[j * rank_ + r];
      }
    return trace;
  }

  const Vector& matrix_;
  const std::vector<Block>& blocks_;
  int d_, rank_;
  Vector vectors_, pull_, gram_, axes_, inverse_;
  std::vector<Vector> h_;
};

// Whether a (its lower half; overwritten) is positive definite.
bool cholesky(Vector& a, int d, Deadline& deadline) {
  for (int i = 0; i < d; ++i) {
    double* row = &a[size_t(i) * d];
    for (int j = 0; j <= i; ++j) {
      const double* other = &a[size_t(j) * d];
      double part[4] = {};
      int m = 0;
      for (; m + 4 <= j; m += 4)
        for (int p = 0; p < 4; ++p) part[p] += row[m + p] * other[m + p];
      double sum = row[j] - ((part[0] + part[1]) + (part[2] + part[3]));
      for (; m < j; ++m) sum -= row[m] * other[m];
      if (i == j) {
        if (!(sum > 0)) return false;
        row[i] = std::sqrt(sum);
      } else {
        row[j] = sum / other[j];
      }
    }
    if (deadline.stop()) return false;
  }
  return true;
}

}  // namespace

Convex convexify(const Problem& problem, const Vector& x, int sweeps, Deadline& deadline) {
  const int n = problem.size();
  std::vector<Block> blocks;
  int d = 0, widths = 0;
  for (int l = 0; l < problem.layers(); ++l)
    if (const int k = problem.first[l + 1] - problem.first[l]; k > 1) {
      blocks.push_back(make_block(problem, x, l, d));
      d += k - 1, widths += k * (k - 1) / 2;
    }
  const Vector reduced = reduce(problem, blocks, d);
  int widest = 1;
  for (const Block& b : blocks) widest = std::max(widest, b.size);
  Mixing mixing(reduced, blocks, d, std::max(widest, std::min(32, int(std::sqrt(2. * widths)) + 1)));
  double trace = 0;
  for (int s = 0; s < sweeps && !deadline.stop(); ++s) {
    const double now = mixing.sweep(deadline);
    if (s > 10 && std::abs(now - trace) <= 1e-7 * now) break;
    trace = now;
  }
  // What the sweeps left undone is made up for by a larger H.
  const double even = 1e-3 * trace / std::max(d, 1) + 1e-14;
  auto positive = [&](double more) {
    Vector a = reduced;
    for (size_t l = 0; l < blocks.size(); ++l) {
      const int k = blocks[l].size - 1, at = blocks[l].reduced;
      for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) a[size_t(at + i) * d + at + j] += (1 + more) * mixing.blocks()[l][i * k + j] + (i == j) * more * even;
    }
    return cholesky(a, d, deadline);
  };
  double more = 1e-6, enough = 0;
  while (!positive(more)) {
    if (deadline.stop()) return {};
    enough = more, more *= 3;
  }
  for (int step = 0; step < 3 && more > 1e-4; ++step)
    if (const double middle = (enough + more) / 2; positive(middle))
      more = middle;
    else
      enough = middle;
  if (deadline.stop()) return {};

  Convex convex{problem.cross, problem.linear};
  for (size_t l = 0; l < blocks.size(); ++l) {
    const Block& b = blocks[l];
    const int k = b.size - 1;
    for (int v = 0; v < b.size; ++v)
      for (int w = 0; w < b.size; ++w) {
        double sum = 0;
        for (int i = 0; i < k; ++i)
          for (int j = 0; j < k; ++j)
            sum += b.from[v * k + i] * ((1 + more) * mixing.blocks()[l][i * k + j] + (i == j) * more * even) * b.from[w * k + j];
        convex.matrix[size_t(b.begin + v) * n + b.begin + w] = sum;
        if (v == w) convex.linear[b.begin + v] -= sum;
      }
  }
  return convex;
}

}  // namespace quantize::mixed_precision
