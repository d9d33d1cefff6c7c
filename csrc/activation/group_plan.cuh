// Which kernels work on which part of a call. Free of torch headers: a launcher (core/launch.h) is an argument.
#pragma once

#include "../core/grid.h"
#include "group_units.cuh"

namespace quantize::activation {

// The call's groups, and what of them the register kernels may take.
struct GroupPlan {
  PackedGroups groups;       // as the op sees them
  PackedGroups unit_groups;  // as the register kernels do: one sample where nothing separates the samples
  UnitRange units;           // none if alignment forbids

  // groups: complete but for sample_bytes. x: the unpacked elements, `item` bytes each.
  GroupPlan(const PackedGroups& g, const void* x, int64_t item, const void* codes) : groups(g) {
    if (g.sample_bits == nullptr) groups.sample_bytes = sample_code_bytes(g.elements, g.group_size, g.bits);
    unit_groups = groups;
    const bool whole_units = g.group_size % UnitTraits::elements == 0;
    if (g.sample_bits == nullptr && whole_units && g.elements % g.group_size == 0) {
      unit_groups.samples = 1, unit_groups.elements = g.samples * g.elements, unit_groups.groups = g.samples * g.groups;
    }
    const int64_t n = unit_groups.elements, units_of_sample = n / UnitTraits::elements;
    const bool alone = unit_groups.samples == 1, one_group = unit_groups.groups == 1;
    const bool x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && (alone || n * item % 16 == 0);
    // Samples of many widths all start at multiples of 4 bytes if 32 elements divide them: then 1 bit does.
    const bool codes_aligned =
        reinterpret_cast<uintptr_t>(codes) % 4 == 0 && (alone || (g.sample_bits ? n % 32 : groups.sample_bytes % 4) == 0);
    const bool usable = (whole_units || one_group) && x_aligned && codes_aligned && units_of_sample < (int64_t(1) << 30);
    units.units = usable ? uint32_t(units_of_sample) : 0;
    units.units_per_group = Divider(uint32_t(std::max<int64_t>(1, one_group ? units.units : g.group_size / UnitTraits::elements)));
  }

  // What is left of every sample behind its units lies in its last group.
  bool has_rest() const { return int64_t(units.units) * UnitTraits::elements < unit_groups.elements; }
  PieceRange rest() const {
    const int64_t last = groups.groups - 1;
    return PieceRange::of(groups, last, int64_t(units.units) * UnitTraits::elements - last * groups.group_size);
  }

  dim3 unit_grid(int processors, const UnitRange& range, int bundle_units) const {
    const int64_t rows = std::min<int64_t>(unit_groups.samples, 65535), bundles = (range.units + bundle_units - 1) / bundle_units;
    const int64_t blocks = grid_size(processors, BundleTraits::blocks, bundles * rows, BundleTraits::warps);
    const int64_t needed = (bundles + BundleTraits::warps - 1) / BundleTraits::warps;
    return dim3(unsigned(std::clamp<int64_t>(blocks / rows, 1, needed)), unsigned(rows));
  }

  // Of a kernel that takes `per_block` groups in a block.
  dim3 group_grid(int processors, int64_t per_block) const {
    return dim3(unsigned(grid_size(processors, PieceTraits::blocks, groups.samples * groups.groups, per_block)));
  }

  dim3 piece_grid(int processors, const PieceRange& range) const {
    const int64_t items = groups.samples * (groups.groups - range.first_group) * range.pieces;
    return dim3(unsigned(grid_size(processors, PieceTraits::blocks, items, PieceTraits::warps)));
  }
};

}  // namespace quantize::activation
