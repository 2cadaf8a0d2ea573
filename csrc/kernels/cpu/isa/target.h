// Opens and closes a region of code that may use a kernel set's instructions. A region lies in an anonymous
// namespace, so the linker cannot pick one of its inline functions for code that runs on an older CPU. Headers are
// included outside a region.
//
// An ISA file names its set before it includes anything: FASTLANE_TARGET_AVX2, FASTLANE_TARGET_AVX512,
// FASTLANE_TARGET_AVX512_BF16 or FASTLANE_TARGET_NEON, whose instructions every 64-bit Arm CPU has. Without a name,
// as in an editor, the set is scalar.
#pragma once

#if defined(FASTLANE_TARGET_AVX512_BF16)
#define FASTLANE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"
#elif defined(FASTLANE_TARGET_AVX512)
#define FASTLANE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#elif defined(FASTLANE_TARGET_AVX2)
#define FASTLANE_TARGET "avx2,fma,f16c"
#endif

#define FASTLANE_PRAGMA(text) _Pragma(#text)

#if defined(FASTLANE_TARGET_NEON) && !defined(__clang__)
// GCC's first scheduler takes more registers for loads than a tile leaves, and would keep sums in memory.
#define FASTLANE_PUSH_TARGET FASTLANE_PRAGMA(GCC push_options) FASTLANE_PRAGMA(GCC optimize("no-schedule-insns"))
#define FASTLANE_POP_TARGET FASTLANE_PRAGMA(GCC pop_options)
#elif !defined(FASTLANE_TARGET) && !defined(__clang__)
// With -O2 GCC compiles the scalar set in three quarters of the time, and the products are no slower.
#define FASTLANE_PUSH_TARGET FASTLANE_PRAGMA(GCC push_options) FASTLANE_PRAGMA(GCC optimize("O2"))
#define FASTLANE_POP_TARGET FASTLANE_PRAGMA(GCC pop_options)
#elif !defined(FASTLANE_TARGET)
#define FASTLANE_PUSH_TARGET
#define FASTLANE_POP_TARGET
#elif defined(__clang__)
#define FASTLANE_PUSH_TARGET_OF(features) \
  FASTLANE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTLANE_PUSH_TARGET FASTLANE_PUSH_TARGET_OF(FASTLANE_TARGET)
#define FASTLANE_POP_TARGET FASTLANE_PRAGMA(clang attribute pop)
#else
#define FASTLANE_PUSH_TARGET_OF(features) FASTLANE_PRAGMA(GCC push_options) FASTLANE_PRAGMA(GCC target(features))
#define FASTLANE_PUSH_TARGET FASTLANE_PUSH_TARGET_OF(FASTLANE_TARGET)
#define FASTLANE_POP_TARGET FASTLANE_PRAGMA(GCC pop_options)
#endif

// clang-format off
#define FASTLANE_BEGIN_TARGET FASTLANE_PUSH_TARGET namespace fastlane { namespace {
#define FASTLANE_END_TARGET } } FASTLANE_POP_TARGET
// clang-format on
