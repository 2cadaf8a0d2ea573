#include "lines.h"

namespace ptx::test {
namespace {

std::string error_of(const std::string& text) {
  try {
    parse(text);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}
std::string error_of_body(const std::string& body) {
  return error_of(".entry k()\n{\n.reg .b32 %r<4>;\n" + body + "\nret;\n}\n");
}

void refusals() {
  CHECK(error_of_body("add.s32 %r0, %r1, 2;") == "no error");
  CHECK(holds(error_of_body("add.s77 %r0, %r1, 2;"), "PTX, line 4: unknown opcode add.s77"));
  CHECK(holds(error_of_body(".local .b32 %x;"), "line 4: unknown directive .local"));
  CHECK(holds(error_of_body("@%p1 add.s32 %r0, %r1, 2;"), "line 4: unknown guard"));
  CHECK(holds(error_of_body("add.s32 %r0, symbol, 2;"), "line 4: unknown name symbol"));
  CHECK(holds(error_of_body("bra nowhere;"), "no label nowhere"));
  CHECK(holds(error_of_body("add.s32 %r0, %r1, 12x;"), "line 4: not a number: 12x"));
  CHECK(holds(error_of_body("add.s32 %r0, %r1 2;"), "expected ;"));
  CHECK(holds(error_of_body("add.s32 %r0, %r1, 0x1ffffffffffffffff;"), "line 4: not a number"));
  CHECK(holds(error_of(".entry k()\n{\n.reg .b32 %r<4>;\nadd.s32 %r0, %r1, 2;\n}\n"), "does not end"));
  CHECK(holds(error_of(".entry k()\n{\nbra over;\nret;\nover:\n}\n"), "does not end"));
}

void syntax() {
  // Comments, labels before a statement, guards, results that nobody wants.
  CHECK(Lines({"mov.u32 %r0, 1; // mov.u32 %r0, 2;\nsetp.eq.s32 %p0, %r0, 1; @!%p0 bra $L__end; @%p0 add.s32 %r0, "
               "%r0, 4;\n"
               "add.s32 _, %r0, 9;\n$L__end: st.global.u64 [%out], %r0;",
               {}})
            .run()[0] == 5);
  // Inline assembly has registers and labels of its own.
  CHECK(Lines({"mov.u32 %r0, 1;\n{ .reg .b32 %r0; mov.u32 %r0, 9; bra.uni done; mov.u32 %r1, 0; done: add.s32 %r1, "
               "%r0, 1; }\n"
               "{ done: add.s32 %r0, %r0, %r1; }\nst.global.u64 [%out], %r0;",
               {}})
            .run()[0] == 11);
  // Numbers: decimal, negative, hexadecimal, octal, bits of a float and of a double.
  CHECK(Lines({"mov.u32 %r0, -2; add.s32 %r0, %r0, 0x10; add.s32 %r0, %r0, 010; st.global.u64 [%out], %r0;", {}})
            .run()[0] == 22);
  CHECK(Lines({"mov.f32 %r0, 0f40400000; add.f32 %r0, %r0, 0f3F800000; st.global.u64 [%out], %r0;", {}}).run()[0] ==
        f32(4));
  CHECK(Lines({"mov.f64 %r0, 0d4008000000000000; st.global.u64 [%out], %r0;", {}}).run()[0] == f64(3));
  const auto kernels = parse(".entry first() { ret; }\n.entry second() { .reg .b32 %r<3>; mov.u32 %r0, 1; ret; }");
  CHECK(kernels.size() == 2 && kernels.at("first").code.size() == 1 && kernels.at("second").registers == 3);
}

void launches() {
  Lines numbers{
      "mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r0, %r0, %r1, %r2;\n"
      "mul.wide.u32 %r1, %r0, 8; add.s64 %r1, %out, %r1; mov.u32 %r2, %nctaid.x; add.s32 %r0, %r0, %r2;\n"
      "st.global.u64 [%r1], %r0;",
      {}};
  numbers.threads = 64, numbers.blocks = 3, numbers.out_words = 192;
  const Words out = numbers.run();
  for (uint64_t n = 0; n < 192; ++n) CHECK(out[n] == n + 3);
  numbers.threads = 33;
  CHECK(holds(numbers.error(), "grid, cluster and block do not fit"));
  const std::string where = Lines{"mov.u32 %r0, %clock;", {}}.error();
  CHECK(holds(where, "block 0, thread ") && holds(where, "PTX line 6, mov.u32: special register %clock"));
}

}  // namespace

void programs() {
  refusals();
  syntax();
  launches();
}

}  // namespace ptx::test
