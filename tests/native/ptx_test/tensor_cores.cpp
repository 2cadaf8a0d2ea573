#include <array>
#include <cstring>

#include "lines.h"
#include "ptx/instructions.h"

namespace ptx::test {
namespace {

// Small integers: every product and sum is exact.
double a_of(size_t m, size_t k) { return static_cast<double>((3 * m + 5 * k) % 7) - 3; }
double b_of(size_t n, size_t k) { return static_cast<double>((2 * n + 3 * k) % 5) - 2; }
double product(size_t m, size_t n, size_t depth) {
  double sum = 0;
  for (size_t k = 0; k < depth; ++k) sum += a_of(m, k) * b_of(n, k);
  return sum;
}

// The operands of a wgmma: A has 64 rows and begins where shared memory does; B has 128 rows and begins 8 KiB later.
struct Operands {
  static constexpr size_t kBytes = 24 << 10, kOfB = 8 << 10;
  size_t element_bytes = 2, depth = 16;
  bool along_k = true;
  uint16_t (*to_16_bits)(float) = to_bf16;

  // In rows of 128 bytes, of which each eight form a block of 1,024; pieces of 16 bytes change places from row to
  // row.
  size_t place(size_t mn, size_t k) const {
    size_t row = mn, byte = k * element_bytes, block = mn / 8 * 1024;
    if (!along_k) row = k, byte = mn % 64 * element_bytes, block = k / 8 * 1024 + mn / 64 * 2048;
    return block + row % 8 * 128 + ((byte / 16) ^ row % 8) * 16 + byte % 16;
  }

  Words words() const {
    std::vector<uint8_t> bytes(kBytes, 0xff);
    const auto put = [&](size_t at, double value) {
      if (element_bytes == 2) {
        const uint16_t bits = to_16_bits(static_cast<float>(value));
        std::memcpy(&bytes[at], &bits, 2);
      } else {
        // TF32 has no use for the last 13 bits.
        const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value)) | 0x1fff;
        std::memcpy(&bytes[at], &bits, 4);
      }
    };
    for (size_t k = 0; k < depth; ++k) {
      for (size_t m = 0; m < 64; ++m) put(place(m, k), a_of(m, k));
      for (size_t n = 0; n < 128; ++n) put(kOfB + place(n, k), b_of(n, k));
    }
    Words all(kBytes / 8);
    std::memcpy(all.data(), bytes.data(), kBytes);
    return all;
  }

  // The leading distance is 2,048 bytes, the stride 1,024, the swizzle one of 128 bytes.
  static std::string descriptor(size_t offset, uint64_t changed = 0) {
    const uint64_t start = (kSharedBase + offset) >> 4;
    return std::to_string((start | 128ull << 16 | 64ull << 32 | 1ull << 62) ^ changed);
  }
};

// Threads fill shared memory, multiply, and store their 64 registers of D, %r100 and following.
Lines warpgroup(const Operands& operands, const std::string& multiply) {
  std::string text = kEachThread + "mov.u64 %r0, memory;\n";
  for (size_t n = 0; n < Operands::kBytes / 1024; ++n)
    text += "mul.wide.u32 %r1, %r70, 8; add.s64 %r1, %r1, " + std::to_string(1024 * n) +
            "; add.s64 %r2, %in, %r1; ld.global.u64 %r3, [%r2]; add.s64 %r2, %r0, %r1; st.shared.u64 [%r2], %r3;\n";
  text += "fence.proxy.async.shared::cta; bar.sync 0;\n" + multiply +
          "\nmul.wide.u32 %r1, %r70, 512; add.s64 %r1, %out, %r1;\n";
  for (int j = 0; j < 64; ++j)
    text += "st.global.u64 [%r1+" + std::to_string(8 * j) + "], %r" + std::to_string(100 + j) + ";\n";
  Lines lines{text, operands.words()};
  lines.threads = 128, lines.out_words = 128 * 64, lines.shared_bytes = Operands::kBytes;
  return lines;
}

