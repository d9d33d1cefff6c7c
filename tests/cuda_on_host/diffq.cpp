// diffq: the CUDA kernels return the CPU's bits.
#include "weight/diffq.cuh"
#include "weight/diffq_run.h"

#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::weight;

struct Shape {
  int64_t n, group_size, span;
};

// All that a tensor needs, on one side.
template <typename T>
struct Side {
  explicit Side(const Shape& s)
      : groups((s.n + s.group_size - 1) / s.group_size),
        row_count((s.n + s.span - 1) / s.span),
        pieces((s.n + DiffQTraits::piece - 1) / DiffQTraits::piece),
        y(s.n, 0),
        rounded(s.n, 0),
        grad(s.n, 0),
        ranges(2 * row_count, 0),
        grad_logits(groups, 0),
        rows(row_count, 0),
        cut_groups(2 * pieces, 0),
        cut_rows(2 * pieces, 0),
        extremes(2 * row_count, 0),
        bits(2, 0),
        piece_bits(2 * pieces, 0),
        parts(row_count * (std::min(s.n, s.span) / DiffQDeviceTraits::part + 1), 0) {}

  int64_t groups, row_count, pieces;
  Buffer<T> y, rounded, grad;
  Buffer<float> ranges, grad_logits, rows, cut_groups, cut_rows;
  Buffer<int32_t> extremes;
  Buffer<float> bits, piece_bits;
  Buffer<DiffQRangePart> parts;
};

// As diffq.cpp's join_cut.
void join(int64_t n, int64_t size, const float* cut, float* sums) {
  for (int64_t boundary = DiffQTraits::piece; boundary < n; boundary += DiffQTraits::piece) {
    const int64_t unit = boundary / size, first = unit * size / DiffQTraits::piece, end = std::min((unit + 1) * size, n);
    if (boundary % size == 0) continue;
    float sum = cut[2 * first + 1];
    for (int64_t p = first + 1; p * DiffQTraits::piece < end; ++p) sum += cut[2 * p];
    sums[unit] = sum;
  }
}

template <typename T>
void on_cpu(DiffQTensor t, const T* w, Side<T>& side) {
  t.ranges = side.ranges.data();
  for (int64_t row = 0; row < side.row_count; ++row) {
    const DiffQExtent own = find_extent<T>(w + row * t.span, std::min(t.span, t.n - row * t.span));
    side.ranges.data()[2 * row] = own.low, side.ranges.data()[2 * row + 1] = own.range;
    side.extremes.data()[2 * row] = int32_t(row * t.span) + own.lowest,
                             side.extremes.data()[2 * row + 1] = int32_t(row * t.span) + own.highest;
  }
  const DiffQBits sums = add_noise<T>(t, w, 0, t.n, side.y.data());
  const double missing = double(side.groups * t.group_size - t.n);
  for (bool rounded : {false, true}) {
    const double last = find_bits(t.logits + side.groups - 1, 1, t.bounds, rounded, nullptr, nullptr, 1.f);
    side.bits.data()[rounded] = float((rounded ? sums.rounded : sums.learned) * double(t.group_size) - last * missing);
  }
  round_to_grid<T>(t, w, 0, t.n, side.rounded.data());
  for (int64_t p = 0; p < side.pieces; ++p)
    backward_piece<T>(t, side.grad.data(), p,
                      {side.grad_logits.data(), side.rows.data(), side.cut_groups.data() + 2 * p, side.cut_rows.data() + 2 * p});
  join(t.n, t.group_size, side.cut_groups.data(), side.grad_logits.data());
  join(t.n, t.span, side.cut_rows.data(), side.rows.data());
  for (int64_t row = 0; row < side.row_count; ++row) {
    const int32_t* place = side.extremes.data() + 2 * row;
    T* g = side.grad.data();
    g[place[0]] = round_nearest(to_float(g[place[0]]) - side.rows.data()[row], T{});
    g[place[1]] = round_nearest(to_float(g[place[1]]) + side.rows.data()[row], T{});
  }
}

template <typename T>
std::vector<T> values(const Buffer<T>& buffer) {
  return {buffer.data(), buffer.data() + buffer.bytes() / sizeof(T)};
}

// Bit for bit, but any NaN is as good as another, and either zero: the sum of a group that lies in one register starts from no zero.
void expect_same_floats(const Buffer<float>& got, const Buffer<float>& want, const std::string& what) {
  const size_t n = want.bytes() / sizeof(float);
  for (size_t i = 0; i < n; ++i)
    if (got.data()[i] != want.data()[i] && !(std::isnan(got.data()[i]) && std::isnan(want.data()[i])))
      fail(what + ": " + std::to_string(i) + " of " + std::to_string(n) + " is " + std::to_string(got.data()[i]) + ", expected " +
           std::to_string(want.data()[i]));
}

void expect_near(const Buffer<float>& got, const Buffer<float>& want, const std::string& what) {
  for (size_t i = 0; i < want.bytes() / sizeof(float); ++i)
    if (std::abs(got.data()[i] - want.data()[i]) > 1e-6f * want.data()[i])
      fail(what + ": " + std::to_string(got.data()[i]) + ", expected " + std::to_string(want.data()[i]));
}

