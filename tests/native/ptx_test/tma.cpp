#include <cstring>

#include "lines.h"
#include "ptx/tensor_map.h"

namespace ptx::test {
namespace {

// Two planes of 10 rows of 70 elements of 16 bits, 72 elements apart, and boxes of 8 rows of 64 elements.
struct Tensor {
  static constexpr int64_t kColumns = 70, kRows = 10, kApart = 72, kBoxBytes = 1024;
  std::vector<uint16_t> elements = std::vector<uint16_t>(2 * kRows * kApart, 0xeeee);
  TensorMap map{};

  Tensor() {
    map.base = reinterpret_cast<uint8_t*>(elements.data());
    map.rank = 3, map.element_bytes = 2, map.swizzle_bits = 3, map.mark = TensorMap::kMark;
    const uint64_t sizes[] = {kColumns, kRows, 2}, strides[] = {2 * kApart, 2 * kApart * kRows};
    const uint16_t box[] = {64, 8, 1};
    std::memcpy(map.sizes, sizes, sizeof sizes), std::memcpy(map.strides, strides, sizeof strides);
    std::memcpy(map.box, box, sizeof box);
  }

  uint16_t& at(int64_t column, int64_t row, int64_t plane) {
    return elements[(plane * kRows + row) * kApart + column];
  }
  void number() {
    for (int64_t plane = 0; plane < 2; ++plane)
      for (int64_t row = 0; row < kRows; ++row)
        for (int64_t column = 0; column < kColumns; ++column) at(column, row, plane) = number_of(column, row, plane);
  }
  static uint16_t number_of(int64_t column, int64_t row, int64_t plane) {
    return static_cast<uint16_t>(1 + column + 100 * row + 1000 * plane);
  }
  static bool has(int64_t column, int64_t row) { return column >= 0 && column < kColumns && row >= 0 && row < kRows; }
};

// Where an element of a box lies with rows of 128 bytes: their pieces of 16 bytes change places from row to row.
size_t place_in_box(int64_t column, int64_t row) { return row * 64 + ((column / 8) ^ row) * 8 + column % 8; }

// %r0: the box in shared memory, with an mbarrier behind the box; %r1: the map; %p0: whether this is thread 0.
const std::string kBegin =
    kEachThread +
    "mov.u64 %r0, memory; add.s64 %r2, %r0, 1024; ld.global.u64 %r1, [%in]; setp.eq.s32 %p0, %r70, 0;\n";
const std::string kInitialise = "@%p0 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;\n";
const std::string kExpect = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 %r3, [%r2], 1024;\n";
const std::string kLoad = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes";
const std::string kWait = "$L__wait:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra $L__wait;\n";
// The box to %out, 1,024 bytes for each block.
const std::string kCopyOut =
    "mov.u32 %r4, %cluster_ctarank; mul.wide.u32 %r4, %r4, 1024; mul.wide.u32 %r5, %r70, 32; add.s64 %r6, %out, "
    "%r4;\n"
    "add.s64 %r6, %r6, %r5; add.s64 %r5, %r0, %r5; ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r5];\n"
    "ld.shared.v4.u32 {%r14, %r15, %r16, %r17}, [%r5+16]; st.global.v4.u32 [%r6], {%r10, %r11, %r12, %r13};\n"
    "st.global.v4.u32 [%r6+16], {%r14, %r15, %r16, %r17};\n";

std::string coordinates(int64_t column, int64_t row, int64_t plane) {
  return "[%r1, {" + std::to_string(column) + ", " + std::to_string(row) + ", " + std::to_string(plane) + "}]";
}

Lines lines_on(const Tensor& tensor, const std::string& text, bool writes = false) {
  Lines lines{kBegin + text, {reinterpret_cast<uint64_t>(&tensor.map)}};
  lines.shared_bytes = 1040, lines.out_words = 128;
  lines.memory = {{tensor.elements.data(), tensor.elements.size() * 2, writes}};
  return lines;
}

bool is_box(const uint64_t* words, int64_t column0, int64_t row0, int64_t plane) {
  uint16_t box[Tensor::kBoxBytes / 2];
  std::memcpy(box, words, sizeof box);
  for (int64_t row = 0; row < 8; ++row)
    for (int64_t column = 0; column < 64; ++column) {
      const bool inside = Tensor::has(column0 + column, row0 + row);
      const uint16_t expected = inside ? Tensor::number_of(column0 + column, row0 + row, plane) : 0;
      if (box[place_in_box(column, row)] != expected) return false;
    }
  return true;
}

void loads() {
  Tensor tensor;
  tensor.number();
  const auto load = [](const std::string& place, const std::string& to = "[%r0]") {
    return "@%p0 " + kLoad + ".L2::cache_hint " + to + ", " + place + ", [%r2], 0;\n";
  };
  for (const auto& [column, row, plane] : {std::tuple{0, 0, 0}, {6, 2, 1}, {8, 4, 1}, {-8, -3, 0}}) {
    const std::string place = coordinates(column, row, plane);
    Lines lines = lines_on(tensor, kInitialise + kExpect + load(place) + kWait + kCopyOut);
    for (lines.seed = 0; lines.seed < 6; ++lines.seed) CHECK(is_box(lines.run().data(), column, row, plane));
  }
  const std::string corner = coordinates(0, 0, 0);
  bool comes_late = false, comes_too_late = false;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    // Read before the wait, and never waited for.
    Lines early = lines_on(tensor, kInitialise + kExpect + load(corner) + kCopyOut + kWait);
    Lines never = lines_on(tensor, kInitialise + kExpect + load(corner));
    early.seed = never.seed = seed;
    comes_late = comes_late || !is_box(early.run().data(), 0, 0, 0);
    comes_too_late = comes_too_late || holds(never.error(), "ended");
  }
  CHECK(comes_late && comes_too_late);
  const auto error = [&](const std::string& text) {
    return lines_on(tensor, kInitialise + kExpect + text + kWait).error();
  };
  CHECK(holds(error(load(corner, "[%r0+128]")), "does not suit the swizzle"));
  CHECK(holds(error(load("[%r1, {0, 0}]")), "TMA: tensor map"));
  CHECK(holds(error("add.s64 %r1, %r1, 8; " + load(corner)), "TMA: tensor map"));
  CHECK(holds(error(""), "deadlock"));
  Lines stray = lines_on(tensor, kInitialise + kExpect + load(corner) + kWait);
  stray.memory[0].bytes -= 2000;
  CHECK(holds(stray.error(), "stray read"));
}

// Block 0 loads for both blocks.
void multicast() {
  Tensor tensor;
  tensor.number();
  const std::string barrier = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;\n";
  Lines lines =
      lines_on(tensor, kInitialise + kExpect + barrier +
                           "mov.u32 %r5, %cluster_ctarank; mov.u16 %r7, 3; setp.ne.s32 %p3, %r5, 0; not.pred %p3, "
                           "%p3; and.pred %p3, %p3, %p0;\n@%p3 " +
                           kLoad + ".multicast::cluster.L2::cache_hint [%r0], " + coordinates(3, 1, 0) +
                           ", [%r2], %r7, 0;\n" + kWait + kCopyOut + barrier);
  lines.blocks = 2, lines.one_cluster = true, lines.out_words = 256;
  for (lines.seed = 0; lines.seed < 10; ++lines.seed) {
    const Words out = lines.run();
    CHECK(is_box(out.data(), 3, 1, 0) && is_box(out.data() + 128, 3, 1, 0));
  }
}

// Each thread fills 32 bytes of the box with elements of 7.
std::string fill_and_store(const std::string& fence, const std::string& place, const std::string& wait) {
  std::string text = "mul.wide.u32 %r5, %r70, 32; add.s64 %r5, %r0, %r5; mov.u32 %r4, 0x70007;\n";
  for (int n = 0; n < 2; ++n)
    text += "st.shared.v4.u32 [%r5+" + std::to_string(16 * n) + "], {%r4, %r4, %r4, %r4};\n";
  return text + fence + "bar.sync 0;\n@%p0 cp.async.bulk.tensor.3d.global.shared::cta.bulk_group " + place +
         ", [%r0];\n@%p0 cp.async.bulk.commit_group;\n" + wait;
}

void stores() {
  const std::string fence = "fence.proxy.async.shared::cta;\n", wait = "@%p0 cp.async.bulk.wait_group.read 0;\n";
  for (const auto& [column, row] : {std::pair{0, 0}, {8, 4}, {-8, -3}})
    for (uint64_t seed = 0; seed < 4; ++seed) {
      Tensor tensor;
      Lines lines = lines_on(tensor, fill_and_store(fence, coordinates(column, row, 1), wait), true);
      lines.seed = seed;
      lines.run();
      bool right = true;
      for (int64_t plane = 0; plane < 2; ++plane)
        for (int64_t r = 0; r < Tensor::kRows; ++r)
          for (int64_t c = 0; c < Tensor::kApart; ++c) {
            const bool inside =
                plane == 1 && Tensor::has(c, r) && c >= column && c < column + 64 && r >= row && r < row + 8;
            right = right && tensor.at(c, r, plane) == (inside ? 7 : 0xeeee);
          }
      CHECK(right);
    }
  Tensor tensor;
  const auto error = [&](const std::string& text) { return lines_on(tensor, text, true).error(); };
  const std::string corner = coordinates(0, 0, 0);
  CHECK(holds(error(fill_and_store("", corner, wait)), "without a fence.proxy.async since"));
  // A fence of the storing thread alone helps: that of thread 0 comes for its own 32 bytes only.
  CHECK(holds(error(fill_and_store("@%p0 " + fence, corner, wait)), "without a fence.proxy.async since"));
  bool is_asked_for = false;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Lines never = lines_on(tensor, fill_and_store(fence, corner, ""), true);
    never.seed = seed;
    is_asked_for = is_asked_for || holds(never.error(), "a TMA store may still read");
  }
  CHECK(is_asked_for);
  CHECK(holds(lines_on(tensor, fill_and_store(fence, corner, wait)).error(), "stray write"));
}

}  // namespace

void tma() {
  loads();
  multicast();
  stores();
}

}  // namespace ptx::test
