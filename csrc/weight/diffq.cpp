// diffq_noise, diffq_round, diffq_backward, diffq_bits: CPU and Meta.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "diffq_call.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using std::tuple;
using std::vector;
using Tensors = vector<Tensor>;

// A stretch of one tensor, for one thread.
struct Task {
  size_t tensor;
  int64_t begin, end;
};

constexpr int64_t stretch = 8 * DiffQTraits::piece;  // elements of a task: its tensors stay in a core's own cache
constexpr int64_t cached_bytes = 8 << 20;  // of the weights of a call: when more have been made, the first are out of the cores' caches

template <typename Body>
void run(const vector<Task>& tasks, const Body& body) {
  int64_t elements = 0;
  for (const Task& task : tasks) elements += task.end - task.begin;
  at::parallel_for(0, tasks.size(), elements < stretch ? std::max<int64_t>(tasks.size(), 1) : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(tasks[i]);
  });
}

// Elements of a task: whole units of `size`.
int64_t step_of(int64_t size) { return std::max<int64_t>(1, stretch / size) * size; }

void split(vector<Task>& tasks, size_t tensor, int64_t n, int64_t size) {
  for (int64_t begin = 0, step = step_of(size); begin < n; begin += step) tasks.push_back({tensor, begin, std::min(n, begin + step)});
}

const uint8_t* bytes(const Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }
uint8_t* bytes(Tensor& x) { return static_cast<uint8_t*>(x.mutable_data_ptr()); }

const DiffQKernels& kernels_of(const Tensor& w) { return diffq_kernels(cpu_isa(), check_scalar("diffq", "weights", w.scalar_type())); }

Tensors contiguous(at::TensorList tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

// What a forward makes beside the weights: ranges float32 [rows, 2] and, of training, where their ends lie, int32 [rows, 2].
struct Ranges {
  Tensors ranges, extremes;
};

Ranges empty_ranges(at::TensorList weights, at::IntArrayRef spans) {
  Ranges made;
  for (size_t i = 0; i < weights.size(); ++i) {
    made.ranges.push_back(at::empty({count_of(weights[i].numel(), spans[i]), 2}, weights[i].options().dtype(at::kFloat)));
    made.extremes.push_back(at::empty_like(made.ranges[i], made.ranges[i].options().dtype(at::kInt)));
  }
  return made;
}

// Fills `made` and then calls body(kernels, tensor, weight, begin, end) for all elements. Short rows are still in the cache by then.
template <typename Body>
void over_weights(const vector<DiffQTensor>& tensors, const Tensors& weights, Ranges& made, const Body& body) {
  const auto extents = [&](const Task& task) {
    const DiffQTensor& t = tensors[task.tensor];
    const Tensor& w = weights[task.tensor];
    const auto& kernels = kernels_of(w);
    auto* extreme = made.extremes[task.tensor].mutable_data_ptr<int32_t>();
    for (int64_t begin = task.begin, row = begin / t.span; begin < task.end; begin += t.span, ++row) {
      const DiffQExtent own = kernels.extent(bytes(w) + begin * w.element_size(), std::min(t.span, t.n - begin));
      t.ranges[2 * row] = own.low, t.ranges[2 * row + 1] = own.range;
      extreme[2 * row] = int32_t(begin + own.lowest), extreme[2 * row + 1] = int32_t(begin + own.highest);
    }
  };
  vector<Task> rows, all;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].span > stretch) split(rows, i, tensors[i].n, tensors[i].span);
    split(all, i, tensors[i].n, std::min(tensors[i].span, stretch));
  }
  run(rows, extents);
  run(all, [&](const Task& task) {
    if (tensors[task.tensor].span <= stretch) extents(task);
    body(kernels_of(weights[task.tensor]), tensors[task.tensor], task);
  });
}