// All shapes in one launch.
template <typename T>
int64_t check(const std::vector<Shape>& shapes, Pattern pattern, const float* quantiles) {
  constexpr BitsBounds bounds[] = {{2.f, 13.f, 2.f, 15.f}, {1.f, 15.f, 1.f, 16.f}, {2.5f, 1.75f, 3.f, 4.f}};
  std::vector<std::unique_ptr<Side<T>>> device, host;
  std::vector<std::unique_ptr<Buffer<T>>> weights;
  std::vector<std::unique_ptr<Buffer<float>>> logits;
  std::vector<DiffQDeviceTensor> noise, round, gradients;
  for (const Shape& s : shapes) {
    const int i = int(noise.size());
    device.push_back(std::make_unique<Side<T>>(s)), host.push_back(std::make_unique<Side<T>>(s));
    weights.push_back(std::make_unique<Buffer<T>>(s.n, 0)), logits.push_back(std::make_unique<Buffer<float>>(device[i]->groups, 0));
    fill(*weights[i], pattern);
    Side<T>& own = *device[i];
    for (int64_t j = 0; j < own.groups; ++j)
      logits[i]->data()[j] = j % 19 == 7 ? std::numeric_limits<float>::quiet_NaN() : pattern_value(Pattern::noise, size_t(j)) * 4.f;
    fill(own.grad, Pattern::noise), fill(host[i]->grad, Pattern::noise);
    const DiffQTensor t{s.n,         s.group_size, s.span, logits[i]->data(), own.ranges.data(), bounds[i % 3], {0x123456789abcdefull, 77},
                        uint32_t(i), quantiles};
    noise.push_back({t, weights[i]->data(), own.y.data(), own.extremes.data(), nullptr, nullptr, nullptr, nullptr, own.bits.data(),
                     own.piece_bits.data(), own.parts.data()});
    round.push_back({t, weights[i]->data(), own.rounded.data(), own.extremes.data()});
    round.back().parts = own.parts.data();
    gradients.push_back({t, own.grad.data(), own.grad.data(), own.extremes.data(), own.grad_logits.data(), own.rows.data(),
                         own.cut_groups.data(), own.cut_rows.data()});
    on_cpu<T>(t, weights[i]->data(), *host[i]);
  }
  simt::Launcher launch(1);
  launch_diffq_noise<T>(noise, launch);
  launch_diffq_round<T>(round, launch);
  launch_diffq_backward<T>(gradients, launch);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Shape& s = shapes[i];
    const std::string what = "diffq: " + std::to_string(s.n) + " in groups of " + std::to_string(s.group_size) + ", ranges of " +
                             std::to_string(s.span) + ", pattern " + std::to_string(int(pattern));
    const Side<T>&got = *device[i], &want = *host[i];
    expect_same_floats(got.ranges, want.ranges, what + ", ranges");
    expect_same(got.extremes.data(), values(want.extremes), what + ", extremes");
    expect_same_values(got.y.data(), values(want.y), what + ", noise");
    expect_near(got.bits, want.bits, what + ", bits");
    expect_same_values(got.rounded.data(), values(want.rounded), what + ", grid");
    expect_same_floats(got.grad_logits, want.grad_logits, what + ", logits");
    expect_same_floats(got.rows, want.rows, what + ", ranges' gradient");
    expect_same_values(got.grad.data(), values(want.grad), what + ", gradient");
  }
  return int64_t(8 * shapes.size());
}

int64_t check_bits() {
  constexpr int64_t n = 300;
  const Buffer<float> logits(n, 0), got(n, 0), want(n, 0), slope(n, 0), got_slope(n, 0);
  for (int64_t i = 0; i < n; ++i) logits.data()[i] = pattern_value(Pattern::poisoned, size_t(i)) * 4.f;
  const BitsBounds bounds{2.f, 13.f, 2.f, 15.f};
  simt::Launcher launch(1);
  for (bool rounded : {false, true}) {
    find_bits(logits.data(), n, bounds, rounded, want.data(), slope.data(), 1.f);
    launch(diffq_find_bits, dim3(2), DiffQDeviceTraits::threads, static_cast<const float*>(logits.data()), n, bounds, rounded, got.data());
    expect_same_floats(got, want, "diffq's bits");
  }
  const float factor = 0.5f;
  launch(diffq_bits_gradients, dim3(2), DiffQDeviceTraits::threads, static_cast<const float*>(logits.data()), n, bounds, &factor, 8.f, 3.f,
         got_slope.data());
  for (int64_t i = 0; i < n; ++i) slope.data()[i] *= factor * (i + 1 < n ? 8.f : 3.f);
  expect_same_floats(got_slope, slope, "diffq's bits, gradient");
  return 3;
}

template <typename T>
int64_t check_all(const std::vector<Pattern>& patterns) {
  // They straddle teams, blocks of noise and pieces; more of them than a launch has room for.
  std::vector<Shape> shapes = {{1, 1, 1},       {7, 3, 7},       {27, 8, 9},         {129, 1, 43},      {257, 17, 257},  {300, 8, 8},
                               {2049, 8, 2049}, {2049, 64, 683}, {4500, 4500, 2250}, {4500, 100, 4500}, {4200, 700, 700}};
  const int64_t part = DiffQDeviceTraits::part;  // rows of several, and a last row of fewer
  for (const Shape& s : {Shape{part + 1, 8, part + 1}, Shape{2 * part, 8, part}, Shape{5 * part - 7, 64, 3 * part - 64}})
    shapes.push_back(s);
  for (int64_t n = 2; n < 14; ++n) shapes.push_back({n, 4, n});
  std::vector<float> quantiles(65536);
  for (int i = 0; i < 65536; ++i) quantiles[i] = (float(i) - 32767.5f) * 2e-5f;
  int64_t count = 0;
  for (Pattern pattern : patterns) count += check<T>(shapes, pattern, pattern == Pattern::ramp ? quantiles.data() : nullptr);
  return count;
}

}  // namespace

int64_t check_diffq() {
  return check_all<F32>({Pattern::noise, Pattern::constant, Pattern::poisoned, Pattern::ramp}) + check_all<BF16>({Pattern::noise}) +
         check_all<F16>({Pattern::noise}) + check_bits();
}

}  // namespace cuda_on_host
