// Every op of the library, in one list. Backends register themselves with TORCH_LIBRARY_IMPL beside their kernels.
#include <torch/library.h>

TORCH_LIBRARY(quantize, m) {
  // ---- activation: kernels, one CPU, one CUDA and one Meta implementation each.
  //
  // Packs x in groups (csrc/activation/group_format.h). group_size: elements; 0: one group a sample; -1: one group.
  // seed: int64 CPU tensor (seed, offset). codes: uint8, 1-D. ranges: int16 [groups, 2].
  m.def("group_quantize(Tensor x, int bits, int group_size, Tensor seed) -> (Tensor codes, Tensor ranges)");
  // The same with bits of its own for each sample (uint8 [N], on x's device), which add up to at most bit_budget.
  m.def("group_quantize_mixed(Tensor x, Tensor sample_bits, int bit_budget, int group_size, Tensor seed) -> (Tensor codes, Tensor ranges)");
  // The inverse of both (sample_bits given: of the second).
  m.def(
      "group_dequantize(Tensor codes, Tensor ranges, Tensor? sample_bits, int bits, int group_size, SymInt[] size, SymInt[] stride, "
      "ScalarType dtype, Tensor seed) -> Tensor");
  // The exact variance sum_i scale^2 p(1-p) of packing each sample at 1, 2, 4 and 8 bits: float32 [N, 4].
  m.def("group_variance(Tensor x, int group_size) -> Tensor");
  // Bits in {1, 2, 4, 8} a sample, at most max_bits, that add up to at most bit_budget and make the sum of variances small: uint8 [N].
  m.def("allocate_bits(Tensor variance, int bit_budget, int max_bits) -> Tensor");
  // What allocate_bits leaves of `cost` (float32 [N, 4]) at each average number of bits, sharing by `variance`: float32 [averages]; 0 for
  // averages beyond max_bits.
  m.def("allocation_curve(Tensor variance, Tensor cost, float[] averages, int max_bits) -> Tensor");
  // x between `low` and `high` (NaN: no such end), or below `low` negative_slope * x unless that is 0; the mask's bit is set where the
  // derivative is 1. Memory order.
  m.def("clip_mask(Tensor x, float low, float high, float negative_slope) -> (Tensor y, Tensor mask)");
  m.def("clip_mask_(Tensor(a!) x, float low, float high, float negative_slope) -> Tensor");
  // Booleans to bits and back to factors: grad * (bit ? on : off), in memory order.
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("apply_mask(Tensor grad, Tensor mask, float on, float off) -> Tensor");
  // Max-pool indices (flat in the input plane) as 8-bit offsets within their windows, and back.
  m.def("pack_pool_indices(Tensor indices, int[] input_size, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("unpack_pool_indices(Tensor offsets, int[] input_size, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
  // Max pools of 2 or 3 dimensions. y, and uint8 offsets of y's shape and memory format: where in its window each maximum lies. backward:
  // size, strides: the input's.
  m.def(
      "max_pool_offsets(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> (Tensor y, Tensor "
      "offsets)");
  m.def("max_pool_values(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool_backward(Tensor grad, Tensor offsets, SymInt[] size, SymInt[] strides, int[] kernel, int[] stride, int[] padding, int[] "
      "dilation, bool ceil_mode) -> Tensor");

  // Sums of squares over everything but dimension 0: float32 [N].
  m.def("sample_energy(Tensor x) -> Tensor");
  // f'(x) for f silu, hardswish, mish, gelu or gelu_tanh, in x's memory order.
  m.def("smooth_derivative(Tensor input, str function) -> Tensor");
  // group_quantize of that; and its product with what was packed so, of grad's shape, dtype and packed memory order.
  m.def("smooth_quantize(Tensor input, str function, int bits, int group_size, Tensor seed) -> (Tensor codes, Tensor ranges)");
  m.def("smooth_backward(Tensor grad, Tensor codes, Tensor ranges, Tensor? sample_bits, int bits, int group_size, Tensor seed) -> Tensor");

  // group_quantize, group_quantize_mixed, group_variance of (x - mean) * inverse_std; x: [N, C, ...], mean, inverse_std: float32 [C].
  m.def("norm_quantize(Tensor x, Tensor mean, Tensor inverse_std, int bits, int group_size, Tensor seed) -> (Tensor codes, Tensor ranges)");
  m.def(
      "norm_quantize_mixed(Tensor x, Tensor mean, Tensor inverse_std, Tensor sample_bits, int bit_budget, int group_size, Tensor seed) -> "
      "(Tensor codes, Tensor ranges)");
  m.def("norm_variance(Tensor x, Tensor mean, Tensor inverse_std, int group_size) -> Tensor");
  // x * weight + bias of an unpacked normalized x, times `slope` where the mask has none: what a batch norm and a (leaky) ReLU made of it.
  m.def(
      "norm_dequantize(Tensor codes, Tensor ranges, Tensor? sample_bits, int bits, int group_size, SymInt[] size, SymInt[] stride, "
      "ScalarType dtype, Tensor seed, Tensor? weight, Tensor? bias, Tensor? mask, float slope=0.) -> Tensor");
  // The batch norm's backward from its packed normalized input. training: by the batch's own statistics. energy: float32 [N, 2], or [0, 2]
  // unless wanted.
  m.def(
      "batch_norm_backward(Tensor grad, Tensor codes, Tensor ranges, Tensor? sample_bits, int bits, int group_size, SymInt[] size, "
      "SymInt[] stride, Tensor seed, Tensor? weight, Tensor inverse_std, bool training, bool[3] mask, bool wants_energy) -> (Tensor "
      "grad_input, Tensor grad_weight, Tensor grad_bias, Tensor energy)");

  // ---- weight: kernels.
  //
  // sign(x) 2^k, k the exponent that log2 |x| rounds to (plus: the nearest power of two), for any floating-point tensor.
  m.def("round_power_of_two(Tensor x, bool plus) -> Tensor");
  // Fake quantization with a scale for each entry of dimension 0. codebook: uniform, po2, po2plus, ternary (csrc/weight/codebook.h). y =
  // scale * level; scale, limit: float32 [channels]; weights beyond the limit get no gradient.
  m.def("channel_quantize(Tensor w, str codebook, int bits, bool least_squares) -> (Tensor y, Tensor scale, Tensor limit)");
  m.def("clip_gradient(Tensor grad, Tensor w, Tensor limit) -> Tensor");
  // y = step * (clamp(round(x / step) + zero_point, 0, levels) - zero_point); step, zero_point: float32 scalars on x's device. NaN in x
  // stays NaN in y and grad_x and makes grad_step NaN; infinite x clips.
  m.def("lsq_quantize(Tensor x, Tensor step, Tensor zero_point, int levels) -> Tensor");
  m.def(
      "lsq_backward(Tensor grad, Tensor x, Tensor step, Tensor zero_point, int levels, float scale) -> (Tensor grad_x, Tensor grad_step)");
  // DiffQ, for all weights of a step at once: lists have an entry a weight, `logits` float32, one for each group_sizes[i] weights in a row.
  // spans[i] weights in a row share a range (csrc/weight/diffq.h). streams[i]: which noise of `seed` the weight gets. quantiles: float32
  // [65536], of noise that is not uniform. y: the weights with noise; ranges: float32 [rows, 2], lowest and highest - lowest; extremes:
  // int32 [rows, 2], where those two are; bits: float32 [weights, 2], of each one's elements together, those of the noise and whole ones.
  m.def(
      "diffq_noise(Tensor[] weights, Tensor[] logits, Tensor seed, int[] streams, int[] group_sizes, int[] spans, float[] min_bits, "
      "float[] max_bits, Tensor? quantiles) -> (Tensor[] y, Tensor[] ranges, Tensor[] extremes, Tensor bits)");
  m.def(
      "diffq_backward(Tensor[] grads, Tensor[] logits, Tensor[] ranges, Tensor[] extremes, Tensor seed, int[] streams, int[] group_sizes, "
      "int[] spans, float[] min_bits, float[] max_bits, Tensor? quantiles) -> (Tensor[] grad_weights, Tensor[] grad_logits)");
  // The same in place: the weights' gradient differs from that of y at the ranges' ends only. Returns the logits'.
  m.def(
      "diffq_backward_(Tensor(a!)[] grads, Tensor[] logits, Tensor[] ranges, Tensor[] extremes, Tensor seed, int[] streams, int[] "
      "group_sizes, int[] spans, float[] min_bits, float[] max_bits, Tensor? quantiles) -> Tensor[]");
  // The weights on the grid of their rounded bits, as files store them.
  m.def(
      "diffq_round(Tensor[] weights, Tensor[] logits, int[] group_sizes, int[] spans, float[] min_bits, float[] max_bits) -> (Tensor[] y, "
      "Tensor[] ranges)");
  // The bits that logits stand for.
  m.def("diffq_group_bits(Tensor logits, float min_bits, float max_bits, bool rounded) -> Tensor");
  // float32 [weights]: the bits of each one's numels[i] elements together.
  m.def("diffq_bits(Tensor[] logits, int[] numels, int[] group_sizes, float[] min_bits, float[] max_bits, bool rounded) -> Tensor");
  m.def(
      "diffq_bits_backward(Tensor grad, Tensor[] logits, int[] numels, int[] group_sizes, float[] min_bits, float[] max_bits) -> Tensor[]");
  // An activation with learned ends and bits: clip(x, ends[0], ends[1]) + n * ends[2], n even noise in (-1/2, 1/2); ends: float32 [3].
  // sums: float32 [3] of the gradient: times n, above the upper end, below the lower.
  m.def("clipped_noise(Tensor x, Tensor ends, Tensor seed) -> Tensor");
  m.def("clipped_noise_backward(Tensor grad, Tensor x, Tensor ends, Tensor seed) -> (Tensor grad_x, Tensor sums)");

  // Signs with a scale for each entry of dimension 0, centred over dimension 1 (csrc/weight/binary.h). share: where weights are clamped;
  // with `relative` times the layer's mean magnitude. scale: float32 [rows]; mean: float32 [rows, taps]; limit: float32 [1]. factor: of
  // the gradient.
  m.def("binary_quantize(Tensor w, float share, bool relative) -> (Tensor y, Tensor scale, Tensor mean, Tensor limit)");
  m.def("binary_backward(Tensor grad, Tensor w, Tensor scale, Tensor mean, Tensor limit, float factor) -> Tensor");
  // DoReFa (csrc/weight/dorefa.h): y = scale * level, scale float32 [1], levels odd. adjusted: y has w's deviation. stats: float32 [3].
  m.def("dorefa_quantize(Tensor w, int bits, bool adjusted) -> (Tensor y, Tensor scale, Tensor stats)");
  m.def("dorefa_backward(Tensor grad, Tensor w, Tensor stats) -> Tensor");
  // Stochastic rounding of a gradient within each sample's range.
  m.def("dorefa_gradient(Tensor grad, int bits, Tensor seed) -> Tensor");
  // Activations on a fixed grid (csrc/weight/fixed_grid.h): sign(x), and round(clip(x, 0, 1) * levels) / levels. kept: what the gradient
  // needs, in memory order: a bit an element (whether it passes), four with `polynomial` (its slope).
  m.def("sign_quantize(Tensor x, bool polynomial) -> (Tensor y, Tensor kept)");
  m.def("unit_quantize(Tensor x, int levels) -> (Tensor y, Tensor kept)");
  m.def("grid_backward(Tensor grad, Tensor kept, bool polynomial) -> Tensor");

  // ---- weight: differentiable ops over them, straight through.
  m.def("power_of_two(Tensor x, bool plus) -> Tensor");
  m.def("fake_quantize(Tensor w, str codebook, int bits, bool least_squares) -> Tensor");
  // grad_scale: of the step's gradient.
  m.def("lsq(Tensor x, Tensor step, Tensor zero_point, int levels, float grad_scale) -> Tensor");
  m.def("clipped(Tensor x, Tensor ends, Tensor seed) -> Tensor");
  m.def("binarize(Tensor w, float share, bool relative, float factor) -> Tensor");
  m.def("dorefa(Tensor w, int bits, bool adjusted) -> Tensor");
  m.def("sign_activation(Tensor x, bool polynomial) -> Tensor");
  m.def("unit_activation(Tensor x, int levels) -> Tensor");
  // x itself, whose gradient goes through dorefa_gradient.
  m.def("quantize_gradient(Tensor x, int bits, Tensor seed) -> Tensor");
  // diffq_noise, diffq_round and diffq_bits with their gradients; rounding passes them straight through.
  m.def(
      "diffq(Tensor[] weights, Tensor[] logits, Tensor seed, int[] streams, int[] group_sizes, int[] spans, float[] min_bits, float[] "
      "max_bits, Tensor? quantiles) -> (Tensor[] y, Tensor bits)");
  m.def("diffq_on_grid(Tensor[] weights, Tensor[] logits, int[] group_sizes, int[] spans, float[] min_bits, float[] max_bits) -> Tensor[]");
  m.def("diffq_total_bits(Tensor[] logits, int[] numels, int[] group_sizes, float[] min_bits, float[] max_bits, bool rounded) -> Tensor");

  // ---- packed: inference from codes.
  //
  // codes: uint8 [N, bytes], a row an output channel, K codes of storage_bits (1, 2, 4, 8, 16), the first in the low bits. levels: float32
  // [2^storage_bits], the value of each code. Returns [N, K] = scales * level.
  m.def("decode_weight(Tensor codes, Tensor levels, Tensor scales, int storage_bits, int columns) -> Tensor");
  // Bits of their own for each group (quantize/packed/stream.py). codes: uint8, one stream of bits. group_bits: uint8, two groups a byte.
  // unpack_groups: the code of each of `numel` weights, uint8 or (width 16) uint16 patterns in int16. decode_groups: float32 [numel], low +
  // code * range / (2^bits - 1), where scales (float32 [rows, 2]) has (low, range) for every `span` weights.
  m.def("unpack_groups(Tensor codes, Tensor group_bits, int group_size, int numel, int width) -> Tensor");
  m.def("decode_groups(Tensor values, Tensor group_bits, Tensor scales, int group_size, int span) -> Tensor");
  // Integer products of inputs that are quantized on the way (lsq_quantize's codes), exact in int32, with packed weights. panels: the codes
  // as csrc/packed/gemm_kernels.h lays them out, for the CPU. sums: int32 [N], of each output channel's levels. A code cannot be NaN: on
  // the CPU it counts as the grid's lower end (on CUDA, which multiplies floats, it stays NaN).
  // packed_conv2d adds `residual` to its floats, clips them to [low, high], and with next_bits gives the codes that the next one would make
  // of them: uint8 [N, C, H, W], or where they would be channels last [N, H, W, 1, C], which it takes for x in the place of floats; a
  // pixel's channels lie together, filled up to fours.
  m.def(
      "packed_conv2d(Tensor x, Tensor step, Tensor zero_point, int activation_bits, Tensor codes, Tensor panels, Tensor levels, Tensor "
      "scales, Tensor sums, Tensor? bias, int storage_bits, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, Tensor? "
      "residual=None, float? low=None, float? high=None, Tensor? next_step=None, Tensor? next_zero_point=None, int next_bits=0) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor step, Tensor zero_point, int activation_bits, Tensor codes, Tensor panels, Tensor levels, Tensor "
      "scales, Tensor sums, Tensor? bias, int storage_bits) -> Tensor");
  // A few rows of float inputs [N, C] with packed weights, which are decoded on the way.
  m.def(
      "packed_linear_float(Tensor x, Tensor codes, Tensor panels, Tensor levels, Tensor scales, Tensor? bias, int storage_bits) -> Tensor");
  // Weights of a bit each (1 = -1) times signs, or (`unit`) zeros and ones; csrc/packed/binary_bits.h has the arithmetic. x: float32, whose
  // bit is (x < threshold[c]) ^ flip[c] (None: x < 0, no flip), or bits already, uint8 [N, H, W, 8 * ceil(channels / 64)], channel c at bit
  // c % 8 of byte c / 8. codes: uint8 [N, 8 * ceil(K / 64)]. panels: quantize/packed/binary_panels.py's, for the CPU. sums: int32 [taps,
  // N], of each tap's weights. Returns float32 dot * scales + bias, or, given next_threshold (int32) and next_flip, bits: (dot <
  // next_threshold[n]) ^ next_flip[n]. residual: added to the floats, as torch.add does.
  m.def(
      "packed_binary_conv2d(Tensor x, Tensor? threshold, Tensor? flip, bool unit, Tensor codes, Tensor panels, Tensor sums, Tensor scales, "
      "Tensor? bias, Tensor? next_threshold, Tensor? next_flip, int channels, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int groups, Tensor? residual=None) -> Tensor");
  m.def(
      "packed_binary_linear(Tensor x, Tensor? threshold, Tensor? flip, bool unit, Tensor codes, Tensor panels, Tensor sums, Tensor scales, "
      "Tensor? bias, Tensor? next_threshold, Tensor? next_flip, int channels) -> Tensor");
  // A float convolution in steps of two over an image of few channels: csrc/packed/stem_kernels.h. x: float32 [N, C, H, W]; weight: [M, C,
  // kH, kW]; panels: quantize/packed/stems.py's, for the CPU. Clipped to [low, high], and given `window` the maxima of windows.
  m.def(
      "stem_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor panels, int[] stride, int[] padding, float? low=None, float? high=None, "
      "int[] window=[], int[] window_stride=[], int[] window_padding=[]) -> Tensor");

  // ---- layers: autograd functions over the kernels above, for every backend. The forward is ATen's on the full-precision input.
  //
  // `codes, ranges, sample_bits, bits, group_size, seed`: the input as group_quantize packed it (codes None: not needed, the weight is
  // frozen). `energy` float32 [N, 2], or None: filled by the backward for the allocation of bits (csrc/layers/energy.h).
  m.def(
      "conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] "
      "output_padding, SymInt groups, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, Tensor? "
      "energy) -> Tensor");
  // conv whose input is what a batch norm and a ReLU (`mask`, `slope`) made of the packed tensor: norm_dequantize.
  m.def(
      "conv_of_norm(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, "
      "SymInt[] output_padding, SymInt groups, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, "
      "Tensor? energy, Tensor? norm_weight, Tensor? norm_bias, Tensor? mask, float slope=0.) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, "
      "Tensor? seed, Tensor? energy) -> Tensor");
  // native_batch_norm, with what it normalized with: float32 [C]. No gradients: those are batch_norm's, which returns `output`.
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, float "
      "momentum, float eps) -> (Tensor output, Tensor mean, Tensor inverse_std)");
  m.def(
      "batch_norm(Tensor input, Tensor(a) output, Tensor? weight, Tensor? bias, Tensor inverse_std, bool training, Tensor? codes, Tensor? "
      "ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, Tensor? energy) -> Tensor(a)");
  // As clip_mask: the ReLU family and hardtanh. Two of them give the mask too.
  m.def("clip(Tensor input, float low, float high, float negative_slope) -> Tensor");
  m.def("clip_(Tensor(a!) input, float low, float high, float negative_slope) -> Tensor(a!)");
  m.def("clip_and_mask(Tensor input, float low, float high, float negative_slope) -> (Tensor output, Tensor mask)");
  m.def("clip_and_mask_(Tensor(a!) input, float low, float high, float negative_slope) -> Tensor");
  m.def(
      "prelu(Tensor input, Tensor weight, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, "
      "Tensor? energy) -> Tensor");
  m.def("dropout(Tensor input, float p) -> Tensor");
  m.def("max_pool(Tensor input, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool_with_indices(Tensor input, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> (Tensor output, "
      "Tensor indices)");
  m.def(
      "avg_pool(Tensor input, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override) "
      "-> Tensor");
  m.def("adaptive_avg_pool(Tensor input, SymInt[] output_size) -> Tensor");
  m.def("pad(Tensor input, SymInt[] padding, str mode) -> Tensor");
  // `codes, ranges, ...`: the input; kept for the gate's gradient.
  m.def(
      "mul(Tensor input, Tensor gate, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, Tensor? "
      "energy) -> Tensor");
  m.def(
      "mul_(Tensor(a!) input, Tensor gate, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, "
      "Tensor? energy) -> Tensor(a!)");
  // Norms of rows: `shape` their sizes, the last of the input's; of a group norm the channels of a group at all positions, of an instance
  // norm a channel's positions, by the batch's own statistics.
  m.def(
      "layer_norm(Tensor input, int[] shape, Tensor? weight, Tensor? bias, float eps, Tensor? codes, Tensor? ranges, Tensor? sample_bits, "
      "int bits, int group_size, Tensor? seed, Tensor? energy) -> Tensor");
  m.def(
      "rms_norm(Tensor input, int[] shape, Tensor? weight, float? eps, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int "
      "group_size, Tensor? seed, Tensor? energy) -> Tensor");
  m.def(
      "group_norm(Tensor input, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? codes, Tensor? ranges, Tensor? sample_bits, "
      "int bits, int group_size, Tensor? seed, Tensor? energy) -> Tensor");
  m.def(
      "instance_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, float momentum, float eps, "
      "Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, Tensor? energy) -> Tensor");
  // scaled_dot_product_attention. packed: codes, ranges, seed of query, of key, of value, as group_quantize made them in bits[i].
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout, bool causal, float? scale, bool gqa, Tensor[] "
      "packed, int[] bits, int group_size) -> Tensor");
  // a * b of equal sizes, or a @ b. packed: of both, likewise; bits of 0: not kept, as the other needs no gradient.
  m.def("product(Tensor a, Tensor b, bool matrices, Tensor[] packed, int[] bits, int group_size) -> Tensor");
  m.def("softmax(Tensor input, int dim, int bits, int group_size, Tensor seed) -> Tensor");
  // `function`: silu, hardswish, mish, gelu, gelu_tanh; sigmoid, tanh, elu, softplus, cube. `codes, ranges, ...`: its derivative, packed:
  // what smooth_derivative returns of the first five.
  m.def(
      "smooth(Tensor input, str function, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, "
      "Tensor? energy) -> Tensor");
  m.def(
      "smooth_(Tensor(a!) input, str function, Tensor? codes, Tensor? ranges, Tensor? sample_bits, int bits, int group_size, Tensor? seed, "
      "Tensor? energy) -> Tensor(a!)");
}