vector<DiffQTensor> tensors_of(const char* op, const DiffQLists& lists, const Tensors& weights, Tensors& ranges, Seed seed,
                               const std::optional<Tensor>& quantiles) {
  check_lists(op, lists, weights.size());
  vector<DiffQTensor> tensors;
  for (size_t i = 0; i < weights.size(); ++i)
    tensors.push_back(diffq_tensor(op, lists, i, weights[i], ranges[i].mutable_data_ptr<float>(), seed, quantiles));
  return tensors;
}

// The bits of n elements, from the sum over their groups, of which the last may be short.
float of_elements(double sum, int64_t n, const float* logits, int64_t group_size, BitsBounds bounds, bool rounded) {
  const int64_t groups = count_of(n, group_size), missing = groups * group_size - n;
  const double of_last = diffq_kernels(cpu_isa(), Scalar::f32).bits(logits + groups - 1, 1, bounds, rounded, nullptr, nullptr, 1.f);
  return float(sum * double(group_size) - of_last * double(missing));
}

tuple<Tensors, Tensors, Tensors, Tensor> noise_cpu(at::TensorList weights, at::TensorList logits, const Tensor& seed,
                                                   at::IntArrayRef streams, at::IntArrayRef group_sizes, at::IntArrayRef spans,
                                                   at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits,
                                                   const std::optional<Tensor>& quantiles) {
  const char* op = "diffq_noise";
  const DiffQLists lists{logits, streams, group_sizes, spans, min_bits, max_bits};
  check_lists(op, lists, weights.size());
  const Tensors w = contiguous(weights);
  Ranges made = empty_ranges(w, spans);
  auto tensors = tensors_of(op, lists, w, made.ranges, read_seed(op, seed), quantiles);
  Tensors y;
  int64_t made_bytes = 0;
  for (const Tensor& t : w) y.push_back(at::empty_like(t)), made_bytes += int64_t(t.nbytes());
  for (DiffQTensor& t : tensors) t.past_caches = made_bytes > cached_bytes;
  vector<vector<DiffQBits>> parts;
  for (const DiffQTensor& t : tensors) parts.emplace_back(count_of(t.n, step_of(std::min(t.span, stretch))));
  over_weights(tensors, w, made, [&](const DiffQKernels& kernels, const DiffQTensor& t, const Task& task) {
    parts[task.tensor][task.begin / step_of(std::min(t.span, stretch))] =
        kernels.noise(t, bytes(w[task.tensor]), task.begin, task.end, bytes(y[task.tensor]));
  });
  Tensor bits = at::empty({int64_t(tensors.size()), 2}, at::TensorOptions().dtype(at::kFloat));
  float* totals = bits.mutable_data_ptr<float>();
  for (const DiffQTensor& t : tensors) {
    DiffQBits sums;
    for (const DiffQBits& part : parts[&t - tensors.data()]) sums.learned += part.learned, sums.rounded += part.rounded;
    *totals++ = of_elements(sums.learned, t.n, t.logits, t.group_size, t.bounds, false);
    *totals++ = of_elements(sums.rounded, t.n, t.logits, t.group_size, t.bounds, true);
  }
  return {y, made.ranges, made.extremes, bits};
}

tuple<Tensors, Tensors> round_cpu(at::TensorList weights, at::TensorList logits, at::IntArrayRef group_sizes, at::IntArrayRef spans,
                                  at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits) {
  const char* op = "diffq_round";
  const vector<int64_t> streams(weights.size());
  const DiffQLists lists{logits, streams, group_sizes, spans, min_bits, max_bits};
  check_lists(op, lists, weights.size());
  const Tensors w = contiguous(weights);
  Ranges made = empty_ranges(w, spans);
  const auto tensors = tensors_of(op, lists, w, made.ranges, {}, std::nullopt);
  Tensors y;
  for (const Tensor& t : w) y.push_back(at::empty_like(t));
  over_weights(tensors, w, made, [&](const DiffQKernels& kernels, const DiffQTensor& t, const Task& task) {
    kernels.round(t, bytes(w[task.tensor]), task.begin, task.end, bytes(y[task.tensor]));
  });
  return {y, made.ranges};
}

