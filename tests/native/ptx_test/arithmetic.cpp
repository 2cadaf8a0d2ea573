#include <cmath>
#include <limits>

#include "lines.h"

namespace ptx::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const uint64_t kNaN = f32(std::numeric_limits<float>::quiet_NaN());

void floats() {
  CHECK(result_of("add.f32", {f32(0.1f), f32(0.2f)}) == f32(0.1f + 0.2f));
  CHECK(result_of("sub.f32", {f32(1), f32(3)}) == f32(-2));
  CHECK(result_of("mul.rn.f32", {f32(3), f32(0.1f)}) == f32(3 * 0.1f));
  CHECK(result_of("div.rn.f32", {f32(1), f32(3)}) == f32(1.0f / 3));
  CHECK(result_of("add.f64", {f64(0.1), f64(0.2)}) == f64(0.1 + 0.2));
  // One rounding: (1 + 2⁻¹²)² − 1 − 2⁻¹¹ is 2⁻²⁴, which a rounded square loses.
  CHECK(result_of("fma.rn.f32", {f32(1 + 0x1p-12f), f32(1 + 0x1p-12f), f32(-1 - 0x1p-11f)}) == f32(0x1p-24f));
  // 1 + 2⁻³⁰ rounded down and 1 − 2⁻³⁰ rounded down.
  CHECK(result_of("fma.rm.f32", {f32(1), f32(1), f32(0x1p-30f)}) == f32(1));
  CHECK(result_of("fma.rm.f32", {f32(1), f32(1), f32(-0x1p-30f)}) == f32(1 - 0x1p-24f));
  CHECK(result_of("neg.f32", {f32(0)}) == f32(-0.0f));
  CHECK(result_of("abs.f32", {f32(-2)}) == f32(2));
  // The first operand gives the sign.
  CHECK(result_of("copysign.f32", {f32(-1), f32(5)}) == f32(-5));
  // A NaN loses against a number, and −0 is less than +0.
  CHECK(result_of("max.f32", {kNaN, f32(-3)}) == f32(-3) && result_of("max.f32", {f32(-3), kNaN}) == f32(-3));
  CHECK(result_of("max.f32", {f32(-0.0f), f32(0)}) == f32(0) && result_of("max.f32", {f32(0), f32(-0.0f)}) == f32(0));
  CHECK(result_of("rcp.rn.f32", {f32(3)}) == f32(1.0f / 3));
  // With ftz, denormal operands and results become zeros of the same sign.
  CHECK(result_of("rcp.approx.ftz.f32", {f32(-0x1p-127f)}) == f32(-kInfinity));
  CHECK(result_of("rcp.approx.ftz.f32", {f32(-0x1p127f)}) == f32(-0.0f));
  CHECK(result_of("ex2.approx.ftz.f32", {f32(-3)}) == f32(0.125f));
  CHECK(result_of("ex2.approx.ftz.f32", {f32(-127)}) == f32(0));
  // The lower half of the bits is zero.
  const uint64_t third = result_of("rcp.approx.ftz.f64", {f64(3)});
  CHECK(result_of("rcp.approx.ftz.f64", {f64(-0x1.8p1023)}) == f64(-0.0));
  CHECK((third & 0xffffffff) == 0 && std::fabs(std::bit_cast<double>(third) * 3 - 1) < 0x1p-20);
}

void comparisons() {
  for (const auto& [opcode, of_nan, of_less] :
       {std::tuple{"eq", 0, 0}, {"neu", 1, 1}, {"lt", 0, 1}, {"gt", 0, 0}, {"geu", 1, 0}}) {
    const std::string setp = std::string("setp.") + opcode;
    CHECK(result_of(setp + ".f32", {kNaN, f32(1)}) == static_cast<uint64_t>(of_nan));
    CHECK(result_of(setp + ".f64", {f64(1), f64(2)}) == static_cast<uint64_t>(of_less));
  }
  CHECK(result_of("setp.lt.s32", {s32(-1), 1}) == 1 && result_of("setp.lt.u32", {s32(-1), 1}) == 0);
  CHECK(result_of("setp.gt.s64", {~0ull, 1}) == 0 && result_of("setp.gt.u64", {~0ull, 1}) == 1);
  CHECK(result_of("setp.le.s16", {0xffff, 0}) == 1 && result_of("setp.ge.s16", {0x7fff, 0x8000}) == 1);
  // Only the low bits of a register belong to a narrow operand.
  CHECK(result_of("setp.eq.s32", {0x100000005, 5}) == 1 && result_of("setp.ne.b32", {0x100000005, 5}) == 0);
  CHECK(result_of("selp.b32", {7, 9, 1}) == 7 && result_of("selp.f64", {7, 9, 0}) == 9);
  CHECK(result_of("not.pred", {1}) == 0 && result_of("xor.pred", {1, 1}) == 0 && result_of("and.pred", {1, 0}) == 0);
}

