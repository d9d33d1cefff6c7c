// sign_mask: a clip with its mask, in place as well, and the mask's application.
#include "activation/sign_mask_kernels.h"

#include "harness.h"

namespace sanitize {
namespace {

using quantize::Isa;
using quantize::activation::Clip;
using quantize::activation::mask_bytes;
using quantize::activation::MaskKernels;

const MaskKernels& kernels(Isa isa, int scalar) {
#ifdef QUANTIZE_X86
  if (isa >= Isa::avx512) return quantize::activation::mask_kernels_avx512[scalar];
  if (isa == Isa::avx2) return quantize::activation::mask_kernels_avx2[scalar];
#endif
  return quantize::activation::mask_kernels_portable[scalar];
}

template <typename T>
int64_t check(Isa isa, Fence fence) {
  constexpr float kNoEnd = std::numeric_limits<float>::quiet_NaN();
  const MaskKernels &k = kernels(isa, int(T::scalar)), &portable = kernels(Isa::portable, int(T::scalar));
  int64_t count = 0;
  for (int64_t n : kSizes) {
    Buffer<T> x(n, fence), y(n, fence), want(n, fence);
    Buffer<uint8_t> mask(mask_bytes(n), fence), want_mask(mask_bytes(n), fence);
    for (Pattern pattern : kPatterns) {
      for (const Clip& clip : {Clip{0.f, kNoEnd, 0.f}, {-0.25f, 0.5f, 0.f}, {0.f, kNoEnd, 0.01f}}) {
        const std::string what =
            "n " + std::to_string(n) + ", pattern " + kPatternNames[int(pattern)] + ", slope " + std::to_string(clip.slope);
        fill(x, pattern);
        portable.clip(x.data(), n, clip, want.data(), want_mask.data());
        k.clip(x.data(), n, clip, y.data(), mask.data());
        expect_same(y, want, "clip: " + what);
        expect_same(mask, want_mask, "clip's mask: " + what);
        k.clip(x.data(), n, clip, x.data(), mask.data());
        expect_same(x, want, "clip in place: " + what);

        fill(x, pattern);
        portable.apply(x.data(), want_mask.data(), n, 1.f, clip.slope, want.data());
        k.apply(x.data(), mask.data(), n, 1.f, clip.slope, y.data());
        expect_same(y, want, "apply: " + what);
        count += 4;
      }
    }
  }
  return count;
}

}  // namespace

int64_t check_sign_mask(Isa isa, Fence fence) { return check<F32>(isa, fence) + check<F16>(isa, fence) + check<BF16>(isa, fence); }

}  // namespace sanitize