Tensor group_bits_cpu(const Tensor& input, double min_bits, double max_bits, bool rounded) {
  check_dtype("diffq_group_bits", "logits", input, at::kFloat);
  const Tensor logits = input.contiguous();
  Tensor bits = at::empty_like(logits);
  diffq_kernels(cpu_isa(), Scalar::f32)
      .bits(logits.const_data_ptr<float>(), logits.numel(), bits_bounds("diffq_group_bits", min_bits, max_bits), rounded,
            bits.mutable_data_ptr<float>(), nullptr, 1.f);
  return bits;
}

// Sums of the units of `size` elements that were cut into pieces, in the order of the pieces. cut: [pieces][2], as DiffQSums says.
void join_cut(int64_t n, int64_t size, const vector<float>& cut, float* sums) {
  constexpr int64_t piece = DiffQTraits::piece;
  int64_t before = -1;
  for (int64_t boundary = piece; boundary < n; boundary += piece) {
    const int64_t unit = boundary / size;
    if (boundary % size == 0 || unit == before) continue;
    const int64_t first = unit * size / piece, last = (std::min((unit + 1) * size, n) - 1) / piece;
    float sum = cut[2 * first + 1];
    for (int64_t p = first + 1; p <= last; ++p) sum += cut[2 * p];
    sums[unit] = sum, before = unit;
  }
}

Tensors backward_cpu_(at::TensorList grads, at::TensorList logits, at::TensorList range_list, at::TensorList extremes, const Tensor& seed,
                      at::IntArrayRef streams, at::IntArrayRef group_sizes, at::IntArrayRef spans, at::ArrayRef<double> min_bits,
                      at::ArrayRef<double> max_bits, const std::optional<Tensor>& quantiles) {
  const char* op = "diffq_backward_";
  const DiffQLists lists{logits, streams, group_sizes, spans, min_bits, max_bits};
  check_lists(op, lists, grads.size());
  check_made(op, lists, grads, range_list, extremes);
  const Tensors g = grads.vec();
  Tensors ranges = contiguous(range_list), grad_logits;
  const auto tensors = tensors_of(op, lists, g, ranges, read_seed(op, seed), quantiles);
  vector<vector<float>> row_sums, cut_groups, cut_rows;
  vector<Task> tasks;
  for (size_t i = 0; i < g.size(); ++i) {
    grad_logits.push_back(at::empty_like(logits[i]));
    row_sums.emplace_back(count_of(tensors[i].n, spans[i]));
    for (auto* cut : {&cut_groups, &cut_rows}) cut->emplace_back(2 * count_of(tensors[i].n, DiffQTraits::piece));
    split(tasks, i, tensors[i].n, DiffQTraits::piece);
  }
  run(tasks, [&](const Task& task) {
    const size_t i = task.tensor;
    const auto& kernels = kernels_of(g[i]);
    for (int64_t p = task.begin / DiffQTraits::piece; p * DiffQTraits::piece < task.end; ++p)
      kernels.backward(tensors[i], bytes(g[i]), p,
                       {grad_logits[i].mutable_data_ptr<float>(), row_sums[i].data(), &cut_groups[i][2 * p], &cut_rows[i][2 * p]});
  });
  for (size_t i = 0; i < g.size(); ++i) {
    const int64_t n = tensors[i].n;
    join_cut(n, group_sizes[i], cut_groups[i], grad_logits[i].mutable_data_ptr<float>());
    join_cut(n, spans[i], cut_rows[i], row_sums[i].data());
    const auto* places = extremes[i].const_data_ptr<int32_t>();
    const auto scatter = [&]<typename T>(T) {  // the range is highest - lowest
      T* w = static_cast<T*>(g[i].mutable_data_ptr());
      for (size_t row = 0; row < row_sums[i].size(); ++row) {
        const int32_t lowest = places[2 * row], highest = places[2 * row + 1];
        TORCH_CHECK_VALUE(lowest >= 0 && lowest < n && highest >= 0 && highest < n, op, ": extremes must be places in the weight, 0 to ",
                          n - 1, "; got ", lowest, " and ", highest);
        w[lowest] = round_nearest(to_float(w[lowest]) - row_sums[i][row], T{});
        w[highest] = round_nearest(to_float(w[highest]) + row_sums[i][row], T{});
      }
    };
    const Scalar scalar = check_scalar(op, "grads", g[i].scalar_type());
    scalar == Scalar::f32 ? scatter(F32{}) : scalar == Scalar::f16 ? scatter(F16{}) : scatter(BF16{});
  }
  return grad_logits;
}

