// group_quantize, group_quantize_mixed and group_dequantize: CPU and Meta.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <memory>

#include "../core/grain.h"
#include "group_dequantize_call.h"
#include "group_stream.h"
#include "packed_tensor.h"

namespace quantize::activation {

const GroupKernels& group_kernels(Isa isa, Scalar scalar, int bits) {
  const int row = int(scalar), column = bits == 8 ? 3 : bits / 2;
  return QUANTIZE_BY_ISA(isa, group_kernels)[row][column];
}

namespace {

using at::Tensor;
using std::tuple;

constexpr int64_t grain_elements = 16384;  // per task: about ten microseconds of work

template <typename F>
void for_each_run(const PackedTensor& p, const F& body) {  // body(kernels, sample, first group in the sample, run)
  const auto& l = p.layout;
  at::parallel_for(0, l.total_groups(), grain_of(grain_elements, l.group_size), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / l.groups, group = begin % l.groups, stop = std::min(l.groups, group + end - begin);
      const int64_t elements = std::min(l.elements, stop * l.group_size) - group * l.group_size;
      body(p.kernels(sample), sample, group, GroupRun{elements, l.group_size, uint32_t(begin)});
      begin += stop - group;
    }
  });
}

template <typename F>
void for_each_piece(const PackedTensor& p, int64_t sample, int64_t group, const F& body) {  // body(piece)
  const int64_t n = std::min(p.layout.group_size, p.layout.elements - group * p.layout.group_size);
  at::parallel_for(0, (n + piece_elements - 1) / piece_elements, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * piece_elements;
      body(i, GroupPiece{first, std::min(piece_elements, n - first), n, uint32_t(sample * p.layout.groups + group)});
    }
  });
}

// Long groups: too few to share out whole, so each is worked on by all threads, its range first.
void quantize_long_groups(const PackedTensor& p, const uint8_t* x) {
  const auto& l = p.layout;
  const int64_t item = item_bytes(p.scalar);
  std::vector<Extent> extents((l.group_size + piece_elements - 1) / piece_elements);
  for (int64_t sample = 0; sample < l.samples; ++sample) {
    const int bits = int(p.bits[sample]);
    for (int64_t group = 0; group < l.groups; ++group) {
      const GroupKernels& k = p.kernels(sample);
      const uint8_t* source = x + (sample * l.elements + group * l.group_size) * item;
      Extent all{INFINITY, -INFINITY, true};
      extents.assign(extents.size(), all);
      for_each_piece(p, sample, group,
                     [&](int64_t i, GroupPiece piece) { extents[i] = k.extent(source + piece.begin * item, piece.elements); });
      for (const Extent& e : extents) all = {std::min(all.min, e.min), std::max(all.max, e.max), all.finite && e.finite};
      uint16_t* stored = p.ranges + 2 * (sample * l.groups + group);
      const auto store = [&]<typename T>(T) {
        const StoredRange range = store_range<T>(all, bits);
        stored[0] = range.first, stored[1] = range.second;
        return load_range<T>(range, bits);
      };
      const Range range = p.scalar == Scalar::f32 ? store(F32{}) : p.scalar == Scalar::f16 ? store(F16{}) : store(BF16{});
      uint8_t* codes = p.codes + p.offsets[sample] + group * code_bytes(l.group_size, bits);
      for_each_piece(p, sample, group, [&](int64_t, GroupPiece piece) { k.quantize_piece(source, piece, range, p.seed, codes); });
    }
  }
}

void dequantize_long_groups(const PackedTensor& p, uint8_t* y) {
  const auto& l = p.layout;
  for (int64_t sample = 0; sample < l.samples; ++sample) {
    const int bits = int(p.bits[sample]);
    for (int64_t group = 0; group < l.groups; ++group) {
      const uint16_t* s = p.ranges + 2 * (sample * l.groups + group);
      const StoredRange stored{s[0], s[1]};
      const Range range = p.scalar == Scalar::f32   ? load_range<F32>(stored, bits)
                          : p.scalar == Scalar::f16 ? load_range<F16>(stored, bits)
                                                    : load_range<BF16>(stored, bits);
      const uint8_t* codes = p.codes + p.offsets[sample] + group * code_bytes(l.group_size, bits);
      uint8_t* target = y + (sample * l.elements + group * l.group_size) * item_bytes(p.scalar);
      for_each_piece(p, sample, group,
                     [&](int64_t, GroupPiece piece) { p.kernels(sample).dequantize_piece(codes, piece, range, p.seed, target); });
    }
  }
}

void quantize_into(const PackedTensor& p, const Tensor& x) {
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  const auto& l = p.layout;
  if (l.elements == 0) return;
  if (l.group_size > piece_elements) return quantize_long_groups(p, source);
  for_each_run(p, [&](const GroupKernels& k, int64_t sample, int64_t group, GroupRun run) {
    const int64_t first = sample * l.elements + group * l.group_size;
    k.quantize(source + first * item_bytes(p.scalar), run, p.seed,
               p.codes + p.offsets[sample] + group * code_bytes(l.group_size, int(p.bits[sample])),
               p.ranges + 2 * (sample * l.groups + group));
  });
}

