// What a warp does together, on the host: its 32 threads meet, and each reads what the others have laid down.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cmath>
#include <cstring>

#include "grid.h"

// One for each warp of the block that runs.
struct WarpMeeting {
  std::barrier<> barrier{32};
  std::array<std::array<uint32_t, 4>, 32> a;
  std::array<std::array<uint32_t, 2>, 32> b;
  std::array<float, 32> values;
};
inline std::array<WarpMeeting, 8> warp_meetings;

struct HostWarp {
  static unsigned char* shared_memory() {
    alignas(16) static unsigned char memory[std::size_t{128} << 10];
    return memory;
  }

  // As PTX documents the fragments of mma.m16n8k16 and, for 4-byte types, m16n8k8.
  template <class T>
  static void multiply(T, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    WarpMeeting& meeting = warp_meetings[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    std::copy(a, a + 4, meeting.a[lane].begin());
    std::copy(b, b + 2, meeting.b[lane].begin());
    meeting.barrier.arrive_and_wait();
    constexpr unsigned kPerRegister = 4 / sizeof(T);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
      double sum = sums[i];
      for (unsigned k = 0; k < 8 * kPerRegister; ++k) {
        const unsigned t = k / kPerRegister % 4, high = k / (4 * kPerRegister);
        const uint32_t of_a = meeting.a[row % 8 * 4 + t][row / 8 + 2 * high], of_b = meeting.b[col * 4 + t][high];
        sum += double{element<T>(of_a, k % kPerRegister)} * double{element<T>(of_b, k % kPerRegister)};
      }
      // Tensor cores are said to round sums toward zero.
      sums[i] = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(sums[i])) > std::fabs(sum)) sums[i] = std::nextafter(sums[i], 0.0f);
    }
    meeting.barrier.arrive_and_wait();
  }

  static float sum_over_rows(float x) {
    WarpMeeting& meeting = warp_meetings[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    meeting.values[lane] = x;
    meeting.barrier.arrive_and_wait();
    float sum = 0;
    for (unsigned g = 0; g < 8; ++g) sum += meeting.values[4 * g + lane % 4];
    meeting.barrier.arrive_and_wait();
    return sum;
  }

 private:
  template <class T>
  static float element(uint32_t bits, unsigned which) {
    T x;
    // Of 4 bytes the instruction reads those of TF32.
    if (sizeof(T) == 4) bits &= 0xffffe000u;
    std::memcpy(static_cast<void*>(&x), reinterpret_cast<const char*>(&bits) + which * sizeof(T), sizeof x);
    return static_cast<float>(x);
  }
};
