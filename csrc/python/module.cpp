// The Python module fastlane_ext._C: facts about the build and the CPU, counters, and calls without Python in
// between. The operators are not here: they register themselves with torch's dispatcher when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cuda/hopper/hopper.h"
#include "ops/dense/stack_products.h"
#include "ops/frozen.h"
#include "ops/packed_weight.h"
#include "ops/path.h"
#include "ops/policy.h"
#include "python/facts.h"
#include "python/gemm_plans.h"
#include "python/network_call.h"
#include "python/plain_call.h"
#include "python/plain_module.h"
#include "python/plan_call.h"
#include "python/profile.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isa", [] { return fastlane::chosen_isa().isa; });
  m.def("cpu_isa_reason", [] { return fastlane::chosen_isa().reason; });
  m.def("choose_isa", [](const std::string& asked, const std::vector<std::string>& supported) {
    const fastlane::IsaChoice choice = fastlane::choose_isa(asked, supported);
    return std::pair(choice.isa, choice.reason);
  });
  m.def("compiled_isas", &fastlane::compiled_isas);
  m.def("supported_isas", &fastlane::supported_isas);
  m.def("gemm_plan", &fastlane::gemm_plan);
  m.def("cpu_is_measured", &fastlane::cpu_is_measured);
  m.def("set_profile", &fastlane::python::set_profile);
  m.def("fuses", &fastlane::python::fuses);
  m.def("stats", [] {
    const auto s = fastlane::policy::stats();
    py::dict result;
    for (size_t path = 0; path < fastlane::kPaths; ++path) {
      py::dict counts;
      counts["forward"] = s.forward[path];
      counts["backward"] = s.backward[path];
      result[fastlane::kPathNames[path]] = counts;
    }
    result["fallback"] = s.fallback;
    return result;
  });
  m.def("reset_stats", &fastlane::policy::reset_stats);
  m.def("count", &fastlane::policy::count);
  m.def("force_hopper_tile", [](int64_t cols) {
    const auto& tiles = fastlane::cuda::kHopperTiles;
    const bool known = std::any_of(std::begin(tiles), std::end(tiles),
                                   [&](auto tile) { return fastlane::cuda::tile_cols(tile) == cols; });
    if (cols != 0 && !known)
      throw py::value_error("cols: got " + std::to_string(cols) + ", expected 128, 192, 256, or 0 for no force");
    fastlane::force_hopper_tile_cols(cols);
  });
  m.def("leave_fused_path", &fastlane::policy::leave_fused_path);
  m.def("is_disabled", [] { return fastlane::policy::why_disabled() != nullptr; });
  // An attribute, because torch.compile can guard on an attribute and recompile when it changes.
  m.attr("any_disabled") = false;
  m.def("disable", [module = m.ptr()](bool on) {
    const bool any = fastlane::policy::disable(on) > 0;
    py::handle(module).attr("any_disabled") = any;
  });
  m.def("set_strict", &fastlane::policy::set_strict);
  m.def("freeze_weight", &fastlane::freeze_weight);
  m.def("is_frozen", [](const at::Tensor& weight) -> std::optional<bool> {
    const fastlane::Frozen state = fastlane::frozen_state(weight);
    return state == fastlane::Frozen::absent ? std::nullopt : std::optional(state == fastlane::Frozen::used);
  });
  m.def("pack_weight", &fastlane::pack_weight);
  m.def("unpack_weight", &fastlane::unpacked_weight);
  m.def("read_packed_weight", [](const at::Tensor& packed) {
    fastlane::PackedWeight w;
    const std::string fault = fastlane::read_packed(packed, w);
    TORCH_CHECK(fault.empty(), "data", fault);
    return py::make_tuple(w.out_features, w.in_features, w.dtype, w.kernels);
  });
  m.def("stack_backward_products", &fastlane::stack_backward_products);
  fastlane::python::prepare();
  fastlane::policy::set_dtensor_test(&fastlane::python::is_dtensor);
  m.def("run_plain_network", &fastlane::run_plain_network);
  m.def("run_plain_residual_mlp", &fastlane::run_plain_residual_mlp);
  m.def("run_plain_layer", &fastlane::run_plain_layer);
  m.def("run_plain_mlp", &fastlane::run_plain_mlp);
  m.def("is_as_planned", &fastlane::is_as_planned);
  m.def("set_absent", &fastlane::python::set_absent);
  m.def("hold", [](const py::handle& facts) { return fastlane::python::hold(facts.ptr()); });
  m.def("is_watched", &fastlane::python::is_watched);
  m.def("know_activations", &fastlane::know_activations);
  m.def("know_networks", &fastlane::know_networks);
  m.def("know_mlps", &fastlane::know_mlps);
}
