#include "ops/path.h"

#include <ATen/cpu/Utils.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels/cpu/dispatch.h"

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

// No Arm CPU has been measured. So the library computes products there, and one pass of ours follows; together they
// should be no slower than eager.
bool isa_is_measured() {
  static const bool measured = chosen_isa().isa != "neon";
  return measured;
}

bool fuses(bool library_wins) {
  const std::optional<Path> forced = forced_path();
  return forced ? forced == Path::fused : isa_is_measured() && !library_wins;
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

bool fuses_forward(const LayerShape& shape) { return fuses(library_has_tiles(shape) || streams_weight(shape)); }

bool fuses_backward(const LayerShape& shape) {
  return fuses(library_has_tiles(shape) || streams_weight(shape) || is_outer_product(shape));
}

}  // namespace fastlane