tuple<Tensors, Tensors> backward_cpu(at::TensorList grads, at::TensorList logits, at::TensorList ranges, at::TensorList extremes,
                                     const Tensor& seed, at::IntArrayRef streams, at::IntArrayRef group_sizes, at::IntArrayRef spans,
                                     at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits, const std::optional<Tensor>& quantiles) {
  const Tensors changed = cloned(grads);
  return {changed, backward_cpu_(changed, logits, ranges, extremes, seed, streams, group_sizes, spans, min_bits, max_bits, quantiles)};
}

// Weights of all groups of a tensor times their bits; the last group may be short.
Tensor bits_cpu(at::TensorList logits, at::IntArrayRef numels, at::IntArrayRef group_sizes, at::ArrayRef<double> min_bits,
                at::ArrayRef<double> max_bits, bool rounded) {
  const char* op = "diffq_bits";
  check_bits_lists(op, logits, numels, group_sizes, min_bits, max_bits);
  Tensor total = at::empty({int64_t(numels.size())}, at::TensorOptions().dtype(at::kFloat));
  vector<Task> tasks;
  vector<vector<double>> parts(numels.size());
  for (size_t i = 0; i < numels.size(); ++i) {
    split(tasks, i, logits[i].numel(), 1);
    parts[i].resize(count_of(logits[i].numel(), stretch));
  }
  const auto& kernels = diffq_kernels(cpu_isa(), Scalar::f32);
  run(tasks, [&](const Task& task) {
    const size_t i = task.tensor;
    const float* own = logits[i].const_data_ptr<float>();
    parts[i][task.begin / stretch] =
        kernels.bits(own + task.begin, task.end - task.begin, bits_bounds(op, min_bits[i], max_bits[i]), rounded, nullptr, nullptr, 1.f);
  });
  for (size_t i = 0; i < numels.size(); ++i) {
    double sum = 0;
    for (double part : parts[i]) sum += part;
    total.mutable_data_ptr<float>()[i] =
        of_elements(sum, numels[i], logits[i].const_data_ptr<float>(), group_sizes[i], bits_bounds(op, min_bits[i], max_bits[i]), rounded);
  }
  return total;
}

Tensors bits_backward_cpu(const Tensor& grad, at::TensorList logits, at::IntArrayRef numels, at::IntArrayRef group_sizes,
                          at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits) {
  const char* op = "diffq_bits_backward";
  check_bits_backward(op, grad, logits, numels, group_sizes, min_bits, max_bits);
  const Tensor factors = grad.contiguous();
  Tensors result;
  vector<Task> tasks;
  for (size_t i = 0; i < numels.size(); ++i) {
    result.push_back(at::empty_like(logits[i]));
    split(tasks, i, logits[i].numel(), 1);
  }
  run(tasks, [&](const Task& task) {
    const size_t i = task.tensor;
    const int64_t last = logits[i].numel() - 1;
    float* slope = result[i].mutable_data_ptr<float>();
    const float* own = logits[i].const_data_ptr<float>();
    const BitsBounds bounds = bits_bounds(op, min_bits[i], max_bits[i]);
    const auto& kernels = diffq_kernels(cpu_isa(), Scalar::f32);
    const auto run_to = [&](int64_t begin, int64_t end, int64_t weights) {
      const float factor = factors.const_data_ptr<float>()[i] * float(weights);
      kernels.bits(own + begin, end - begin, bounds, false, nullptr, slope + begin, factor);
    };
    run_to(task.begin, std::min(task.end, last), group_sizes[i]);
    if (task.end > last) run_to(last, last + 1, numels[i] - last * group_sizes[i]);
  });
  return result;
}

