// Instructions from registers to registers. In float, approx instructions give the exact result with one rounding.
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <limits>
#include <utility>

#include "instructions.h"

namespace ptx {
namespace {

// operand 0 ← f(operands 1, 2, … as `From`), f without a capture
template <class To, class... From, class F>
Handler compute(F) {
  return [](Machine& m, Thread& t, const Instruction& i) {
    const auto call = [&]<size_t... n>(std::index_sequence<n...>) {
      return F{}(read<From>(m, t, i.operands[n + 1])...);
    };
    write<To>(t, i.operands[0], static_cast<To>(call(std::index_sequence_for<From...>{})));
    return true;
  };
}
template <class V, class F>
Handler unary(F f) {
  return compute<V, V>(f);
}
template <class V, class F>
Handler binary(F f) {
  return compute<V, V, V>(f);
}
template <class V, class F>
Handler ternary(F f) {
  return compute<V, V, V, V>(f);
}
template <class V, class F>
Handler compare(F f) {
  return compute<uint64_t, V, V>(f);
}

// An instruction with ftz replaces each denormal operand and result by a zero of the same sign.
template <class R>
R without_denormals(R x) {
  return std::fabs(x) < std::numeric_limits<R>::min() ? std::copysign(R{0}, x) : x;
}

// PTX says that −0 is less than +0, and that a NaN loses against a number.
template <class R>
R greater(R a, R b) {
  if (a == b) return std::signbit(a) ? b : a;
  return std::fmax(a, b);
}

float fma_rounded_down(float a, float b, float c) {
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  const volatile float x = a, y = b, z = c;
  const float result = std::fma(x, y, z);
  std::fesetround(before);
  return result;
}

// Each of four digits names a byte of a, then b; the digit's highest bit asks for copies of that byte's sign.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t digits) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (uint32_t n = 0; n < 4; ++n) {
    const uint32_t digit = digits >> 4 * n & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (digit & 7)) & 0xff;
    if (digit & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * n;
  }
  return result;
}

// Moves between a register and its two halves, or between registers.
template <class Whole, class Half>
bool move(Machine& m, Thread& t, const Instruction& i) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  constexpr unsigned kHalf = sizeof(Half) * 8;
  if (to.kind == Operand::Kind::vector) {
    const Whole value = read<Whole>(m, t, from);
    write<Half>(t, to.parts[0], static_cast<Half>(value));
    write<Half>(t, to.parts[1], static_cast<Half>(value >> kHalf));
  } else if (from.kind == Operand::Kind::vector) {
    const Whole low = read<Half>(m, t, from.parts[0]), high = read<Half>(m, t, from.parts[1]);
    write<Whole>(t, to, low | high << kHalf);
  } else {
    write<Whole>(t, to, read<Whole>(m, t, from));
  }
  return true;
}

template <class R>
void add_floats(Table& table, const std::string& type) {
  table["abs" + type] = unary<R>([](R a) { return std::fabs(a); });
  table["neg" + type] = unary<R>([](R a) { return -a; });
  table["add" + type] = table["add.rn" + type] = binary<R>([](R a, R b) { return a + b; });
  table["sub" + type] = binary<R>([](R a, R b) { return a - b; });
  table["mul" + type] = table["mul.rn" + type] = binary<R>([](R a, R b) { return a * b; });
  table["div.rn" + type] = binary<R>([](R a, R b) { return a / b; });
  table["rcp.rn" + type] = unary<R>([](R a) { return 1 / a; });
  table["max" + type] = binary<R>([](R a, R b) { return greater(a, b); });
  table["copysign" + type] = binary<R>([](R sign, R size) { return std::copysign(size, sign); });
  table["fma.rn" + type] = ternary<R>([](R a, R b, R c) { return std::fma(a, b, c); });
  table["setp.eq" + type] = compare<R>([](R a, R b) { return a == b; });
  table["setp.neu" + type] = compare<R>([](R a, R b) { return !(a == b); });
  table["setp.lt" + type] = compare<R>([](R a, R b) { return a < b; });
  table["setp.gt" + type] = compare<R>([](R a, R b) { return a > b; });
  table["setp.geu" + type] = compare<R>([](R a, R b) { return !(a < b); });
}