tuple<Tensor, Tensor> group_quantize_cpu(const Tensor& x, int64_t bits, int64_t group_size, const Tensor& seed) {
  check_bits("group_quantize", bits);
  const Scalar scalar = check_scalar("group_quantize", "x", x.scalar_type());
  const auto layout = group_layout<int64_t>("group_quantize", x.sizes(), group_size);
  Tensor codes = at::empty({layout.bytes(bits)}, x.options().dtype(at::kByte));
  Tensor ranges = at::empty({layout.total_groups(), 2}, x.options().dtype(at::kShort));
  quantize_into(PackedTensor("group_quantize", layout, scalar, seed, codes, ranges, bits, std::nullopt), packed_memory(x));
  return {codes, ranges};
}

tuple<Tensor, Tensor> group_quantize_mixed_cpu(const Tensor& x, const Tensor& sample_bits, int64_t bit_budget, int64_t group_size,
                                               const Tensor& seed) {
  const char* op = "group_quantize_mixed";
  const Scalar scalar = check_scalar(op, "x", x.scalar_type());
  const auto layout = group_layout<int64_t>(op, x.sizes(), group_size);
  Tensor codes = at::empty({layout.bytes_within(bit_budget)}, x.options().dtype(at::kByte));
  Tensor ranges = at::empty({layout.total_groups(), 2}, x.options().dtype(at::kShort));
  quantize_into(PackedTensor(op, layout, scalar, seed, codes, ranges, 0, sample_bits), packed_memory(x));
  return {codes, ranges};
}

Tensor group_dequantize_cpu(const Tensor& codes, const Tensor& ranges, const std::optional<Tensor>& sample_bits, int64_t bits,
                            int64_t group_size, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype, const Tensor& seed) {
  const char* op = "group_dequantize";
  const Scalar scalar = check_scalar(op, "dtype", dtype);
  const auto layout = check_dequantize(op, codes, ranges, sample_bits, bits, group_size, size);
  Tensor y = empty_unpacked(op, size, stride, codes.options().dtype(dtype));
  if (y.numel() == 0) return y;
  const PackedTensor p(op, layout, scalar, seed, codes, ranges, bits, sample_bits);
  auto* target = static_cast<uint8_t*>(y.data_ptr());
  if (layout.group_size > piece_elements) {
    dequantize_long_groups(p, target);
    return y;
  }
  for_each_run(p, [&](const GroupKernels& k, int64_t sample, int64_t group, GroupRun run) {
    const int64_t first = sample * layout.elements + group * layout.group_size;
    k.dequantize(p.codes + p.offsets[sample] + group * code_bytes(layout.group_size, int(p.bits[sample])),
                 p.ranges + 2 * (sample * layout.groups + group), run, p.seed, target + first * item_bytes(scalar));
  });
  return y;
}

constexpr int64_t part_elements = 4096;

// Runs of a few groups within a run: body(elements before them in it, groups before them, smaller run).
template <typename F>
void for_each_part(GroupRun run, const F& body) {
  const int64_t groups = std::max<int64_t>(1, part_elements / run.group_size), elements = groups * run.group_size;
  for (int64_t done = 0, before = 0; done < run.elements; done += elements, before += groups)
    body(done, before, GroupRun{std::min(elements, run.elements - done), run.group_size, run.first_group + uint32_t(before)});
}

// Room for such a part, not initialized.
std::unique_ptr<uint8_t[]> part_buffer(GroupRun run, Scalar scalar) {
  return std::unique_ptr<uint8_t[]>(new uint8_t[std::max(part_elements, run.group_size) * item_bytes(scalar)]);
}

tuple<Tensor, Tensor> packed_meta(const Tensor& x, const c10::SymInt& bytes, const c10::SymInt& groups) {
  return {at::empty_symint({bytes}, x.options().dtype(at::kByte)), at::empty_symint({groups, 2}, x.options().dtype(at::kShort))};
}

tuple<Tensor, Tensor> group_quantize_meta(const Tensor& x, int64_t bits, int64_t group_size, const Tensor&) {
  check_bits("group_quantize", bits);
  check_scalar("group_quantize", "x", x.scalar_type());
  const auto layout = group_layout<c10::SymInt>("group_quantize", x.sym_sizes(), group_size);
  return packed_meta(x, layout.bytes(bits), layout.total_groups());
}

tuple<Tensor, Tensor> group_quantize_mixed_meta(const Tensor& x, const Tensor&, int64_t bit_budget, int64_t group_size, const Tensor&) {
  check_scalar("group_quantize_mixed", "x", x.scalar_type());
  const auto layout = group_layout<c10::SymInt>("group_quantize_mixed", x.sym_sizes(), group_size);
  return packed_meta(x, layout.bytes_within(bit_budget), layout.total_groups());
}