void conversions() {
  // Halves are rounded to even.
  CHECK(result_of("cvt.rn.bf16.f32", {f32(1 + 0x1p-8f)}) == 0x3f80);
  CHECK(result_of("cvt.rn.bf16.f32", {f32(1 + 0x3p-8f)}) == 0x3f82);
  CHECK(result_of("cvt.rn.bf16.f32", {f32(std::numeric_limits<float>::max())}) == 0x7f80);
  CHECK(result_of("cvt.rn.f16.f32", {f32(1 + 0x1p-11f)}) == 0x3c00);
  CHECK(result_of("cvt.rn.f16.f32", {f32(65520)}) == 0x7c00 && result_of("cvt.rn.f16.f32", {f32(0x1p-24f)}) == 1);
  // Each NaN becomes the canonical one.
  for (const uint64_t nan : Words{kNaN, 0xffc00001ull, 0x7fa00000ull}) {
    CHECK(result_of("cvt.rn.bf16.f32", {nan}) == 0x7fff);
    CHECK(result_of("cvt.rn.f16.f32", {nan}) == 0x7fff);
  }
  // The first operand becomes the upper half.
  CHECK(result_of("cvt.rn.f16x2.f32", {f32(2), f32(1)}) == 0x40003c00);
  CHECK(result_of("cvt.rn.bf16x2.f32", {f32(2), f32(1)}) == 0x40003f80);
  CHECK(result_of("cvt.f32.bf16", {0xc040}) == f32(-3) && result_of("cvt.f32.f16", {0x0001}) == f32(0x1p-24f));
  CHECK(result_of("cvt.sat.f32.f32", {kNaN}) == f32(0) && result_of("cvt.sat.f32.f32", {f32(-0.0f)}) == f32(0));
  CHECK(result_of("cvt.sat.f32.f32", {f32(7)}) == f32(1) && result_of("cvt.sat.f32.f32", {f32(0.3f)}) == f32(0.3f));
  CHECK(result_of("cvt.rzi.f32.f32", {f32(-2.9f)}) == f32(-2));
  CHECK(result_of("cvt.rn.f32.f64", {f64(0.1)}) == f32(0.1f) && result_of("cvt.f64.f32", {f32(0.1f)}) == f64(0.1f));
  CHECK(result_of("cvt.s64.s32", {s32(-5)}) == ~4ull && result_of("cvt.u64.u32", {s32(-5)}) == 0xfffffffb);
  CHECK(result_of("cvt.u32.u64", {0x500000007}) == 7 && result_of("cvt.u16.u32", {0x10003}) == 3);
}

void integers() {
  CHECK(result_of("add.s32", {0xffffffff, 2}) == 1 && result_of("sub.s32", {0, 1}) == 0xffffffff);
  CHECK(result_of("mul.lo.s32", {0x10000, 0x10001}) == 0x10000);
  CHECK(result_of("mad.lo.s32", {3, 4, s32(-20)}) == s32(-8));
  CHECK(result_of("mul.hi.u64", {~0ull, 16}) == 15 && result_of("mul.hi.s64", {~0ull, 16}) == ~0ull);
  CHECK(result_of("mul.hi.s32", {s32(-1), 16}) == 0xffffffff);
  CHECK(result_of("mul.wide.u32", {s32(-1), 2}) == 0x1fffffffe && result_of("mul.wide.s32", {s32(-1), 2}) == ~1ull);
  CHECK(result_of("mul.wide.u16", {0xffff, 0xffff}) == 0xfffe0001);
  CHECK(result_of("div.s32", {s32(-7), 2}) == s32(-3) && result_of("div.u32", {s32(-8), 2}) == 0x7ffffffc);
  // The one quotient that does not fit wraps.
  CHECK(result_of("div.s32", {0x80000000, s32(-1)}) == 0x80000000);
  CHECK(result_of("div.s64", {1ull << 63, ~0ull}) == 1ull << 63);
  CHECK(holds(lines_of("div.u32", {1, 0}).error(), "a division by 0"));
  CHECK(result_of("min.s32", {s32(-1), 1}) == s32(-1) && result_of("max.s64", {~0ull, 1}) == 1);
  // Counts beyond the width shift everything out.
  CHECK(result_of("shl.b32", {1, 31}) == 0x80000000 && result_of("shl.b32", {1, 32}) == 0);
  CHECK(result_of("shr.u32", {0x80000000, 31}) == 1 && result_of("shr.u32", {0x80000000, 40}) == 0);
  CHECK(result_of("shr.s32", {0x80000000, 99}) == 0xffffffff && result_of("shr.s64", {1ull << 63, 99}) == ~0ull);
  CHECK(result_of("shl.b64", {1, 63}) == 1ull << 63 && result_of("shr.u64", {1ull << 63, 64}) == 0);
  // Bytes 3, 2, 1, 0 of a and 7, 6, 5, 4 of b; 8 and above: copies of the sign.
  CHECK(result_of("prmt.b32", {0x44332211, 0x88776655, 0x7531}) == 0x88664422);
  CHECK(result_of("prmt.b32", {0x44332211, 0x88776655, 0x8f0f}) == 0x00ff11ff);
  CHECK(result_of("bfi.b32", {0xff, 0, 4, 8}) == 0xff0 && result_of("bfi.b32", {0, ~0u, 28, 8}) == 0x0fffffff);
  CHECK(result_of("bfi.b32", {5, 6, 0, 0}) == 6 && result_of("bfi.b32", {5, 6, 32, 4}) == 6);
  CHECK(result_of("bfi.b32", {5, 6, 0, 32}) == 5);
  // Only the low bytes of the position and the length count.
  CHECK(result_of("bfi.b32", {0xff, 0, 0x104, 0x208}) == 0xff0);
  CHECK(result_of("not.b32", {0}) == 0xffffffff && result_of("neg.s32", {1}) == 0xffffffff);
}

void moves() {
  Lines split{
      "ld.global.u64 %r0, [%in]; mov.b32 {%r1, %r2}, %r0; mov.b32 %r3, {%r2, %r1};\n"
      "mov.b64 {%r4, %r5}, %r0; st.global.u64 [%out], %r1; st.global.u64 [%out+8], %r3;\n"
      "st.global.u64 [%out+16], %r5;",
      {0x1111222233334444}};
  split.out_words = 3;
  CHECK(split.run() == (Words{0x4444, 0x44443333, 0x11112222}));
}

}  // namespace

void arithmetic() {
  floats();
  comparisons();
  conversions();
  integers();
  moves();
}

}  // namespace ptx::test