// Conversions, and what exists for float alone.
void add_conversions(Table& table) {
  table["rcp.approx.ftz.f32"] = unary<float>([](float a) { return without_denormals(1 / without_denormals(a)); });
  // For double only the upper half of the bits is given.
  table["rcp.approx.ftz.f64"] = unary<double>([](double a) {
    const double exact = without_denormals(1 / without_denormals(a));
    return std::bit_cast<double>(std::bit_cast<uint64_t>(exact) >> 32 << 32);
  });
  table["ex2.approx.ftz.f32"] = unary<float>([](float a) { return without_denormals(std::exp2(a)); });
  table["fma.rm.f32"] = ternary<float>([](float a, float b, float c) { return fma_rounded_down(a, b, c); });
  table["cvt.f64.f32"] = compute<double, float>([](float a) { return a; });
  table["cvt.rn.f32.f64"] = compute<float, double>([](double a) { return a; });
  table["cvt.rn.bf16.f32"] = compute<uint16_t, float>([](float a) { return to_bf16(a); });
  table["cvt.sat.f32.f32"] = unary<float>([](float a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; });
  table["cvt.rzi.f32.f32"] = unary<float>([](float a) { return std::trunc(a); });
  table["cvt.f32.bf16"] = compute<float, uint16_t>([](uint16_t a) { return from_bf16(a); });
  table["cvt.f32.f16"] = compute<float, uint16_t>([](uint16_t a) { return from_f16(a); });
  table["cvt.rn.f16.f32"] = compute<uint16_t, float>([](float a) { return to_f16(a); });
  // PTX names the upper half first.
  table["cvt.rn.f16x2.f32"] = compute<uint32_t, float, float>(
      [](float high, float low) { return static_cast<uint32_t>(to_f16(high)) << 16 | to_f16(low); });
  table["cvt.rn.bf16x2.f32"] = compute<uint32_t, float, float>(
      [](float high, float low) { return static_cast<uint32_t>(to_bf16(high)) << 16 | to_bf16(low); });
  table["cvt.u16.u32"] = compute<uint16_t, uint32_t>([](uint32_t a) { return a; });
  table["cvt.s64.s32"] = compute<int64_t, int32_t>([](int32_t a) { return a; });
  table["cvt.u64.u32"] = compute<uint64_t, uint32_t>([](uint32_t a) { return a; });
  table["cvt.u32.u64"] = compute<uint32_t, uint64_t>([](uint64_t a) { return a; });
}

template <class V>
void add_comparisons(Table& table, const std::string& type) {
  table["setp.eq" + type] = compare<V>([](V a, V b) { return a == b; });
  table["setp.ne" + type] = compare<V>([](V a, V b) { return a != b; });
  table["setp.lt" + type] = compare<V>([](V a, V b) { return a < b; });
  table["setp.le" + type] = compare<V>([](V a, V b) { return a <= b; });
  table["setp.gt" + type] = compare<V>([](V a, V b) { return a > b; });
  table["setp.ge" + type] = compare<V>([](V a, V b) { return a >= b; });
}

struct Quotient {
  template <class V>
  V operator()(V a, V b) const {
    if (b == 0) throw std::runtime_error("a division by 0");
    // On the host, the least number divided by −1 would be an error.
    if (std::is_signed_v<V> && b == static_cast<V>(-1))
      return static_cast<V>(0 - static_cast<std::make_unsigned_t<V>>(a));
    return a / b;
  }
};