Tensor group_dequantize_meta(const Tensor& codes, const Tensor&, const std::optional<Tensor>&, int64_t, int64_t, c10::SymIntArrayRef size,
                             c10::SymIntArrayRef stride, at::ScalarType dtype, const Tensor&) {
  return at::empty_strided_symint(size, stride, codes.options().dtype(dtype));
}

}  // namespace

tuple<Tensor, Tensor> quantize_made(const char* op, const Tensor& input, MakeKernel make, int64_t bits, int64_t group_size,
                                    const Tensor& seed) {
  check_bits(op, bits);
  const Scalar scalar = check_scalar(op, "input", input.scalar_type());
  const auto l = group_layout<int64_t>(op, input.sizes(), group_size);
  const Tensor x = packed_memory(input);
  if (l.group_size > piece_elements) {  // its range is known only when all of it is made
    const Tensor made = at::empty_strided(x.sizes(), x.strides(), x.options());
    const int64_t item = item_bytes(scalar);
    at::parallel_for(0, x.numel(), grain_elements, [&](int64_t begin, int64_t end) {
      make(static_cast<const uint8_t*>(x.const_data_ptr()) + begin * item, end - begin,
           static_cast<uint8_t*>(made.mutable_data_ptr()) + begin * item);
    });
    return group_quantize_cpu(made, bits, group_size, seed);
  }
  Tensor codes = at::empty({l.bytes(bits)}, x.options().dtype(at::kByte));
  Tensor ranges = at::empty({l.total_groups(), 2}, x.options().dtype(at::kShort));
  const PackedTensor p(op, l, scalar, seed, codes, ranges, bits, std::nullopt);
  const auto* source = static_cast<const uint8_t*>(x.const_data_ptr());
  const int64_t bytes = code_bytes(l.group_size, int(bits));
  if (l.elements == 0) return {codes, ranges};
  for_each_run(p, [&](const GroupKernels& k, int64_t sample, int64_t group, GroupRun run) {
    const auto buffer = part_buffer(run, scalar);
    const uint8_t* own = source + (sample * l.elements + group * l.group_size) * item_bytes(scalar);
    for_each_part(run, [&](int64_t done, int64_t before, GroupRun part) {
      make(own + done * item_bytes(scalar), part.elements, buffer.get());
      k.quantize(buffer.get(), part, p.seed, p.codes + p.offsets[sample] + (group + before) * bytes,
                 p.ranges + 2 * (sample * l.groups + group + before));
    });
  });
  return {codes, ranges};
}

Tensor dequantize_and_join(const char* op, const Tensor& codes, const Tensor& ranges, const std::optional<Tensor>& sample_bits,
                           int64_t bits, int64_t group_size, const Tensor& seed, JoinKernel join, const Tensor& other) {
  const Scalar scalar = check_scalar(op, "grad", other.scalar_type());
  const auto l = check_dequantize(op, codes, ranges, sample_bits, bits, group_size, other.sizes());
  TORCH_INTERNAL_ASSERT(packed_strides(other.sizes(), other.strides()) == other.strides().vec());
  Tensor y = at::empty_strided(other.sizes(), other.strides(), other.options());
  if (y.numel() == 0) return y;
  const PackedTensor p(op, l, scalar, seed, codes, ranges, bits, sample_bits);
  const int64_t item = item_bytes(scalar);
  const auto* source = static_cast<const uint8_t*>(other.const_data_ptr());
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  if (l.group_size > piece_elements) {
    dequantize_long_groups(p, target);
    at::parallel_for(0, y.numel(), grain_elements, [&](int64_t begin, int64_t end) {
      join(target + begin * item, source + begin * item, end - begin, target + begin * item);
    });
    return y;
  }
  for_each_run(p, [&](const GroupKernels& k, int64_t sample, int64_t group, GroupRun run) {
    const auto buffer = part_buffer(run, scalar);
    const int64_t first = (sample * l.elements + group * l.group_size) * item, bytes = code_bytes(l.group_size, int(p.bits[sample]));
    for_each_part(run, [&](int64_t done, int64_t before, GroupRun part) {
      k.dequantize(p.codes + p.offsets[sample] + (group + before) * bytes, p.ranges + 2 * (sample * l.groups + group + before), part,
                   p.seed, buffer.get());
      join(buffer.get(), source + first + done * item, part.elements, target + first + done * item);
    });
  });
  return y;
}

TORCH_LIBRARY_IMPL(quantize, CPU, m) {
  m.impl("group_quantize", group_quantize_cpu);
  m.impl("group_quantize_mixed", group_quantize_mixed_cpu);
  m.impl("group_dequantize", group_dequantize_cpu);
}

TORCH_LIBRARY_IMPL(quantize, Meta, m) {
  m.impl("group_quantize", group_quantize_meta);
  m.impl("group_quantize_mixed", group_quantize_mixed_meta);
  m.impl("group_dequantize", group_dequantize_meta);
}

}  // namespace quantize::activation
