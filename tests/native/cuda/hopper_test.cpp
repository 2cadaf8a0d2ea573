// Which products the Hopper kernels take, and with which tile.
#include "kernels/cuda/hopper/hopper.h"

#include "check.h"
#include "kernels/layer.h"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

char* const kAligned = reinterpret_cast<char*>(uintptr_t{1} << 20);
constexpr Gpu kH100{90, 132};

// y = gelu(x Wᵀ + b) + r with z stored, all operands dense.
GemmProblem forward(int64_t rows, int64_t in, int64_t out, DType dtype = DType::bf16) {
  return forward_gemm({rows, in, out, dtype}, {kAligned, in, 1}, {{kAligned, in, 1}, {}}, kAligned, Activation::gelu,
                      {kAligned, out}, {kAligned, out}, {kAligned, out});
}
GemmProblem dgrad(int64_t rows, int64_t in, int64_t out, DType dtype = DType::bf16) {
  return dgrad_gemm({rows, in, out, dtype}, {kAligned, out, 1}, {kAligned, in, 1}, {kAligned, in}, {kAligned, in});
}
// dz = (dz' W + dh) ⊙ gelu′(z), with dh stored too and db summed.
GemmProblem backward_through(int64_t rows, int64_t in, int64_t out, DType dtype = DType::bf16) {
  GemmProblem p = through_activation(dgrad(rows, in, out, dtype), Activation::gelu, {kAligned, in}, kAligned);
  p.gradient.unscaled = {kAligned, in};
  return p;
}

template <class Change>
HopperKind changed(GemmProblem p, Change change) {
  change(p);
  return hopper_kind(p);
}

void test_kinds() {
  using P = GemmProblem;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    CHECK(hopper_kind(forward(100, 64, 128, dtype)) == HopperKind::forward);
    CHECK(hopper_kind(dgrad(100, 64, 128, dtype)) == HopperKind::dgrad);
  }
  CHECK(hopper_kind(forward(100, 64, 128, DType::f32)) == HopperKind::forward);
  CHECK(hopper_kind(dgrad(100, 64, 128, DType::f32)) == HopperKind::none);
  CHECK(hopper_kind(forward(100, 64, 128, DType::f64)) == HopperKind::none);
  const P good = forward(100, 64, 128);
  CHECK(changed(good, [](P& p) { p.epilogue.addend = {}, p.epilogue.z = {}, p.epilogue.bias = nullptr; }) ==
        HopperKind::forward);
  CHECK(changed(good, [](P& p) { p.epilogue.bias = kAligned + 2; }) == HopperKind::forward);
  // Sizes that TMA does not take.
  CHECK(hopper_kind(forward(100, 60, 128)) == HopperKind::none);
  CHECK(hopper_kind(forward(100, 64, 124)) == HopperKind::none);
  CHECK(hopper_kind(forward(100, 0, 128)) == HopperKind::none);
  CHECK(hopper_kind(forward(kMaxHopperSize + 1, 64, 128)) == HopperKind::none);
  CHECK(hopper_kind(forward(kMaxHopperSize, 64, 128)) == HopperKind::forward);
  // Layouts.
  CHECK(changed(good, [](P& p) { p.a.data = kAligned + 2; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.a = {kAligned, 1, 128}; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.a.row_stride = 72; }) == HopperKind::forward);
  CHECK(changed(good, [](P& p) { p.a.row_stride = 68; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.a.row_stride = 0; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.a.row_stride = -64; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.a.row_stride = int64_t{1} << 39; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.b.data = kAligned + 8; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.b = {kAligned, 128, 1}; }) == HopperKind::none);  // has bias and activation
  CHECK(changed(good, [](P& p) { p.epilogue.addend.row_stride = 0; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.epilogue.addend.data = kAligned + 4; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.epilogue.out.data = kAligned + 4; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.epilogue.z.row_stride = 132; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.epilogue.slope = p.epilogue.z; }) == HopperKind::none);
  CHECK(changed(dgrad(100, 64, 128), [](P& p) { p.epilogue.bias = kAligned; }) == HopperKind::none);
  CHECK(changed(dgrad(100, 64, 128), [](P& p) { p.epilogue.activation = Activation::gelu; }) == HopperKind::none);
}

