// Which products the Hopper kernels take, and with which tile.
#include "kernels/cuda/hopper.h"

#include "check.h"
#include "kernels/layer.h"

using namespace fastlane;
using namespace fastlane::cuda;

namespace {

char* const kAligned = reinterpret_cast<char*>(uintptr_t{1} << 20);
constexpr Gpu kH100{90, 132};

// y = gelu(x Wᵀ + b) + r with z stored, all operands dense.
GemmProblem forward(int64_t rows, int64_t in, int64_t out, DType dtype = DType::bf16) {
  return forward_gemm({rows, in, out, dtype}, {kAligned, in, 1}, {kAligned, in, 1}, kAligned, Activation::gelu,
                      {kAligned, out}, {kAligned, out}, {kAligned, out});
}
GemmProblem dgrad(int64_t rows, int64_t in, int64_t out, DType dtype = DType::bf16) {
  return dgrad_gemm({rows, in, out, dtype}, {kAligned, out, 1}, {kAligned, in, 1}, {kAligned, in}, {kAligned, in});
}
// dz = (dz' W + dh) ⊙ gelu′(z), with dh stored too and db summed.
GemmProblem backward_through(int64_t rows, int64_t in, int64_t out, DType dtype = DType::bf16) {
  GemmProblem p = through_activation(dgrad(rows, in, out, dtype), Activation::gelu, {kAligned, in}, kAligned);
  p.unscaled = {kAligned, in};
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
  CHECK(changed(good, [](P& p) { p.addend = {}, p.z = {}, p.bias = nullptr; }) == HopperKind::forward);
  CHECK(changed(good, [](P& p) { p.bias = kAligned + 2; }) == HopperKind::forward);
  // Sizes that TMA does not take.
  CHECK(hopper_kind(forward(100, 60, 128)) == HopperKind::none);
  CHECK(hopper_kind(forward(100, 64, 124)) == HopperKind::none);
  CHECK(hopper_kind(forward(100, 0, 128)) == HopperKind::none);
  CHECK(hopper_kind(forward(int64_t{1} << 31, 64, 128)) == HopperKind::none);
  CHECK(hopper_kind(forward((int64_t{1} << 31) - 1, 64, 128)) == HopperKind::forward);
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
  CHECK(changed(good, [](P& p) { p.addend.row_stride = 0; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.addend.data = kAligned + 4; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.out.data = kAligned + 4; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.z.row_stride = 132; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.slope = p.z; }) == HopperKind::none);
  CHECK(changed(dgrad(100, 64, 128), [](P& p) { p.bias = kAligned; }) == HopperKind::none);
  CHECK(changed(dgrad(100, 64, 128), [](P& p) { p.activation = Activation::gelu; }) == HopperKind::none);
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
  CHECK(changed(good, [](P& p) { p.unscaled = {}, p.addend = {}; }) == taken);
  CHECK(changed(good, [](P& p) { p.column_sums = nullptr; }) == taken);
  CHECK(changed(good, [](P& p) { p.column_sums = kAligned + 2; }) == taken);
  CHECK(changed(good, [](P& p) { p.activation = Activation::gelu_tanh; }) == taken);
  CHECK(changed(good, [](P& p) { p.activation = Activation::none; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.preactivation = {}; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.preactivation.data = kAligned + 2; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.unscaled.row_stride = 68; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.b = {kAligned, 1, 128}; }) == HopperKind::none);  // W stored by columns
  CHECK(changed(good, [](P& p) { p.bias = kAligned; }) == HopperKind::none);
  CHECK(changed(good, [](P& p) { p.z = p.unscaled; }) == HopperKind::none);
}

void test_choice() {
  CHECK(hopper_tile(forward(4096, 4096, 4096), HopperKind::forward, kH100) == HopperTile::m128n256);
  CHECK(hopper_tile(forward(1024, 4096, 1024), HopperKind::forward, kH100) == HopperTile::m128n128);
  CHECK(hopper_tile(forward(65536, 1024, 128), HopperKind::forward, kH100) == HopperTile::m128n128);
  CHECK(hopper_tile(forward(65536, 1024, 384), HopperKind::forward, kH100) == HopperTile::m128n128);
  CHECK(hopper_tile(forward(65536, 1024, 400), HopperKind::forward, kH100) == HopperTile::m128n256);
  CHECK(is_worth_a_hopper_kernel(forward(32768, 768, 768), HopperKind::forward, kH100));
  CHECK(is_worth_a_hopper_kernel(forward(1024, 4096, 1152), HopperKind::forward, kH100));
  CHECK(!is_worth_a_hopper_kernel(forward(1024, 4096, 1024), HopperKind::forward, kH100));
  CHECK(!is_worth_a_hopper_kernel(forward(16, 4096, 4096), HopperKind::forward, kH100));
  CHECK(!is_worth_a_hopper_kernel(forward(4096, 4096, 4096), HopperKind::forward, {80, 108}));
  CHECK(!is_worth_a_hopper_kernel(forward(4096, 4096, 4096), HopperKind::forward, {100, 148}));
  CHECK(is_worth_a_hopper_kernel(forward((int64_t{1} << 31) - 1, 64, 1 << 20), HopperKind::forward, kH100));
  // Through an activation with the wide tile, where that is the better one.
  const HopperKind through = HopperKind::through_activation;
  CHECK(hopper_tile(backward_through(8, 64, 128), through, kH100) == HopperTile::m128n256);
  CHECK(is_worth_a_hopper_kernel(backward_through(8192, 4096, 1024), through, kH100));
  CHECK(is_worth_a_hopper_kernel(backward_through(16896, 256, 1024), through, kH100));
  CHECK(!is_worth_a_hopper_kernel(backward_through(16768, 256, 1024), through, kH100));
  CHECK(!is_worth_a_hopper_kernel(backward_through(65536, 128, 1024), through, kH100));
  CHECK(!is_worth_a_hopper_kernel(backward_through(8192, 4096, 1024), through, {100, 148}));
}

void test_workspace() {
  const GemmProblem p = backward_through(129, 264, 64);
  CHECK(hopper_workspace(p, HopperTile::m128n256) == 2 * 512 * 4);
  CHECK(hopper_workspace(p, HopperTile::m128n128) == 2 * 384 * 4);
  CHECK(hopper_workspace(backward_through((int64_t{1} << 31) - 1, (int64_t{1} << 31) - 8, 64),
                         HopperTile::m128n256) == (int64_t{1} << 24) * (int64_t{1} << 31) * 4);
  CHECK(hopper_workspace(dgrad(129, 264, 64), HopperTile::m128n256) == 0);
}

}  // namespace

int main() {
  test_kinds();
  test_through_activation();
  test_workspace();
  test_choice();
  return failures != 0;
}
