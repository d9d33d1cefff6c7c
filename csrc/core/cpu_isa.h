// Which instruction set the CPU kernels use: detected once, forced by QUANTIZE_ISA=portable|avx2|avx512|amx. Torch-free.
#pragma once

#include <string>
#include <vector>

namespace quantize {

// Ordered: a machine that supports one supports all before it. `avx2` also means fma, f16c and bmi2; `avx512` also means the
// f, bw, vl and dq parts on top of `avx2`; `amx` also VNNI and AMX's 8-bit tiles. The flags that setup.py gives to *_avx2.cpp, *_avx512.cpp
// and *_amx.cpp are exactly these. Kernels that have nothing to gain from tiles have no *_amx.cpp.
enum class Isa { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

inline constexpr int isa_count = 4;

// Of tables of kernels name_portable, name_avx2 and name_avx512 the one for an ISA. A macro: where the latter two are not built, nothing
// may name them.
#ifdef QUANTIZE_X86
#define QUANTIZE_BY_ISA(isa, name) ((isa) >= Isa::avx512 ? name##_avx512 : (isa) == Isa::avx2 ? name##_avx2 : name##_portable)
#else
#define QUANTIZE_BY_ISA(isa, name) ((void)(isa), name##_portable)
#endif

// The ISA in force. Throws std::invalid_argument when QUANTIZE_ISA is unknown or this machine cannot run it.
Isa cpu_isa();

// Whether the ISA in force is avx512 or more and the machine has its VNNI (8-bit dot products), for *_avx512vnni.cpp.
bool cpu_has_vnni();

// The same of its VPOPCNTDQ (popcounts of 64-bit words), for *_avx512vpopcntdq.cpp.
bool cpu_has_vpopcntdq();

// Every ISA that was built and that this machine and its operating system can run; portable first.
std::vector<Isa> supported_isas();

// Replaces the ISA in force, for tests that compare all of them in one process. Throws std::invalid_argument if unsupported.
void set_cpu_isa(Isa isa);

const char* isa_name(Isa isa);

// The inverse of isa_name. `source` names the culprit in the error: "QUANTIZE_ISA", "set_cpu_isa: name".
Isa parse_isa(const std::string& name, const std::string& source);

}  // namespace quantize
