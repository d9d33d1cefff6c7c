// What the checks of CUDA kernels on the CPU share.
#pragma once

#include "simt.h"

#include <algorithm>
#include <limits>
#include <string>

#include "core/half.h"
#include "core/philox.h"

namespace cuda_on_host {

using quantize::BF16;
using quantize::F16;
using quantize::F32;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Ends exactly where its contents do, for the address sanitizer; starts `offset` elements behind a 16-byte boundary.
template <typename T>
class Buffer {
 public:
  Buffer(size_t count, size_t offset)
      : bytes_(count * sizeof(T)), memory_(new char[bytes_ + offset * sizeof(T)]), data_(memory_.get() + offset * sizeof(T)) {
    std::memset(memory_.get(), 0xa5, bytes_ + offset * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  std::unique_ptr<char[]> memory_;  // operator new aligns to 16 bytes
  char* data_;
};

template <typename T>
void expect_same(const T* got, const std::vector<T>& want, const std::string& what) {
  for (size_t i = 0; i < want.size(); ++i)
    if (std::memcmp(got + i, &want[i], sizeof(T)) != 0)
      fail(what + ": item " + std::to_string(i) + " of " + std::to_string(want.size()) + " is " + std::to_string(got[i]) + ", expected " +
           std::to_string(want[i]));
}

inline uint32_t word_of(F32 x) { return quantize::float_bits(x.value); }
inline uint32_t word_of(F16 x) { return x.bits; }
inline uint32_t word_of(BF16 x) { return x.bits; }

// Bit for bit, but any NaN is as good as another.
template <typename T>
void expect_same_values(const T* got, const std::vector<T>& want, const std::string& what) {
  for (size_t i = 0; i < want.size(); ++i) {
    const float a = to_float(got[i]), b = to_float(want[i]);
    if (word_of(got[i]) != word_of(want[i]) && !(std::isnan(a) && std::isnan(b)))
      fail(what + ": element " + std::to_string(i) + " of " + std::to_string(want.size()) + " is " + std::to_string(a) + ", expected " +
           std::to_string(b));
  }
}

inline F32 convert(float x, F32) { return {x}; }
inline F16 convert(float x, F16 type) { return round_nearest(x, type); }
inline BF16 convert(float x, BF16 type) { return round_nearest(x, type); }

// offset: a spread of a few units in the last place of the minimum, where codes saturate. ramp: values that come back exactly.
enum class Pattern { noise, rectified, constant, poisoned, tiny, huge, zeros, offset, ramp };
inline constexpr Pattern kPatterns[] = {Pattern::noise, Pattern::rectified, Pattern::constant, Pattern::poisoned, Pattern::tiny,
                                        Pattern::huge,  Pattern::zeros,     Pattern::offset,   Pattern::ramp};

inline float pattern_value(Pattern pattern, size_t i) {
  const float noise = float(int32_t(quantize::hash32(uint32_t(i) + 1))) * 0x1p-30f;
  switch (pattern) {
    case Pattern::noise:
      return noise;
    case Pattern::rectified:
      return noise > 0 ? noise : 0.f;
    case Pattern::constant:
      return -1.25f;
    case Pattern::poisoned:
      return i % 997 != 5 ? noise : i % 2 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
    case Pattern::tiny:
      return noise * 1e-40f;
    case Pattern::huge:
      return noise * 1.6e38f;
    case Pattern::zeros:
      return i % 2 ? 0.f : -0.f;
    case Pattern::offset:
      return 1024.f + float(int(noise * 2.f)) * 0x1p-13f;
    case Pattern::ramp:
      return float(i % 4) * 0.5f - 1.f;
  }
  return 0.f;
}

template <typename T>
void fill(const Buffer<T>& x, Pattern pattern) {
  for (size_t i = 0; i < x.bytes() / sizeof(T); ++i) x.data()[i] = convert(pattern_value(pattern, i), T{});
}

struct Case {
  int64_t samples, elements, group_size;
};
inline std::string name(const Case& c) {
  return std::to_string(c.samples) + " x " + std::to_string(c.elements) + " in groups of " + std::to_string(c.group_size);
}
// They straddle units, bundles and pieces; with ends that no register kernel takes, and samples that break alignment.
inline constexpr Case kCases[] = {{1, 1, 1},        {3, 7, 7},        {1, 255, 255},    {2, 256, 256},   {5, 257, 256},   {1, 1024, 256},
                                  {1, 2048, 256},   {3, 2304, 256},   {2, 1280, 512},   {2, 4096, 512},  {1, 3072, 1024}, {3, 1024, 1024},
                                  {1, 10240, 2048}, {2, 6144, 2048},  {2, 800, 256},    {3, 1056, 256},  {4, 300, 100},   {2, 129, 64},
                                  {1, 640, 128},    {2, 4096, 4096},  {1, 768, 768},    {2, 1000, 1000}, {2, 4352, 4352}, {1, 9000, 9000},
                                  {2, 4097, 4097},  {1, 20480, 5120}, {2, 12800, 5120}, {3, 5001, 5001}, {1, 16384, 256}, {1, 20000, 6144}};
// Long enough for every kernel to loop.
inline constexpr Case kLongCases[] = {{1, 106496, 256}, {3, 51200, 256}, {2, 140000, 140000}, {600, 100, 50}};

// Each returns the number of comparisons.
int64_t check_group_quantize();
int64_t check_group_variance();
int64_t check_sign_mask();
int64_t check_smooth();
int64_t check_allocate_bits();
int64_t check_weight();
int64_t check_diffq();
int64_t check_weight_binary();
int64_t check_weight_dorefa();
int64_t check_packed();
int64_t check_binary();
int64_t check_integer();

}  // namespace cuda_on_host