std::string wgmma(const std::string& kind, const std::string& rest, uint64_t changed = 0) {
  std::string d;
  for (int j = 0; j < 64; ++j) d += (j ? ", %r" : "%r") + std::to_string(100 + j);
  return "mov.u64 %r80, " + Operands::descriptor(0, changed) + "; mov.u64 %r81, " +
         Operands::descriptor(Operands::kOfB) + ";\nwgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned." + kind +
         " {" + d + "}, %r80, %r81, " + rest + ";\n";
}
const std::string kCommit = "wgmma.commit_group.sync.aligned;\n", kWait = "wgmma.wait_group.sync.aligned 0;\n";

// Thread t has of each eight columns two, of the rows 16 · warp + t / 4 and eight rows below.
bool is_product(const Words& out, size_t depth, double times) {
  for (size_t t = 0; t < 128; ++t)
    for (size_t j = 0; j < 64; ++j) {
      const size_t m = t / 32 * 16 + t % 32 / 4 + (j % 4 < 2 ? 0 : 8), n = j / 4 * 8 + t % 4 * 2 + j % 2;
      if (as_f32(out[t * 64 + j]) != static_cast<float>(times * product(m, n, depth))) return false;
    }
  return true;
}

void products_of_warpgroups() {
  const std::string bf16 = "m64n128k16.f32.bf16.bf16", f16 = "m64n128k16.f32.f16.f16",
                    tf32 = "m64n128k8.f32.tf32.tf32";
  const Operands plain, halves{2, 16, true, to_f16}, wide{4, 8, true}, across{2, 16, false};
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const auto right = [&](const Operands& operands, const std::string& multiply, double times) {
      Lines lines = warpgroup(operands, multiply);
      lines.seed = seed;
      return is_product(lines.run(), operands.depth, times);
    };
    const std::string once = wgmma(bf16, "0, 1, 1, 0, 0"), again = wgmma(bf16, "1, 1, 1, 0, 0");
    CHECK(right(plain, once + kCommit + kWait, 1));
    CHECK(right(halves, wgmma(f16, "0, 1, 1, 0, 0") + kCommit + kWait, 1));
    CHECK(right(wide, wgmma(tf32, "0, 1, 1") + kCommit + kWait, 1));
    CHECK(right(across, wgmma(bf16, "0, 1, 1, 1, 1") + kCommit + kWait, 1));
    // In the order of the instructions, in one group or two.
    CHECK(right(plain, once + again + kCommit + again + kCommit + kWait, 3));
    CHECK(right(plain, once + kCommit + "wgmma.wait_group.sync.aligned 1;\n" + again + kCommit + kWait, 2));
  }
  // Read before the wait.
  bool comes_late = false;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    Lines early = warpgroup(plain, wgmma(bf16, "0, 1, 1, 0, 0") + kCommit);
    early.text += kWait, early.seed = seed;
    comes_late = comes_late || !is_product(early.run(), 16, 1);
  }
  CHECK(comes_late);
  const auto error = [&](const std::string& multiply) { return warpgroup(plain, multiply).error(); };
  const std::string rest = "0, 1, 1, 0, 0";
  CHECK(holds(error(wgmma(bf16, "0, -1, 1, 0, 0")), "a negated operand"));
  CHECK(holds(error(wgmma(bf16, rest, 1ull << 62)), "a layout without swizzle"));
  CHECK(holds(error(wgmma(bf16, rest, 1ull << 49)), "a base offset"));
  CHECK(holds(error(wgmma(bf16, rest, 8)), "off the swizzle's pattern"));
  std::string one_other = wgmma(bf16, rest);
  one_other.insert(one_other.find("wgmma.fence"), "setp.eq.s32 %p1, %r70, 5; @%p1 add.s64 %r80, %r80, 64;\n");
  CHECK(holds(error(one_other), "operands differ between threads"));
  Lines unfenced = warpgroup(plain, wgmma(bf16, rest) + kCommit + kWait);
  unfenced.text.erase(unfenced.text.find("fence.proxy"), std::string("fence.proxy.async.shared::cta;").size());
  CHECK(holds(unfenced.error(), "without a fence.proxy.async since"));
  bool is_asked_for = false;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Lines never = warpgroup(plain, wgmma(bf16, rest) + kCommit);
    never.seed = seed;
    is_asked_for = is_asked_for || holds(never.error(), "a wgmma was not waited for");
  }
  CHECK(is_asked_for);
}

