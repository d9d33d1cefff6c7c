// A packed tensor decoded a few groups at a time, in pieces that know their channels. CPU.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "../activation/packed_tensor.h"
#include "batch_norm_kernels.h"

namespace quantize::layers {

using activation::PackedTensor;

// Consecutive elements of one channel in memory, 0 where channels alternate; nothing for other layouts.
inline std::optional<int64_t> elements_together(at::IntArrayRef size, at::IntArrayRef stride) {
  int64_t positions = 1;
  for (size_t d = 2; d < size.size(); ++d) positions *= size[d];
  if (positions == 1 || stride[1] == 1) {
    int64_t least = size[1];  // channels innermost: every other stride is a multiple of their number
    for (size_t d = 2; d < size.size(); ++d)
      if (size[d] > 1) least = std::min(least, stride[d]);
    return least >= size[1] ? std::optional<int64_t>(0) : std::nullopt;
  }
  int64_t widest = 0;
  for (size_t d = 2; d < size.size(); ++d)
    if (size[d] > 1) widest = std::max(widest, stride[d] * size[d]);
  return stride[1] >= widest ? std::optional<int64_t>(positions) : std::nullopt;
}

// So many columns that a row has several whole vectors; channels that would need too many for that have a rest in each row.
inline int64_t row_width(int64_t channels) {
  const int64_t whole = std::lcm<int64_t>(channels, 16), width = whole <= 1024 ? whole : channels;
  return (64 + width - 1) / width * width;
}

// One value a channel, repeated as batch_norm_kernels.h has it, and a vector's worth of zeros after the last.
inline std::vector<float> spread_channels(const std::vector<double>& values, int64_t width) {
  std::vector<float> result(width + 16, 0.f);
  for (int64_t i = 0; i < width; ++i) result[i] = float(values[i % values.size()]);
  return result;
}

// A norm's float32 parameters, or others that are converted; `otherwise` where there are none.
inline std::vector<double> channel_values(const std::optional<at::Tensor>& t, int64_t channels, double otherwise) {
  if (!t) return std::vector<double>(channels, otherwise);
  const at::Tensor values = t->to(at::kFloat).contiguous();
  return {values.const_data_ptr<float>(), values.const_data_ptr<float>() + channels};
}

// A packed tensor's layout and `inner` of its runs, checked; `inner` is missing where kernels do not know the layout.
struct ChunkLayout {
  activation::GroupLayout<int64_t> groups;
  std::optional<int64_t> inner;

  ChunkLayout(const char* op, at::IntArrayRef size, at::IntArrayRef stride, int64_t group_size, const at::Tensor& codes,
              const at::Tensor& ranges, int64_t bits, const std::optional<at::Tensor>& sample_bits)
      : groups(activation::group_layout<int64_t>(op, size, group_size)), inner(elements_together(size, stride)) {
    if (!sample_bits) check_bits(op, bits);
    check_dtype(op, "codes", codes, at::kByte);
    check_dtype(op, "ranges", ranges, at::kShort);
    check_numel(op, "ranges", ranges, 2 * groups.total_groups());
    if (groups.elements == 0 || groups.samples != size[0] || groups.group_size > activation::piece_elements) inner = std::nullopt;
  }
};

// The work is cut into units, several samples or some groups of one. Their number depends on the shape alone, so that the order of
// additions does not depend on threads.
class PackedChunks {
 protected:
  PackedChunks(const PackedTensor& packed, int64_t channels, int64_t inner) : p_(packed), channels_(channels) {
    run_ = {0, 0, inner, inner ? channels_ : row_width(channels_)};
    const int64_t width = run_.width;
    const auto& l = p_.layout;
    constexpr int64_t unit_elements = 65536;
    unit_samples_ = std::max<int64_t>(1, unit_elements / l.elements);
    unit_groups_ = (std::max(unit_elements, 32 * width) + l.group_size - 1) / l.group_size;
    sample_units_ = unit_samples_ > 1 ? 1 : (l.groups + unit_groups_ - 1) / unit_groups_;
    units_ = unit_samples_ > 1 ? (l.samples + unit_samples_ - 1) / unit_samples_ : l.samples * sample_units_;
    chunk_groups_ = (std::max<int64_t>(4096, inner ? 0 : 8 * width) + l.group_size - 1) / l.group_size;
  }

  // body(sample, decoded elements, run) for the chunks of a unit.
  template <typename F>
  void for_each_chunk(int64_t unit, void* buffer, const F& body) const {
    const auto& l = p_.layout;
    const int64_t sample = unit / sample_units_ * unit_samples_, part = unit % sample_units_;
    const int64_t last = std::min(l.samples, sample + unit_samples_);
    const int64_t begin = part * unit_groups_, stop = sample_units_ == 1 ? l.groups : std::min(l.groups, begin + unit_groups_);
    for (int64_t n = sample; n < last; ++n) {
      for (int64_t group = begin; group < stop; group += chunk_groups_) {
        const int64_t first = group * l.group_size, end = std::min(l.elements, std::min(stop, group + chunk_groups_) * l.group_size);
        p_.kernels(n).dequantize(p_.codes + p_.offsets[n] + group * activation::code_bytes(l.group_size, int(p_.bits[n])),
                                 p_.ranges + 2 * (n * l.groups + group),
                                 activation::GroupRun{end - first, l.group_size, uint32_t(n * l.groups + group)}, p_.seed, buffer);
        body(n, static_cast<const void*>(buffer), ChannelRun{first, end - first, run_.inner, run_.width});
      }
    }
  }

  // body(unit, buffer for decoded elements), on all threads.
  template <typename F>
  void for_each_unit(const F& body) const {
    at::parallel_for(0, units_, 1, [&](int64_t begin, int64_t end) {
      // Not initialized, which would take as long as decoding.
      const std::unique_ptr<uint8_t[]> buffer(new uint8_t[chunk_groups_ * p_.layout.group_size * activation::item_bytes(p_.scalar)]);
      for (int64_t unit = begin; unit < end; ++unit) body(unit, buffer.get());
    });
  }

  int64_t bytes_before(int64_t sample, ChannelRun run) const {
    return (sample * p_.layout.elements + run.first) * activation::item_bytes(p_.scalar);
  }

  const PackedTensor& p_;
  int64_t channels_, unit_samples_, unit_groups_, sample_units_, units_, chunk_groups_;
  ChannelRun run_;
};

}  // namespace quantize::layers
