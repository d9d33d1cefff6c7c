// Launching CUDA kernels from ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <utility>
#include <vector>

#include "half.h"

namespace quantize {

// body(F32{}), body(F16{}) or body(BF16{}).
template <typename F>
void with_type(Scalar scalar, const F& body) {
  switch (scalar) {
    case Scalar::f32:
      return body(F32{});
    case Scalar::f16:
      return body(F16{});
    case Scalar::bf16:
      return body(BF16{});
  }
}

// A size that kernels count in 32 bits, and sums of a few of them.
inline int size_on_device(const char* op, const char* what, int64_t value) {
  TORCH_CHECK_VALUE(value < (int64_t(1) << 28), op, ": ", what, " must be less than 2^28; got ", value);
  return int(value);
}

// Bytes that kernels read in words of 64 bits, contiguous.
inline at::Tensor aligned_bytes(const at::Tensor& bytes) {
  const at::Tensor own = bytes.contiguous();
  return reinterpret_cast<uintptr_t>(own.const_data_ptr()) % 8 == 0 ? own : own.clone();
}

// Launches on the current stream of a tensor's device for as long as it lives. Kernels are chosen by code that sees no torch header and
// takes any launcher: tests/cuda_on_host has one that runs them on the CPU.
class Launcher {
 public:
  explicit Launcher(const at::Tensor& x)
      : guard_(x.device()),
        options_(x.options()),
        stream_(at::cuda::getCurrentCUDAStream()),
        processors_(at::cuda::getCurrentDeviceProperties()->multiProcessorCount) {}

  int processors() const { return processors_; }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, Arguments&&... arguments) const {
    kernel<<<grid, threads, 0, stream_>>>(std::forward<Arguments>(arguments)...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Memory for kernels on this stream; the caching allocator keeps it until they are through.
  template <typename T>
  T* scratch(int64_t count) {
    scratch_.push_back(at::empty({count * static_cast<int64_t>(sizeof(T))}, options_.dtype(at::kByte)));
    return reinterpret_cast<T*>(scratch_.back().mutable_data_ptr<uint8_t>());
  }

 private:
  c10::cuda::CUDAGuard guard_;
  at::TensorOptions options_;
  cudaStream_t stream_;
  int processors_;
  std::vector<at::Tensor> scratch_;
};

}  // namespace quantize