// One warp's product of 16 × 8, with fragments as the manual draws them, in registers of `per` elements.
template <class Pack>
void product_of_a_warp(const std::string& kind, size_t per, Pack pack) {
  const size_t depth = 8 * per;
  Words in;
  for (size_t lane = 0; lane < 32; ++lane) {
    const size_t g = lane / 4, l = lane % 4;
    for (size_t r = 0; r < 4; ++r) in.push_back(pack(a_of, g + r % 2 * 8, l * per + r / 2 * 4 * per));
    for (size_t r = 0; r < 2; ++r) in.push_back(pack(b_of, g, l * per + r * 4 * per));
  }
  std::string text = kEachThread +
                     "mul.wide.u32 %r1, %r70, 48; add.s64 %r1, %in, %r1; mul.wide.u32 %r2, %r70, 32;\n"
                     "add.s64 %r2, %out, %r2; mov.f32 %r20, 0f3F800000;\n";
  for (int r = 0; r < 6; ++r)
    text += "ld.global.u64 %r" + std::to_string(10 + r) + ", [%r1+" + std::to_string(8 * r) + "];\n";
  text += "mma.sync.aligned." + kind +
          " {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r20, %r20, %r20, %r20};\n";
  for (int r = 0; r < 4; ++r)
    text += "st.global.u64 [%r2+" + std::to_string(8 * r) + "], %r" + std::to_string(30 + r) + ";\n";
  Lines lines{text, in};
  lines.out_words = 128;
  const Words out = lines.run();
  for (size_t lane = 0; lane < 32; ++lane)
    for (size_t r = 0; r < 4; ++r) {
      const size_t row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      CHECK(as_f32(out[lane * 4 + r]) == static_cast<float>(1 + product(row, column, depth)));
    }
}

void products_of_warps() {
  const auto pairs = [](auto to_16_bits) {
    return [to_16_bits](auto of, size_t row, size_t k) {
      const uint32_t low = to_16_bits(static_cast<float>(of(row, k)));
      return uint64_t{low | static_cast<uint32_t>(to_16_bits(static_cast<float>(of(row, k + 1)))) << 16};
    };
  };
  product_of_a_warp("m16n8k16.row.col.f32.bf16.bf16.f32", 2, pairs(to_bf16));
  product_of_a_warp("m16n8k16.row.col.f32.f16.f16.f32", 2, pairs(to_f16));
  product_of_a_warp("m16n8k8.row.col.f32.tf32.tf32.f32", 1,
                    [](auto of, size_t row, size_t k) { return f32(static_cast<float>(of(row, k))) | 0x1fff; });
  // Rounded toward zero: to nearest, 1 + 3 · 2⁻²⁵ would be 1 + 2⁻²³.
  const uint64_t a = to_bf16(0x1.8p-12f), b = to_bf16(0x1p-12f);
  for (const auto& [sign, expected] : {std::pair{1.0f, 1.0f}, {-1.0f, -1 + 0x1p-23f}}) {
    Lines lines{
        "mov.u32 %r0, 0; ld.global.u64 %r1, [%in]; ld.global.u64 %r2, [%in+8]; ld.global.u64 %r3, [%in+16];\n"
        "mov.u32 %r4, %tid.x; and.b32 %r5, %r4, 3; setp.eq.s32 %p1, %r5, 0; selp.b32 %r1, %r1, 0, %p1;\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r6, %r7, %r8, %r9}, {%r1, %r0, %r0, %r0}, {%r2, %r0}, "
        "{%r3, %r3, %r3, %r3};\nst.global.u64 [%out], %r6;",
        {a, b, f32(sign)}};
    CHECK(as_f32(lines.run()[0]) == expected);
  }
}

}  // namespace

void tensor_cores() {
  products_of_warpgroups();
  products_of_warps();
}

}  // namespace ptx::test
