// The pybind11 module quantize._C: what was built, which ISA runs, a faster way to ops, and the allocator. Ops themselves are the
// dispatcher's and need no entry here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "activation/packed_strides.h"
#include "core/cpu_isa.h"
#include "core/without_cuda.h"
#include "layers/direct.h"
#include "mixed_precision/bind.h"
#include "packed/bound_op.h"
#include "packed/tape.h"
#include "weight/step.h"

#if defined(__clang__)
#define QUANTIZE_COMPILER "clang " __clang_version__
#else
#define QUANTIZE_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;

namespace {

py::list split(const std::string& words) { return py::str(words).attr("split")(); }

py::dict build_info() {
  py::dict info;
  // First: the package calls this on import, and that is where a bad QUANTIZE_ISA is refused.
  info["cpu_isa"] = quantize::isa_name(quantize::cpu_isa());
  info["version"] = QUANTIZE_VERSION;
  info["torch"] = QUANTIZE_TORCH_VERSION;
  info["compiler"] = QUANTIZE_COMPILER;
  info["isas"] = split(QUANTIZE_ISAS);
#ifdef _OPENMP
  info["threads"] = "OpenMP";
#else
  info["threads"] = "one";
#endif
#ifdef QUANTIZE_WITH_CUDA
  info["cuda"] = QUANTIZE_CUDA_VERSION;
  info["cuda_archs"] = QUANTIZE_CUDA_ARCHS;
  info["cuda_reason"] = py::none();
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
  info["cuda_reason"] = QUANTIZE_CUDA_REASON;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
#ifndef QUANTIZE_WITH_CUDA
  quantize::refuse_cuda();
#endif
  quantize::packed::define_bound_op(m);
  quantize::packed::define_tape(m);
  quantize::mixed_precision::define_allocate(m);
  quantize::weight::define_step(m);
  quantize::layers::define_direct(m);
  m.def(
      "packed_strides",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
        return quantize::activation::packed_strides<int64_t>(sizes, strides);
      },
      py::arg("sizes"), py::arg("strides"), "The strides that a packed tensor decodes to.");
  m.def("build_info", &build_info, "What this extension was compiled with; `cuda_reason` says why it has no CUDA kernels.");
  m.def(
      "cpu_isa", [] { return quantize::isa_name(quantize::cpu_isa()); }, "The ISA in force: portable, avx2, avx512 or amx.");
  m.def(
      "supported_isas",
      [] {
        py::list names;
        for (quantize::Isa isa : quantize::supported_isas()) names.append(quantize::isa_name(isa));
        return names;
      },
      "Every ISA this machine runs, slowest first.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { quantize::set_cpu_isa(quantize::parse_isa(name, "set_cpu_isa: name")); },
      py::arg("name"), "Replaces the ISA in force; for tests and benchmarks that compare them in one process.");
}
