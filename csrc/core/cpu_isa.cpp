// What the processor has and the operating system saves, by cpuid and xgetbv; x86 alone has more than `portable`.
#include "cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef QUANTIZE_X86
#include <cpuid.h>
#endif
#if defined(QUANTIZE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quantize {
namespace {

#ifdef QUANTIZE_X86
// Bits of ecx in leaf 7.
constexpr unsigned vnni = 1u << 11, vpopcntdq = 1u << 14;

// Which register files the operating system saves on a context switch; a CPU flag alone does not make ymm or zmm usable.
unsigned xcr0() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Tiles are a process's only once it has asked for them: Linux keeps no room for their 8 KiB otherwise.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

Isa detect() {
  constexpr unsigned avx_state = 0x6;      // XCR0: xmm and ymm
  constexpr unsigned avx512_state = 0xe6;  // and the mask registers, zmm0-15 upper halves, zmm16-31
  constexpr unsigned tile_state = 0x60000;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::portable;
  constexpr unsigned leaf1 = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
  if ((ecx & leaf1) != leaf1 || (xcr0() & avx_state) != avx_state) return Isa::portable;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::portable;
  constexpr unsigned avx2 = bit_AVX2 | bit_BMI2;
  if ((ebx & avx2) != avx2) return Isa::portable;
  constexpr unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  if ((ebx & avx512) != avx512 || (xcr0() & avx512_state) != avx512_state) return Isa::avx2;
  constexpr unsigned amx = 1u << 24 | 1u << 25;  // of edx: tiles and their 8-bit products
  if (!(ecx & vnni) || (edx & amx) != amx || (xcr0() & tile_state) != tile_state || !may_use_tiles()) return Isa::avx512;
  return Isa::amx;
}

bool detect_part(unsigned bit) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ecx & bit);
}
#else
Isa detect() { return Isa::portable; }
constexpr unsigned vnni = 0, vpopcntdq = 0;
bool detect_part(unsigned) { return false; }
#endif

std::string supported_names() {
  std::string names;
  for (Isa isa : supported_isas()) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa require_supported(Isa isa, const std::string& source) {
  if (isa > supported_isas().back())
    throw std::invalid_argument(source + " must be an ISA this machine runs (" + supported_names() + "); got " + isa_name(isa));
  return isa;
}

Isa initial() {
  const char* forced = std::getenv("QUANTIZE_ISA");
  if (forced == nullptr || *forced == '\0') return supported_isas().back();
  return require_supported(parse_isa(forced, "QUANTIZE_ISA"), "QUANTIZE_ISA");
}

// A function-local static: kernels may be registered by static initializers of other files that run before this one's.
std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa cpu_isa() { return current().load(std::memory_order_relaxed); }

bool cpu_has_vnni() {
  static const bool there = detect_part(vnni);
  return there && cpu_isa() >= Isa::avx512;
}

bool cpu_has_vpopcntdq() {
  static const bool there = detect_part(vpopcntdq);
  return there && cpu_isa() >= Isa::avx512;
}

std::vector<Isa> supported_isas() {
  static const Isa best = detect();
  std::vector<Isa> isas;
  for (int isa = 0; isa <= static_cast<int>(best); ++isa) isas.push_back(static_cast<Isa>(isa));
  return isas;
}

void set_cpu_isa(Isa isa) { current().store(require_supported(isa, "set_cpu_isa: name")); }

const char* isa_name(Isa isa) {
  static constexpr const char* names[isa_count] = {"portable", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

Isa parse_isa(const std::string& name, const std::string& source) {
  for (int isa = 0; isa < isa_count; ++isa)
    if (name == isa_name(static_cast<Isa>(isa))) return static_cast<Isa>(isa);
  throw std::invalid_argument(source + " must be one of portable, avx2, avx512, amx; got '" + name + "'");
}

}  // namespace quantize
