#include "python/gemm_plans.h"

#include "kernels/cpu/dispatch.h"
#include "python/dtypes.h"

namespace fastlane {
namespace {

namespace py = pybind11;

const char* name_of(GemmMethod method) {
  switch (method) {
    case GemmMethod::inner_products: return "inner_products";
    case GemmMethod::axpy: return "axpy";
    case GemmMethod::panel_rows: return "panel_rows";
    case GemmMethod::tiles: break;
  }
  return "tiles";
}

}  // namespace

py::dict gemm_plan(const std::string& isa, const std::string& dtype, int64_t m, int64_t n, int64_t k,
                   std::array<int64_t, 2> a_strides, std::array<int64_t, 2> b_strides, int64_t threads,
                   std::array<int64_t, 3> caches) {
  const KernelTable* const table = kernels_of(isa);
  if (!table) throw py::value_error("isa: got '" + isa + "', expected one of supported_isas()");
  GemmProblem p;
  p.m = m, p.n = n, p.k = k, p.dtype = parsed_dtype(dtype);
  p.a = {nullptr, a_strides[0], a_strides[1]}, p.b = {nullptr, b_strides[0], b_strides[1]};
  Parallel parallel;
  parallel.threads = threads, parallel.caches = {caches[0], caches[1], caches[2]};
  const GemmPlan plan = table->plan(p, parallel);
  py::dict result;
  result["method"] = name_of(plan.method);
  result["threads"] = plan.threads;
  result["transposed"] = plan.transposed;
  result["a_in_place"] = plan.a_in_place;
  result["b_in_place"] = plan.b_in_place;
  result["b_panels_in_l2"] = plan.b_panels_in_l2;
  result["own_blocks"] = plan.own_blocks;
  result["k_blocks"] = plan.k_blocks;
  result["col_blocks"] = plan.col_blocks;
  result["block_cols"] = plan.block_cols;
  result["slab_blocks"] = plan.slab_blocks;
  result["pass_values"] = plan.pass_steps * plan.facts.k_per_step;
  result["task_row_panels"] = plan.task_row_panels;
  result["tile_rows"] = plan.facts.tile_rows;
  result["tile_cols"] = plan.facts.tile_cols;
  result["unit_bytes"] = plan.facts.unit_bytes;
  result["k_per_step"] = plan.facts.k_per_step;
  result["chain_values"] = plan.facts.chain_steps * plan.facts.k_per_step;
  result["block_values"] = plan.facts.block_steps * plan.facts.k_per_step;
  result["text"] = describe(plan);
  return result;
}

}  // namespace fastlane