void test_through_activation() {
  using P = GemmProblem;
  const HopperKind taken = HopperKind::through_activation;
  for (const DType dtype : {DType::bf16, DType::f16})
    CHECK(hopper_kind(backward_through(100, 64, 128, dtype)) == taken);
  CHECK(hopper_kind(backward_through(100, 64, 128, DType::f32)) == HopperKind::none);
  CHECK(hopper_kind(backward_through(0, 64, 128)) == HopperKind::none);
  CHECK(hopper_kind(backward_through(100, 0, 128)) == HopperKind::none);
  const P good = backward_through(100, 64, 128);
  CHECK(changed(good, [](P& p) { p.gradient.unscaled = {}, p.gradient.addend = {}; }) == taken);
  CHECK(changed(good, [](P& p) { p.gradient.column_sums = nullptr; }) == taken);
  CHECK(changed(good, [](P& p) { p.gradient.column_sums = kAligned + 2; }) == taken);
  CHECK(changed(good, [](P& p) { p.gradient.activation = Activation::gelu_tanh; }) == taken);
  CHECK(changed(good, [](P& p) { p.gradient.activation = Activation::none; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.gradient.preactivation = {}; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.gradient.preactivation.data = kAligned + 2; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.gradient.unscaled.row_stride = 68; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.b = {kAligned, 1, 128}; }) == HopperKind::none);  // W stored by columns
  CHECK(changed(good, [](P& p) { p.gradient.out.data = kAligned + 4; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.gradient.addend.row_stride = 0; }) == HopperKind::none);
}

void test_choice() {
  const HopperKind forward_kind = HopperKind::forward, through = HopperKind::through_activation;
  const auto tile_of = [](const GemmProblem& p, int64_t wanted_cols = 0) {
    return hopper_tile(p, hopper_kind(p), kH100, wanted_cols);
  };
  // Long sums hide an epilogue; short ones need another warpgroup to multiply meanwhile.
  CHECK(tile_of(forward(8192, 4096, 4096)) == HopperTile::m128n256);
  CHECK(tile_of(forward(32768, 768, 768)) == HopperTile::m128n192);
  CHECK(tile_of(backward_through(8192, 1024, 4096)) == HopperTile::m128n256);
  CHECK(tile_of(backward_through(8192, 4096, 1024)) == HopperTile::m128n128);
  // A dgrad hardly has an epilogue.
  CHECK(tile_of(dgrad(32768, 768, 768)) == HopperTile::m128n256);
  // Few tiles; columns that no larger tile covers without waste.
  CHECK(tile_of(forward(1024, 1024, 1024)) == HopperTile::m128n128);
  CHECK(tile_of(forward(65536, 1024, 128)) == HopperTile::m128n128);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    for (const HopperKind kind : {forward_kind, HopperKind::dgrad, through})
      CHECK(has_tile(kind, dtype, HopperTile::m128n192) == (kind == forward_kind && dtype != DType::f32));
  CHECK(tile_of(forward(32768, 768, 768, DType::f32)) != HopperTile::m128n192);
  // More of anything takes more time, with every tile.
  for (const HopperTile tile : kHopperTiles) {
    const double cycles = hopper_cycles(forward(4096, 1024, 1024), forward_kind, tile, kH100);
    CHECK(hopper_cycles(forward(8192, 1024, 1024), forward_kind, tile, kH100) > cycles);
    CHECK(hopper_cycles(forward(4096, 2048, 1024), forward_kind, tile, kH100) > cycles);
    CHECK(hopper_cycles(forward(4096, 1024, 2048), forward_kind, tile, kH100) > cycles);
    CHECK(hopper_cycles(forward(4096, 1024, 1024, DType::f32), forward_kind, tile, kH100) > cycles);
  }
  CHECK(tile_of(forward(8192, 4096, 4096), 192) == HopperTile::m128n192);
  CHECK(tile_of(dgrad(32768, 768, 768), 192) == HopperTile::m128n256);  // has no such tile
}

void test_worth() {
  CHECK(is_worth_a_hopper_kernel(forward(32768, 768, 768), kH100));
  CHECK(is_worth_a_hopper_kernel(forward(1024, 4096, 1152), kH100));
  CHECK(!is_worth_a_hopper_kernel(forward(1024, 4096, 1024), kH100));
  CHECK(!is_worth_a_hopper_kernel(forward(16, 4096, 4096), kH100));
  CHECK(!is_worth_a_hopper_kernel(forward(4096, 4096, 4096), {80, 108}));
  CHECK(!is_worth_a_hopper_kernel(forward(4096, 4096, 4096), {100, 148}));
  CHECK(is_worth_a_hopper_kernel(forward(kMaxHopperSize, 64, 1 << 20), kH100));
}

void test_workspace() {
  // Two rows of tiles. Eight warps share a tile of 256 columns, four a tile of 128.
  const GemmProblem p = backward_through(129, 264, 64);
  CHECK(hopper_workspace(p, HopperTile::m128n256) == 2 * 8 * 512 * 4);
  CHECK(hopper_workspace(p, HopperTile::m128n128) == 2 * 4 * 384 * 4);
  const int64_t huge = (int64_t{1} << 31) - 1024;
  CHECK(hopper_workspace(backward_through(huge, huge, 64), HopperTile::m128n256) == huge / 128 * 8 * huge * 4);
  CHECK(hopper_workspace(dgrad(129, 264, 64), HopperTile::m128n256) == 0);
}

}  // namespace

int main() {
  test_kinds();
  test_through_activation();
  test_workspace();
  test_choice();
  test_worth();
  return failures != 0;
}
