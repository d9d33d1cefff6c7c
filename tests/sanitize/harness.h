// What the kernel checks share: buffers that end exactly where their contents do, nasty inputs, and a comparison that names the spot.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "activation/group_format.h"
#include "core/cpu_isa.h"
#include "core/philox.h"

namespace sanitize {

using quantize::BF16;
using quantize::F16;
using quantize::F32;

// Two ways to catch an overrun: AddressSanitizer sees plain loads and stores to the byte, but not masked vector ones; an unmapped page
// right behind the buffer sees them all.
enum class Fence { heap, page };

template <typename T>
class Buffer {
 public:
  Buffer(size_t count, Fence fence) : bytes_(count * sizeof(T)), fence_(fence) {
    if (fence_ == Fence::heap) {
      memory_ = std::malloc(bytes_);
      data_ = static_cast<T*>(memory_);
    } else {
      const size_t page = sysconf(_SC_PAGESIZE);
      mapped_ = (bytes_ + page - 1) / page * page + page;
      memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      char* end = static_cast<char*>(memory_) + mapped_ - page;
      if (memory_ == MAP_FAILED || mprotect(end, page, PROT_NONE) != 0) std::abort();
      data_ = reinterpret_cast<T*>(end - bytes_);
    }
    std::memset(static_cast<void*>(data_), 0xa5, bytes_);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (fence_ == Fence::heap)
      std::free(memory_);
    else
      munmap(memory_, mapped_);
  }
  T* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t bytes_, mapped_ = 0;
  Fence fence_;
  void* memory_;
  T* data_;
};

// Of random bytes.
template <typename T>
struct Noise : Buffer<T> {
  Noise(size_t count, Fence fence, uint32_t salt) : Buffer<T>(count, fence) {
    auto* bytes = reinterpret_cast<uint8_t*>(this->data());
    for (size_t i = 0; i < this->bytes(); ++i) bytes[i] = uint8_t(quantize::hash32(uint32_t(i) + salt) >> 8);
  }
};

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

template <typename T>
bool is_nan(T x) {
  if constexpr (std::is_integral_v<T>)
    return false;
  else if constexpr (std::is_floating_point_v<T>)
    return x != x;
  else
    return to_float(x) != to_float(x);
}

// Bit for bit, except that NaN has many patterns.
template <typename T>
void expect_same(const Buffer<T>& got, const Buffer<T>& want, const std::string& what) {
  if (got.bytes() != want.bytes()) fail(what + ": sizes differ");
  for (size_t i = 0; i < got.bytes() / sizeof(T); ++i)
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0 && !(is_nan(got[i]) && is_nan(want[i])))
      fail(what + ": element " + std::to_string(i) + " is not the portable one");
}

using quantize::round_nearest;
inline float round_nearest(float x, float) { return x; }

enum class Pattern { noise, constant, poisoned, tiny, huge, zeros };
inline constexpr Pattern kPatterns[] = {Pattern::noise, Pattern::constant, Pattern::poisoned, Pattern::tiny, Pattern::huge, Pattern::zeros};
inline constexpr const char* kPatternNames[] = {"noise", "constant", "poisoned", "tiny", "huge", "zeros"};

template <typename T>
void fill(const Buffer<T>& x, Pattern pattern) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const size_t n = x.bytes() / sizeof(T);
  for (size_t i = 0; i < n; ++i) {
    const float noise = float(int32_t(quantize::hash32(uint32_t(i) + 1))) * 0x1p-30f;
    float value = noise;
    if (pattern == Pattern::constant) value = -1.25f;
    if (pattern == Pattern::poisoned && i % 97 == 5) value = i % 2 ? infinity : std::numeric_limits<float>::quiet_NaN();
    if (pattern == Pattern::tiny) value = noise * 1e-40f;
    if (pattern == Pattern::huge) value = noise * 1.6e38f;
    if (pattern == Pattern::zeros) value = i % 2 ? 0.f : -0.f;
    x[i] = round_nearest(value, T{});
  }
}

// They straddle vectors, chunks and blocks of codes.
inline constexpr int64_t kSizes[] = {1, 7, 8, 31, 64, 127, 128, 129, 151, 256, 257, 1000};

// Each compares every ISA of this machine with the portable kernels and returns the number of comparisons.
int64_t check_group_quantize(quantize::Isa isa, Fence fence);
int64_t check_group_variance(quantize::Isa isa, Fence fence);
int64_t check_sign_mask(quantize::Isa isa, Fence fence);
int64_t check_smooth(quantize::Isa isa, Fence fence);
int64_t check_energy(quantize::Isa isa, Fence fence);
int64_t check_batch_norm(quantize::Isa isa, Fence fence);
int64_t check_decode_groups(quantize::Isa isa, Fence fence);
int64_t check_depthwise(quantize::Isa isa, Fence fence);
int64_t check_max_pool(quantize::Isa isa, Fence fence);
int64_t check_channel_quantize(quantize::Isa isa, Fence fence);
int64_t check_lsq(quantize::Isa isa, Fence fence);
int64_t check_diffq(quantize::Isa isa, Fence fence);
int64_t check_weight_binary(quantize::Isa isa, Fence fence);
int64_t check_gemm(quantize::Isa isa, Fence fence);
int64_t check_binary(quantize::Isa isa, Fence fence);
int64_t check_binary_columns(quantize::Isa isa, Fence fence);
int64_t check_tile(quantize::Isa isa, Fence fence);
int64_t check_winograd(quantize::Isa isa, Fence fence);
int64_t check_stem(quantize::Isa isa, Fence fence);
int64_t check_host_arithmetic();
int64_t check_allocate();
int64_t check_tile_rows();

}  // namespace sanitize