void add_integers(Table& table) {
  using u16 = uint16_t;
  using u32 = uint32_t;
  using u64 = uint64_t;
  table["add.s32"] = binary<u32>([](u32 a, u32 b) { return a + b; });
  table["sub.s32"] = binary<u32>([](u32 a, u32 b) { return a - b; });
  table["neg.s32"] = unary<u32>([](u32 a) { return 0 - a; });
  table["mul.lo.s32"] = binary<u32>([](u32 a, u32 b) { return a * b; });
  table["mad.lo.s32"] = ternary<u32>([](u32 a, u32 b, u32 c) { return a * b + c; });
  table["min.s32"] = binary<int32_t>([](int32_t a, int32_t b) { return std::min(a, b); });
  table["div.s32"] = binary<int32_t>(Quotient{});
  table["div.u32"] = binary<u32>(Quotient{});
  table["div.s64"] = binary<int64_t>(Quotient{});
  table["add.s64"] = binary<u64>([](u64 a, u64 b) { return a + b; });
  table["sub.s64"] = binary<u64>([](u64 a, u64 b) { return a - b; });
  table["mul.lo.s64"] = binary<u64>([](u64 a, u64 b) { return a * b; });
  table["mul.hi.u64"] = binary<u64>([](u64 a, u64 b) { return static_cast<unsigned __int128>(a) * b >> 64; });
  table["mul.hi.s64"] =
      binary<int64_t>([](int64_t a, int64_t b) { return static_cast<int64_t>(static_cast<__int128>(a) * b >> 64); });
  table["mul.wide.u32"] = compute<u64, u32, u32>([](u32 a, u32 b) { return u64{a} * b; });
  table["mul.wide.s32"] = compute<int64_t, int32_t, int32_t>([](int32_t a, int32_t b) { return int64_t{a} * b; });
  table["and.b16"] = binary<u16>([](u16 a, u16 b) { return a & b; });
  table["and.b32"] = binary<u32>([](u32 a, u32 b) { return a & b; });
  table["or.b32"] = binary<u32>([](u32 a, u32 b) { return a | b; });
  table["xor.b32"] = binary<u32>([](u32 a, u32 b) { return a ^ b; });
  table["prmt.b32"] = ternary<u32>([](u32 a, u32 b, u32 digits) { return permuted(a, b, digits); });
  table["bfi.b32"] = compute<u32, u32, u32, u32, u32>([](u32 from, u32 into, u32 at, u32 length) {
    at &= 0xff, length &= 0xff;
    const u32 field = at > 31 ? 0 : (length > 31 ? ~0u : (1u << length) - 1) << at;
    return at > 31 ? into : (into & ~field) | (from << at & field);
  });
  table["not.b32"] = unary<u32>([](u32 a) { return ~a; });
  table["and.b64"] = table["and.pred"] = binary<u64>([](u64 a, u64 b) { return a & b; });
  table["or.b64"] = table["or.pred"] = binary<u64>([](u64 a, u64 b) { return a | b; });
  table["not.pred"] = unary<u64>([](u64 a) { return ~a & 1; });
  table["shl.b32"] = binary<u32>([](u32 a, u32 n) { return n > 31 ? 0 : a << n; });
  table["shr.u32"] = binary<u32>([](u32 a, u32 n) { return n > 31 ? 0 : a >> n; });
  table["shr.s32"] = compute<int32_t, int32_t, u32>([](int32_t a, u32 n) { return a >> std::min(n, 31u); });
  table["shl.b64"] = compute<u64, u64, u32>([](u64 a, u32 n) { return n > 63 ? 0 : a << n; });
  table["shr.u64"] = compute<u64, u64, u32>([](u64 a, u32 n) { return n > 63 ? 0 : a >> n; });
  table["xor.pred"] = binary<u64>([](u64 a, u64 b) { return a ^ b; });
  table["not.b64"] = unary<u64>([](u64 a) { return ~a; });
  table["add.s16"] = binary<u16>([](u16 a, u16 b) { return a + b; });
  table["max.s32"] = binary<int32_t>([](int32_t a, int32_t b) { return std::max(a, b); });
  table["min.s64"] = binary<int64_t>([](int64_t a, int64_t b) { return std::min(a, b); });
  table["max.s64"] = binary<int64_t>([](int64_t a, int64_t b) { return std::max(a, b); });
  table["neg.s64"] = unary<u64>([](u64 a) { return 0 - a; });
  table["mul.hi.s32"] = binary<int32_t>([](int32_t a, int32_t b) { return int64_t{a} * b >> 32; });
  table["mul.wide.u16"] = compute<u32, u16, u16>([](u16 a, u16 b) { return u32{a} * b; });
  table["shr.s64"] = compute<int64_t, int64_t, u32>([](int64_t a, u32 n) { return a >> std::min(n, 63u); });
}

}  // namespace

void add_arithmetic(Table& table) {
  add_floats<float>(table, ".f32");
  add_floats<double>(table, ".f64");
  add_conversions(table);
  add_comparisons<int16_t>(table, ".s16");
  add_comparisons<int32_t>(table, ".s32");
  add_comparisons<int64_t>(table, ".s64");
  add_comparisons<uint32_t>(table, ".u32");
  add_comparisons<uint64_t>(table, ".u64");
  add_comparisons<uint32_t>(table, ".b32");
  add_integers(table);
  table["selp.b32"] = table["selp.u32"] = table["selp.f32"] = compute<uint32_t, uint32_t, uint32_t, uint64_t>(
      [](uint32_t a, uint32_t b, uint64_t p) { return p & 1 ? a : b; });
  table["selp.u16"] = table["selp.b64"] = table["selp.f64"] = compute<uint64_t, uint64_t, uint64_t, uint64_t>(
      [](uint64_t a, uint64_t b, uint64_t p) { return p & 1 ? a : b; });
  for (const char* opcode : {"mov.b32", "mov.u32", "mov.s32", "mov.f32"}) table[opcode] = move<uint32_t, uint16_t>;
  for (const char* opcode : {"mov.b64", "mov.u64", "mov.f64"}) table[opcode] = move<uint64_t, uint32_t>;
  table["mov.u16"] = table["mov.b16"] = unary<uint16_t>([](uint16_t a) { return a; });
  table["mov.pred"] = unary<uint64_t>([](uint64_t a) { return a & 1; });
  // Global addresses are the host's.
  table["cvta.param.u64"] = table["cvta.to.global.u64"] = unary<uint64_t>([](uint64_t a) { return a; });
}

}  // namespace ptx
