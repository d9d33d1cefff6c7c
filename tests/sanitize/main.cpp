// Runs the torch-free kernels under the address and undefined-behaviour sanitizers, on every ISA of this machine: `make sanitize`.
#include "harness.h"

int main() {
  using namespace sanitize;
  int64_t total = check_host_arithmetic() + check_allocate() + check_tile_rows();
  std::printf("%-10s %8lld comparisons\n", "any", static_cast<long long>(total));
  for (quantize::Isa isa : quantize::supported_isas()) {
    int64_t count = 0;
    for (Fence fence : {Fence::heap, Fence::page})
      count += check_group_quantize(isa, fence) + check_group_variance(isa, fence) + check_sign_mask(isa, fence) +
               check_smooth(isa, fence) + check_energy(isa, fence) + check_batch_norm(isa, fence) + check_channel_quantize(isa, fence) +
               check_lsq(isa, fence) + check_diffq(isa, fence) + check_weight_binary(isa, fence) + check_gemm(isa, fence) +
               check_binary(isa, fence) + check_binary_columns(isa, fence) + check_tile(isa, fence) + check_winograd(isa, fence) +
               check_max_pool(isa, fence) + check_depthwise(isa, fence) + check_decode_groups(isa, fence);
    std::printf("%-10s %8lld comparisons\n", quantize::isa_name(isa), static_cast<long long>(count));
    total += count;
  }
  std::printf("sanitizers: clean, %lld comparisons\n", static_cast<long long>(total));
}
