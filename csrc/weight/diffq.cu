// diffq_noise, diffq_round, diffq_backward and diffq_bits on CUDA. Build: setup.py. Specification: diffq.h; arguments: diffq_call.h.
#include "diffq.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../core/launch.h"
#include "diffq_call.h"

namespace quantize::weight {
namespace {

using at::Tensor;
using std::tuple;
using std::vector;
using Tensors = vector<Tensor>;

// The tensors of a call by element type: a launch has one.
struct Call {
  std::array<vector<DiffQDeviceTensor>, 3> by_type;
  Tensors kept;  // what the pointers point to

  template <typename T>
  T* keep(Tensor tensor) {
    kept.push_back(tensor);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
};

Tensor floats(int64_t count, const Tensor& like) { return at::empty({count}, like.options().dtype(at::kFloat)); }

// Of all tensors: y, ranges, extremes.
struct Made {
  Tensors y, ranges, extremes;
};

DiffQDeviceTensor begin(const char* op, Call& call, Made& made, const DiffQLists& lists, size_t i, const Tensor& weight, Seed seed,
                        const std::optional<Tensor>& quantiles) {
  check_same_device(op, "weights", weight, lists.logits[i]);
  const Tensor w = weight.contiguous();
  made.y.push_back(at::empty_like(w));
  made.ranges.push_back(at::empty({count_of(w.numel(), std::max<int64_t>(1, lists.spans[i])), 2}, w.options().dtype(at::kFloat)));
  made.extremes.push_back(at::empty_like(made.ranges[i], made.ranges[i].options().dtype(at::kInt)));
  DiffQDeviceTensor own{diffq_tensor(op, lists, i, w, made.ranges[i].mutable_data_ptr<float>(), seed, quantiles)};
  own.source = call.keep<void>(w), own.target = made.y[i].mutable_data_ptr(), own.extremes = made.extremes[i].mutable_data_ptr<int32_t>();
  if (const int64_t parts = parts_of_row(own.t); parts > 1)
    own.parts = reinterpret_cast<DiffQRangePart*>(
        call.keep<float>(floats(rows_of(own.t) * parts * int64_t(sizeof(DiffQRangePart) / sizeof(float)), w)));
  return own;
}

// The first tensor, whose device the others must be on, which is checked one by one.
const Tensor& on_gpu(const char* op, const char* argument, at::TensorList tensors) {
  TORCH_CHECK_VALUE(tensors[0].is_cuda(), op, ": ", argument, " must all be on one GPU; got one on ", tensors[0].device());
  return tensors[0];
}

tuple<Tensors, Tensors, Tensors, Tensor> noise_cuda(at::TensorList weights, at::TensorList logits, const Tensor& seed,
                                                    at::IntArrayRef streams, at::IntArrayRef group_sizes, at::IntArrayRef spans,
                                                    at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits,
                                                    const std::optional<Tensor>& quantiles) {
  const char* op = "diffq_noise";
  const DiffQLists lists{logits, streams, group_sizes, spans, min_bits, max_bits};
  check_lists(op, lists, weights.size());
  Launcher launch(on_gpu(op, "weights", weights));
  Call call;
  Made made;
  Tensor bits = floats(2 * int64_t(weights.size()), weights[0]).view({-1, 2});
  for (size_t i = 0; i < weights.size(); ++i) {
    DiffQDeviceTensor own = begin(op, call, made, lists, i, weights[i], read_seed(op, seed), quantiles);
    own.bits = bits.mutable_data_ptr<float>() + 2 * i;
    own.piece_bits = call.keep<float>(floats(2 * pieces_of(own.t), weights[i]));
    call.by_type[int(check_scalar(op, "weights", weights[i].scalar_type()))].push_back(own);
  }
  for (int type = 0; type < 3; ++type) with_type(Scalar(type), [&]<typename T>(T) { launch_diffq_noise<T>(call.by_type[type], launch); });
  return {made.y, made.ranges, made.extremes, bits};
}

tuple<Tensors, Tensors> round_cuda(at::TensorList weights, at::TensorList logits, at::IntArrayRef group_sizes, at::IntArrayRef spans,
                                   at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits) {
  const char* op = "diffq_round";
  const vector<int64_t> streams(weights.size());
  const DiffQLists lists{logits, streams, group_sizes, spans, min_bits, max_bits};
  check_lists(op, lists, weights.size());
  Launcher launch(on_gpu(op, "weights", weights));
  Call call;
  Made made;
  for (size_t i = 0; i < weights.size(); ++i)
    call.by_type[int(check_scalar(op, "weights", weights[i].scalar_type()))].push_back(
        begin(op, call, made, lists, i, weights[i], {}, std::nullopt));
  for (int type = 0; type < 3; ++type) with_type(Scalar(type), [&]<typename T>(T) { launch_diffq_round<T>(call.by_type[type], launch); });
  return {made.y, made.ranges};
}

Tensors backward_cuda_(at::TensorList grads, at::TensorList logits, at::TensorList ranges, at::TensorList extremes, const Tensor& seed,
                       at::IntArrayRef streams, at::IntArrayRef group_sizes, at::IntArrayRef spans, at::ArrayRef<double> min_bits,
                       at::ArrayRef<double> max_bits, const std::optional<Tensor>& quantiles) {
  const char* op = "diffq_backward_";
  const DiffQLists lists{logits, streams, group_sizes, spans, min_bits, max_bits};
  check_lists(op, lists, grads.size());
  check_made(op, lists, grads, ranges, extremes);
  Launcher launch(on_gpu(op, "grads", grads));
  Call call;
  Tensors grad_logits;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &g = grads[i], range = ranges[i].contiguous();
    grad_logits.push_back(at::empty_like(logits[i]));
    DiffQDeviceTensor own{diffq_tensor(op, lists, i, g, call.keep<float>(range), read_seed(op, seed), quantiles)};
    own.source = own.target = g.mutable_data_ptr();
    own.extremes = call.keep<int32_t>(extremes[i]), own.logits = grad_logits[i].mutable_data_ptr<float>();
    own.rows = call.keep<float>(floats(rows_of(own.t), g));
    own.cut_groups = call.keep<float>(floats(2 * pieces_of(own.t), g));
    own.cut_rows = call.keep<float>(floats(2 * pieces_of(own.t), g));
    call.by_type[int(check_scalar(op, "grads", g.scalar_type()))].push_back(own);
  }
  for (int type = 0; type < 3; ++type)
    with_type(Scalar(type), [&]<typename T>(T) { launch_diffq_backward<T>(call.by_type[type], launch); });
  return grad_logits;
}

tuple<Tensors, Tensors> backward_cuda(at::TensorList grads, at::TensorList logits, at::TensorList ranges, at::TensorList extremes,
                                      const Tensor& seed, at::IntArrayRef streams, at::IntArrayRef group_sizes, at::IntArrayRef spans,
                                      at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits,
                                      const std::optional<Tensor>& quantiles) {
  const Tensors changed = cloned(grads);
  return {changed, backward_cuda_(changed, logits, ranges, extremes, seed, streams, group_sizes, spans, min_bits, max_bits, quantiles)};
}

Tensor group_bits_cuda(const Tensor& input, double min_bits, double max_bits, bool rounded) {
  check_dtype("diffq_group_bits", "logits", input, at::kFloat);
  Launcher launch(input);
  const Tensor logits = input.contiguous();
  Tensor bits = at::empty_like(logits);
  if (logits.numel() == 0) return bits;
  const auto grid = dim3(unsigned(grid_size(launch.processors(), 8, logits.numel(), DiffQDeviceTraits::threads)));
  launch(diffq_find_bits, grid, DiffQDeviceTraits::threads, logits.const_data_ptr<float>(), logits.numel(),
         bits_bounds("diffq_group_bits", min_bits, max_bits), rounded, bits.mutable_data_ptr<float>());
  return bits;
}

// A launch of ATen's sums for each tensor: few numbers, and every one of them on the device.
Tensor bits_cuda(at::TensorList logits, at::IntArrayRef numels, at::IntArrayRef group_sizes, at::ArrayRef<double> min_bits,
                 at::ArrayRef<double> max_bits, bool rounded) {
  const char* op = "diffq_bits";
  check_bits_lists(op, logits, numels, group_sizes, min_bits, max_bits);
  Tensors totals;
  for (size_t i = 0; i < numels.size(); ++i) {
    const Tensor bits = group_bits_cuda(logits[i], min_bits[i], max_bits[i], rounded);
    const int64_t missing = bits.numel() * group_sizes[i] - numels[i];
    totals.push_back(bits.sum(at::kDouble).mul(group_sizes[i]).sub(bits[bits.numel() - 1], double(missing)).to(at::kFloat));
  }
  return at::stack(totals);
}

Tensors bits_backward_cuda(const Tensor& grad, at::TensorList logits, at::IntArrayRef numels, at::IntArrayRef group_sizes,
                           at::ArrayRef<double> min_bits, at::ArrayRef<double> max_bits) {
  const char* op = "diffq_bits_backward";
  check_bits_backward(op, grad, logits, numels, group_sizes, min_bits, max_bits);
  Launcher launch(grad);
  const Tensor factors = grad.contiguous();
  Tensors result;
  for (size_t i = 0; i < numels.size(); ++i) {
    result.push_back(at::empty_like(logits[i]));
    const int64_t n = logits[i].numel();
    const auto grid = dim3(unsigned(grid_size(launch.processors(), 8, n, DiffQDeviceTraits::threads)));
    launch(diffq_bits_gradients, grid, DiffQDeviceTraits::threads, logits[i].const_data_ptr<float>(), n,
           bits_bounds(op, min_bits[i], max_bits[i]), factors.const_data_ptr<float>() + i, float(group_sizes[i]),
           float(numels[i] - (n - 1) * group_sizes[i]), result[i].mutable_data_ptr<float>());
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(quantize, CUDA, m) {
  m.impl("diffq_noise", noise_cuda);
  m.impl("diffq_round", round_cuda);
  m.impl("diffq_backward", backward_cuda);
  m.impl("diffq_backward_", backward_cuda_);
  m.impl("diffq_group_bits", group_bits_cuda);
  m.impl("diffq_bits", bits_cuda);
  m.impl("diffq_bits_backward", bits_backward_cuda);
}

}  // namespace quantize::weight
