#include <cmath>

#include "lines.h"

namespace ptx::test {
namespace {

void accesses() {
  Lines vectors{
      "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%in]; st.global.v2.u32 [%out], {%r3, %r0};\n"
      "ld.global.u16 %r4, [%in+2]; st.global.u64 [%out+8], %r4;",
      {0x0002000100000000, 0x0000000400000003}};
  vectors.out_words = 2;
  CHECK(vectors.run() == (Words{0x0000000000000004, 0}));
  vectors.in[0] = 0x0000000200070001;
  CHECK(vectors.run() == (Words{0x0007000100000004, 7}));
  CHECK(holds(Lines{"ld.global.u32 %r0, [%in+2];", {0}}.error(), "a misaligned address"));
  CHECK(holds(Lines{"ld.global.v2.u64 {%r0, %r1}, [%in+8];", {0, 0, 0}}.error(), "a misaligned address"));
  CHECK(holds(Lines{"ld.global.u64 %r0, [%in+8];", {0}}.error(), "stray read"));
  CHECK(holds(Lines{"ld.global.u32 %r0, [%in+-4];", {0}}.error(), "stray read"));
  CHECK(holds(Lines{"st.global.u32 [%in], %r0;", {0}}.error(), "stray write"));
  const Lines beyond{"ld.param.u64 %r0, [k_param_1+8];", {0}};
  CHECK(holds(beyond.error(), "beyond the parameter"));
  const std::string by_register = "mov.b64 %r1, k_param_1; ld.param.u64 %r0, [%r1";
  CHECK(Lines({by_register + "]; st.global.u64 [%r0], %r0;", {}}).run()[0] != 0);
  CHECK(holds(Lines{by_register + "+32];", {}}.error(), "beyond the parameter"));
  CHECK(holds(Lines{"ld.param.u64 %r0, [k_param_2];", {0}}.error(), "unknown parameter"));
}

void shared_memory() {
  const std::string place = "mov.u64 %r0, memory; ";
  Lines shared{place +
                   "ld.global.u64 %r1, [%in]; st.shared.u64 [%r0+8], %r1; ld.shared.u32 %r2, [%r0+12];\n"
                   "st.global.u64 [%out], %r2;",
               {0x500000006}};
  shared.shared_bytes = 16;
  CHECK(shared.run()[0] == 5);
  shared.shared_bytes = 8;
  CHECK(holds(shared.error(), "shared memory: 8 bytes"));
  CHECK(holds(Lines{place + "ld.shared.u32 %r1, [%r0+-8];", {}}.error(), "shared memory: 4 bytes"));
  // A kernel's own shared memory lies before what the launch gives.
  Lines both{
      ".shared .align 8 .b8 own[24];\nmov.u64 %r0, own; mov.u64 %r1, memory; sub.s64 %r2, %r1, %r0;\n"
      "st.global.u64 [%out], %r2;",
      {}};
  both.shared_bytes = 8;
  CHECK(both.run()[0] == 32);
}

// A register or shared memory that nobody wrote holds NaN, read as any kind of float.
void poison() {
  Lines unwritten{
      "st.global.u64 [%out], %r5; mov.u64 %r0, memory; ld.shared.u64 %r1, [%r0];\n"
      "st.global.u64 [%out+8], %r1;",
      {}};
  unwritten.out_words = 2, unwritten.shared_bytes = 8;
  for (const uint64_t bits : unwritten.run()) {
    CHECK(std::isnan(std::bit_cast<double>(bits)) && std::isnan(as_f32(bits)));
    CHECK((bits & 0x7fff) > 0x7f80 && (bits & 0x7fff) > 0x7c00);
  }
}

// From %in to shared memory in 16 bytes, or as many zeros.
Lines copy(const std::string& present, const std::string& after) {
  Lines lines{"mov.u64 %r0, memory; mov.u32 %r2, " + present +
                  "; cp.async.cg.shared.global [%r0], [%in], 16, %r2;\ncp.async.commit_group; " + after +
                  "\nld.shared.u64 %r1, [%r0+8]; st.global.u64 [%out], %r1; cp.async.wait_group 0;",
              {1, 2}};
  lines.shared_bytes = 32;
  return lines;
}

void asynchronous_copies() {
  const std::string wait = "cp.async.wait_group 0;";
  CHECK(copy("16", wait).run()[0] == 2 && copy("0", wait).run()[0] == 0);
  CHECK(copy("16", "").run()[0] == ~0ull);  // not there yet
  CHECK(copy("16", "cp.async.commit_group; cp.async.wait_group 1;").run()[0] == 2);  // the first group alone
  CHECK(copy("16", "cp.async.wait_group 1;").run()[0] == ~0ull);
  CHECK(holds(copy("8", wait).error(), "cp.async: other than 16 bytes or none"));
  Lines short_of_memory = copy("16", wait);
  short_of_memory.in = {1};
  CHECK(holds(short_of_memory.error(), "stray read"));
  Lines forgotten{"mov.u64 %r0, memory; cp.async.cg.shared.global [%r0], [%in], 16, 16;", {1, 2}};
  forgotten.shared_bytes = 16;
  CHECK(holds(forgotten.error(), "a cp.async was not waited for"));
}

}  // namespace

void memory() {
  accesses();
  shared_memory();
  poison();
  asynchronous_copies();
}

}  // namespace ptx::test
