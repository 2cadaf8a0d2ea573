// The Python module fastlane_ext._C: what was built, what runs, what was counted, and the short way to a network's
// call. The operators are not here: they register themselves with torch's dispatcher when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/cpu/dispatch.h"
#include "network_call.h"
#include "ops/policy.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isa", [] { return std::string(fastlane::kernels().isa); });
  m.def("compiled_isas", &fastlane::compiled_isas);
  m.def("supported_isas", &fastlane::supported_isas);
  m.def("stats", [] {
    const auto s = fastlane::policy::stats();
    py::dict fused;
    fused["forward"] = s.fused_forward;
    fused["backward"] = s.fused_backward;
    py::dict result;
    result["fused"] = fused;
    py::dict by_library;
    by_library["forward"] = s.library_forward;
    by_library["backward"] = s.library_backward;
    result["library"] = by_library;
    result["fallback"] = s.fallback;
    return result;
  });
  m.def("reset_stats", &fastlane::policy::reset_stats);
  m.def("leave_fused_path", &fastlane::policy::leave_fused_path);
  fastlane::prepare_network_calls();
  m.def("run_plain_network", &fastlane::run_plain_network);
}
