// group_quantize, group_quantize_mixed and group_dequantize: CPU and Meta.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "group_dequantize_call.h"
#include "packed_tensor.h"

namespace quantize::activation {

const GroupKernels& group_kernels(Isa isa, Scalar scalar, int bits) {
  const int row = int(scalar), column = bits == 8 ? 3 : bits / 2;
  return QUANTIZE_BY_ISA(isa, group_kernels)[row][column];
}

namespace {

using at::Tensor;
using std::tuple;

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