Tensors like(at::TensorList tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(at::empty_symint(t.sym_sizes(), t.options()));
  return result;
}

// As empty_ranges, of traced shapes.
Ranges traced_ranges(at::TensorList weights, at::IntArrayRef spans) {
  TORCH_CHECK_VALUE(weights.size() == spans.size(), "diffq: lists must have an entry for each of the ", weights.size(), " weights; got ",
                    spans.size());
  Ranges made;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_VALUE(spans[i] >= 1, "diffq: spans must be at least 1; got ", spans[i]);
    const c10::SymInt rows = (weights[i].sym_numel() + (spans[i] - 1)) / spans[i];
    made.ranges.push_back(at::empty_symint({rows, 2}, weights[i].options().dtype(at::kFloat)));
    made.extremes.push_back(at::empty_symint({rows, 2}, weights[i].options().dtype(at::kInt)));
  }
  return made;
}

tuple<Tensors, Tensors, Tensors, Tensor> noise_meta(at::TensorList weights, at::TensorList, const Tensor&, at::IntArrayRef, at::IntArrayRef,
                                                    at::IntArrayRef spans, at::ArrayRef<double>, at::ArrayRef<double>,
                                                    const std::optional<Tensor>&) {
  Ranges made = traced_ranges(weights, spans);
  return {like(weights), made.ranges, made.extremes, at::empty({int64_t(weights.size()), 2}, weights[0].options().dtype(at::kFloat))};
}

tuple<Tensors, Tensors> round_meta(at::TensorList weights, at::TensorList, at::IntArrayRef, at::IntArrayRef spans, at::ArrayRef<double>,
                                   at::ArrayRef<double>) {
  return {like(weights), traced_ranges(weights, spans).ranges};
}

Tensor group_bits_meta(const Tensor& logits, double, double, bool) { return at::empty_symint(logits.sym_sizes(), logits.options()); }

tuple<Tensors, Tensors> backward_meta(at::TensorList grads, at::TensorList logits, at::TensorList, at::TensorList, const Tensor&,
                                      at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::ArrayRef<double>, at::ArrayRef<double>,
                                      const std::optional<Tensor>&) {
  return {like(grads), like(logits)};
}

Tensors backward_meta_(at::TensorList, at::TensorList logits, at::TensorList, at::TensorList, const Tensor&, at::IntArrayRef,
                       at::IntArrayRef, at::IntArrayRef, at::ArrayRef<double>, at::ArrayRef<double>, const std::optional<Tensor>&) {
  return like(logits);
}

Tensor bits_meta(at::TensorList logits, at::IntArrayRef numels, at::IntArrayRef, at::ArrayRef<double>, at::ArrayRef<double>, bool) {
  return at::empty({int64_t(numels.size())}, logits[0].options());
}

Tensors bits_backward_meta(const Tensor&, at::TensorList logits, at::IntArrayRef, at::IntArrayRef, at::ArrayRef<double>,
                           at::ArrayRef<double>) {
  return like(logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("diffq_noise", noise_cpu);
  m.impl("diffq_round", round_cpu);
  m.impl("diffq_backward", backward_cpu);
  m.impl("diffq_backward_", backward_cpu_);
  m.impl("diffq_group_bits", group_bits_cpu);
  m.impl("diffq_bits", bits_cpu);
  m.impl("diffq_bits_backward", bits_backward_cpu);
}
TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("diffq_noise", noise_meta);
  m.impl("diffq_round", round_meta);
  m.impl("diffq_backward", backward_meta);
  m.impl("diffq_backward_", backward_meta_);
  m.impl("diffq_group_bits", group_bits_meta);
  m.impl("diffq_bits", bits_meta);
  m.impl("diffq_bits_backward", bits_backward_meta);
}

}  // namespace quantize::weight
