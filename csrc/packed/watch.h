// When what was made of a layer, or of a whole model, may be used again.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace quantize::packed {

// Objects that something was made of, where they were found: entries of dictionaries. Of tensors, their values too.
class Watch {
 public:
  using Found = std::tuple<pybind11::dict, pybind11::object, pybind11::object>;  // dictionary, key, value

  // sizes: dictionaries that are not to get other entries.
  Watch(const std::vector<Found>& entries, const std::vector<pybind11::dict>& sizes);
  bool unchanged() const;

 private:
  struct Entry {
    pybind11::dict owner;
    pybind11::object key, value;
    int64_t version;    // of a tensor
    at::Tensor before;  // a copy of a tensor that counts no versions
  };
  struct Size {
    pybind11::dict of;
    Py_ssize_t entries;
  };

  std::vector<Entry> entries_;
  std::vector<Size> sizes_;
};

// Between the two, in this thread, one mode does not count: that which records what ops are called. Layers are to call their usual ones.
void begin_recording();
void end_recording();

// Whether ops go through a torch.func transform or a mode (fake tensors, tracing) first: what they give is not to be kept.
bool in_transform();

}  // namespace quantize::packed
