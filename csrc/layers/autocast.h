// What autocast does to the arguments of a convolution or a linear layer.
#pragma once

#include <ATen/autocast_mode.h>

#include <optional>

namespace quantize::layers {

// Casts through autocast's own cache, so that layers called again, compressed or not, keep one copy of a parameter between them. While it
// lives autocast is off.
template <at::DeviceType device>
class Autocast {
 public:
  at::Tensor operator()(const at::Tensor& t) const {
    return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(device), t, device);
  }

  std::optional<at::Tensor> operator()(const std::optional<at::Tensor>& t) const { return t ? std::optional((*this)(*t)) : t; }

 private:
  c10::impl::ExcludeDispatchKeyGuard off_{at::autocast::get_autocast_dispatch_key_from_device_type(device)};
};

}  // namespace quantize::layers
