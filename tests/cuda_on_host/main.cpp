// Runs the CUDA kernels on the CPU, lane by lane, and compares them with the specification: `make cuda-on-host`. Needs no toolkit, no GPU.
#include "harness.h"

int main() {
  using namespace cuda_on_host;
  const auto report = [](const char* name, int64_t count) {
    std::printf("%-16s %6lld comparisons\n", name, static_cast<long long>(count));
  };
  report("group_quantize", check_group_quantize());
  report("group_variance", check_group_variance());
  report("sign_mask", check_sign_mask());
  report("smooth", check_smooth());
  report("allocate_bits", check_allocate_bits());
  report("weight", check_weight());
  report("diffq", check_diffq());
  report("weight_binary", check_weight_binary());
  report("weight_dorefa", check_weight_dorefa());
  report("packed", check_packed());
  report("binary", check_binary());
  report("integer", check_integer());
}
