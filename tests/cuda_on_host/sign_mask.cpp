// clip_mask, apply_mask and pack_mask: the CUDA kernels against the specification's scalar functions.
#include "activation/sign_mask.cuh"

#include "harness.h"

namespace cuda_on_host {
namespace {

using namespace quantize::activation;

constexpr int64_t kSizes[] = {1, 7, 8, 9, 151, 1023, 1024, 1025, 8192, 20001};

template <typename T>
void check(int64_t n, Pattern pattern, size_t offset, Clip clip) {
  const std::string what = "sign_mask: type " + std::to_string(int(T::scalar)) + ", n " + std::to_string(n) + ", pattern " +
                           std::to_string(int(pattern)) + ", offset " + std::to_string(offset);
  const Buffer<T> x(n, offset), y(n, offset), out(n, offset);
  const Buffer<uint8_t> mask(mask_bytes(n), offset);
  fill(x, pattern);
  std::vector<T> want(n);
  std::vector<uint8_t> want_mask(mask_bytes(n));
  simt::Launcher launch(1);
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x.data()[i]);
    want[i] = round_nearest(clip_value(value, clip), T{});
    want_mask[i / 8] |= uint8_t(clip_passes(value, clip) << (i % 8));
  }
  launch_clip_mask(static_cast<const T*>(x.data()), n, clip, y.data(), mask.data(), launch);
  expect_same_values(y.data(), want, what + ": y");
  expect_same(mask.data(), want_mask, what + ": mask");
  for (int64_t i = 0; i < n; ++i)
    want[i] = round_nearest(masked_value(to_float(x.data()[i]), want_mask[i / 8] >> (i % 8) & 1, 1.25f, clip.slope), T{});
  launch_apply_mask(static_cast<const T*>(x.data()), static_cast<const uint8_t*>(mask.data()), n, 1.25f, clip.slope, out.data(), launch);
  expect_same_values(out.data(), want, what + ": applied");
  launch_clip_mask(static_cast<const T*>(x.data()), n, clip, x.data(), mask.data(), launch);
  expect_same(mask.data(), want_mask, what + ": mask in place");
  for (int64_t i = 0; i < n; ++i)
    if (word_of(x.data()[i]) != word_of(y.data()[i])) fail(what + ": in place");
}

void check_booleans(int64_t n, size_t offset) {
  const Buffer<uint8_t> source(n, offset), mask(mask_bytes(n), offset);
  std::vector<uint8_t> want(mask_bytes(n));
  for (int64_t i = 0; i < n; ++i) {
    source.data()[i] = quantize::hash32(uint32_t(i)) & 1;
    want[i / 8] |= uint8_t(source.data()[i] << (i % 8));
  }
  simt::Launcher launch(1);
  launch_pack_mask(source.data(), n, mask.data(), launch);
  expect_same(mask.data(), want, "pack_mask: n " + std::to_string(n));
}

}  // namespace

int64_t check_sign_mask() {
  int64_t count = 0;
  for (int64_t n : kSizes)
    for (size_t offset : {0, 1}) {
      check_booleans(n, offset);
      for (Pattern pattern : {Pattern::noise, Pattern::zeros, Pattern::poisoned, Pattern::huge}) {
        check<F32>(n, pattern, offset, Clip{0.f, NAN, 0.f}), check<F32>(n, pattern, offset, Clip{-0.5f, 1.f, 0.01f});
        check<BF16>(n, pattern, offset, Clip{0.f, NAN, 0.f}), check<BF16>(n, pattern, offset, Clip{-0.5f, 1.f, 0.01f});
        check<F16>(n, pattern, offset, Clip{0.f, NAN, 0.f}), check<F16>(n, pattern, offset, Clip{-0.5f, 1.f, 0.01f});
        count += 6;
      }
    }
  return count;
}

}  // namespace cuda_on_host
