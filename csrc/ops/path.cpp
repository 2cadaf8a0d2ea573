#include "ops/path.h"

#include <ATen/cpu/Utils.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels/cpu/dispatch.h"
#include "ops/profile.h"

namespace fastlane {
namespace {

std::optional<Path> read_forced_path() {
  const char* text = std::getenv("FASTLANE_PATH");
  const std::string value = text ? text : "";
  if (value == "fused") return Path::fused;
  if (value == "library") return Path::library;
  TORCH_CHECK_VALUE(value.empty(), "FASTLANE_PATH: got '", value,
                    "', expected fused or library; unset it to let fastlane_ext choose");
  return std::nullopt;
}

bool cpu_has(const char* capability) {
  const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto found = capabilities.find(capability);
  return found != capabilities.end() && found->second.isBool() && found->second.toBool();
}

// One tdpbf16ps does 8192 multiply-adds (a tile of 16 × 16, 32 along k), one vdpbf16ps 32, and the library uses
// tiles. From 128 products an element on, tiles should outweigh another pass over the result: an estimate, not
// measured.
bool library_has_tiles(const LayerShape& shape) {
  static const bool bf16 = cpu_has("amx_bf16"), f16 = cpu_has("amx_fp16");
  return ((shape.dtype == DType::bf16 && bf16) || (shape.dtype == DType::f16 && f16)) && shape.in_features >= 128 &&
         shape.out_features >= 128;
}

// If no cache holds a bf16 weight and there are more rows than inner products take, the time goes into fetching the
// weight. The library fetches better if it has vdpbf16ps; without, it was slower.
// Measured on AMD Zen 5, eager's time / fused, forward: 128 × 4096² 0.76–0.92, 512 × 4096² 0.73–0.95, but
// 2048 × 4096² 1.08. On Zen 4: 17 and 24 × 4096² 1.28–1.34, 32 × 4096² 0.98.
bool streams_weight(const LayerShape& shape) {
  static const bool measured = cpu_has("avx512_bf16");
  return measured && shape.dtype == DType::bf16 && shape.rows > 24 && shape.rows <= 1024 &&
         shape.in_features * shape.out_features * 2 >= (int64_t{32} << 20);
}

// One row's dW is an outer product, and its dx reads W once: a tile could use no value twice. Measured at
// 1 × 1024², eager's time / fused and / library: fp32 0.76 and 1.28, fp64 0.82 and 1.02.
bool is_outer_product(const LayerShape& shape) {
  return shape.rows == 1 && shape.in_features * shape.out_features >= 128 * 128;
}

// A product in 16 bits takes a library without instructions for them several times as long as ours: 6 to 40 times on
// Zen 3. No other core changes that.
bool library_is_slow(DType dtype) {
  static const bool has_bf16 = cpu_has("avx512_bf16") || cpu_has("amx_bf16") || chosen_isa().isa == "neon";
  static const bool has_f16 = cpu_has("avx512_fp16") || cpu_has("amx_fp16") || chosen_isa().isa == "neon";
  return (dtype == DType::bf16 && !has_bf16) || (dtype == DType::f16 && !has_f16);
}

// What FASTLANE_PATH or the profile says.
std::optional<bool> told_to_fuse(Work work, const LayerShape& shape) {
  if (const std::optional<Path> forced = forced_path()) return *forced == Path::fused;
  return fused_won(work, shape);
}

// `library_wins` is true if a rule above says so. On a CPU that nobody has measured, the library's product and one
// pass of ours are what should be no slower than eager.
bool fuses_by_rule(const LayerShape& shape, bool library_wins) {
  return !library_wins && (cpu_is_measured() || library_is_slow(shape.dtype));
}

std::atomic<int64_t> hopper_tile_cols = 0;

}  // namespace

std::optional<Path> forced_path() {
  static const std::optional<Path> forced = read_forced_path();
  return forced;
}

int64_t forced_hopper_tile_cols() { return hopper_tile_cols; }
void force_hopper_tile_cols(int64_t cols) { hopper_tile_cols = cols; }

bool torch_runs_on_cpu() {
  static const bool runs = [] {
    if (chosen_isa().isa != kNoIsa) return false;
    TORCH_CHECK_VALUE(forced_path() != Path::fused, "FASTLANE_PATH: got 'fused', expected library or nothing where ",
                      "fastlane_ext.cpu_isa() is '", kNoIsa, "' (", chosen_isa().reason,
                      "); set FASTLANE_CPU_ISA=scalar for the scalar kernels");
    return true;
  }();
  return runs;
}

bool cpu_is_measured() {
  // Who chooses the scalar set wants to see the set run.
  static const bool measured = chosen_isa().isa == "scalar" || core_is_zen3_to_zen5();
  return measured;
}

bool fuses_forward(const LayerShape& shape) {
  if (const auto told = told_to_fuse(Work::layer_forward, shape)) return *told;
  return fuses_by_rule(shape, library_has_tiles(shape) || streams_weight(shape));
}
bool fuses_backward(const LayerShape& shape) {
  if (const auto told = told_to_fuse(Work::layer_backward, shape)) return *told;
  return fuses_by_rule(shape, library_has_tiles(shape) || streams_weight(shape) || is_outer_product(shape));
}

// The time of the weight itself over the time of its panels, on AMD Zen 5, float32, one thread, at 768 to 4096
// features. AVX-512: 1 to 4 rows 0.55 to 0.94, 8 to 48 rows 0.95 to 1.5, more 0.9 to 1.1 (1,024 rows 1.0 to 1.15).
// AVX2: 1 and 2 rows 0.6 to 1.0, 4 to 24 rows 0.95 to 1.3, more 0.87 to 1.0.
bool reads_frozen_panels(int64_t rows) {
  if (const std::optional<Path> forced = forced_path()) return *forced == Path::fused;
  // On an unmeasured CPU the library's product is what cannot lose.
  if (!cpu_is_measured()) return false;
  static const bool is_avx512 = chosen_isa().isa.rfind("avx512", 0) == 0, is_avx2 = chosen_isa().isa == "avx2";
  return (is_avx512 && rows > 4) || (is_avx2 && rows >= 4 && rows <= 24);
}

bool fuses_mlp_forward(const LayerShape& fc1, const LayerShape& fc2) {
  if (const auto told = told_to_fuse(Work::mlp_forward, fc1)) return *told;
  return fuses_forward(fc1) && fuses_forward(fc2);
}
bool fuses_mlp_backward(const LayerShape& fc1, const LayerShape& fc2) {
  if (const auto told = told_to_fuse(Work::mlp_backward, fc1)) return *told;
  return fuses_backward(fc1) && fuses_backward(fc2);
}

bool fuses_stack(const StackProblem& p) {
  const auto shape_of = [&](const StackLayer& l) {
    return LayerShape{p.rows, l.in_features, l.out_features, p.dtype};
  };
  const auto is_smaller = [](const StackLayer& a, const StackLayer& b) {
    return a.in_features * a.out_features < b.in_features * b.out_features;
  };
  const StackLayer* const end = p.layers + p.count;
  const StackLayer* const largest = std::max_element(p.layers, end, is_smaller);
  if (largest != end)
    if (const auto told = told_to_fuse(Work::stack, shape_of(*largest))) return *told;
  return std::all_of(p.layers, end, [&](const StackLayer& l) { return fuses_forward(shape_of(l)); });
}

}  // namespace fastlane
