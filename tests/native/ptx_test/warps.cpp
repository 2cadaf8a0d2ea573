#include "lines.h"

namespace ptx::test {
namespace {

Lines each_lane(const std::string& text) {
  Lines lines{kEachThread + text + "\nst.global.u64 [%r71], %r9;", {}};
  lines.out_words = 32, lines.shared_bytes = 1024;
  return lines;
}

void shuffles() {
  const Words by_index = each_lane("add.s32 %r1, %r70, 100; shfl.sync.idx.b32 %r9|%p1, %r1, 5, 31, -1;").run();
  const Words butterfly = each_lane("shfl.sync.bfly.b32 %r9, %r70, 16, 31, -1;").run();
  const Words modulo = each_lane("shfl.sync.bfly.b32 %r9, %r70, 33, 31, -1;").run();
  for (uint64_t n = 0; n < 32; ++n) CHECK(by_index[n] == 105 && butterfly[n] == (n ^ 16) && modulo[n] == (n ^ 1));
  // Half a warp among itself; then from a lane that does not call.
  const std::string half = "mov.u32 %r9, 0; setp.lt.u32 %p1, %r70, 16; ";
  const Words lower = each_lane(half + "@%p1 shfl.sync.bfly.b32 %r9, %r70, 1, 31, 65535;").run();
  for (uint64_t n = 0; n < 32; ++n) CHECK(lower[n] == (n < 16 ? n ^ 1 : 0));
  CHECK(holds(each_lane(half + "@%p1 shfl.sync.bfly.b32 %r9, %r70, 16, 31, 65535;").error(), "takes no part"));
  CHECK(holds(each_lane(half + "@%p1 shfl.sync.bfly.b32 %r9, %r70, 1, 31, -1;").error(), "deadlock"));
  CHECK(holds(each_lane(half + "@!%p1 shfl.sync.bfly.b32 %r9, %r70, 1, 31, 65535;").error(), "not in its mask"));
}

void elections() {
  const Words elected = each_lane("elect.sync %r1|%p1, -1; selp.b32 %r9, 1, 0, %p1;").run();
  uint64_t leaders = 0;
  for (const uint64_t each : elected) leaders += each;
  CHECK(leaders == 1);
}

// Row r, column c of matrix q holds 256 q + 16 r + c, in 16 bits, at 128 q + 16 r + 2 c.
uint64_t element(uint64_t q, uint64_t row, uint64_t column) { return 256 * q + 16 * row + column; }

void matrices() {
  // Lane n writes row n % 8 of matrix n / 8 as its four words, and names the row's address, %r3.
  std::string rows =
      "mov.u64 %r0, memory; mul.wide.u32 %r3, %r70, 16; add.s64 %r3, %r0, %r3; shr.u32 %r4, %r70, 3; shl.b32 %r4, "
      "%r4, 8;\n"
      "and.b32 %r5, %r70, 7; shl.b32 %r5, %r5, 4; add.s32 %r4, %r4, %r5;\n";
  for (int pair = 0; pair < 4; ++pair)
    rows += "add.s32 %r5, %r4, " + std::to_string(2 * pair) +
            "; add.s32 %r6, %r5, 1; mov.b32 %r7, {%r5, %r6}; st.shared.u32 [%r3+" + std::to_string(4 * pair) +
            "], %r7;\n";
  rows += "bar.sync 0;\n";
  const std::string halves = "add.s32 %r3, %r3, 512; ";
  for (uint64_t q = 0; q < 4; ++q) {
    const std::string take = "mov.u32 %r9, %r1" + std::to_string(q) + ";";
    const std::string plain = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];";
    const Words loaded = each_lane(rows + plain + take).run();
    const Words transposed =
        each_lane(rows + "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];" + take)
            .run();
    // ldmatrix loads the same matrices after stmatrix has stored them.
    const Words again =
        each_lane(rows + plain + halves +
                  "stmatrix.sync.aligned.x4.m8n8.shared.b16 [%r3], {%r10, %r11, %r12, %r13}; bar.sync 0;\n"
                  "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];" +
                  take)
            .run();
    for (uint64_t lane = 0; lane < 32; ++lane) {
      const uint64_t row = lane / 4, first = lane % 4 * 2;
      CHECK(loaded[lane] == (element(q, row, first) | element(q, row, first + 1) << 16));
      CHECK(transposed[lane] == (element(q, first, row) | element(q, first + 1, row) << 16));
      CHECK(again[lane] == loaded[lane]);
    }
  }
  CHECK(holds(
      each_lane(rows +
                "add.s32 %r3, %r3, 8; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r3];")
          .error(),
      "shared memory: 16 bytes"));
}

}  // namespace

void warps() {
  shuffles();
  elections();
  matrices();
}

}  // namespace ptx::test
