// The vectors of the kernel set that is being compiled.
#pragma once

#if defined(FASTLANE_TARGET_AVX512_BF16)
#include "kernels/cpu/isa/vec_avx512_bf16.h"
#elif defined(FASTLANE_TARGET_AVX512)
#include "kernels/cpu/isa/vec_avx512.h"
#elif defined(FASTLANE_TARGET_AVX2)
#include "kernels/cpu/isa/vec_avx2.h"
#elif defined(FASTLANE_TARGET_NEON)
#include "kernels/cpu/isa/vec_neon.h"
#else
#include "kernels/cpu/isa/vec_scalar.h"
#endif
