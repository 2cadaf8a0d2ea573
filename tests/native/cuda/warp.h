// Operations of a whole warp, on the host. The warp's 32 threads meet, and each reads what the others have laid down.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "grid.h"

// One meeting for each warp of the block that runs.
struct WarpMeeting {
  Meeting of_warp{32};
  std::array<std::array<uint32_t, 4>, 32> a;
  std::array<std::array<uint32_t, 2>, 32> b;
  std::array<float, 32> values;
  std::array<const uint16_t*, 32> rows;
};
inline std::array<WarpMeeting, 12> warp_meetings;

struct HostWarp {
  static constexpr bool kMultiplies = true;

  static unsigned char* shared_memory() {
    alignas(16) static unsigned char memory[std::size_t{100} << 10];
    return memory;
  }

  // The fragments are as PTX documents them for mma.m16n8k16 and, for 4-byte types, m16n8k8.
  template <class T>
  static void multiply(T, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    WarpMeeting& meeting = warp_meetings[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    std::copy(a, a + 4, meeting.a[lane].begin());
    std::copy(b, b + 2, meeting.b[lane].begin());
    meeting.of_warp.arrive_and_wait();
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
    meeting.of_warp.arrive_and_wait();
  }

  template <bool kTransposed>
  static void load_matrices(const void* row, uint32_t (&blocks)[4]) {
    WarpMeeting& meeting = warp_meetings[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    meeting.rows[lane] = static_cast<const uint16_t*>(row);
    meeting.of_warp.arrive_and_wait();
    for (unsigned block = 0; block < 4; ++block) {
      const uint16_t* const* const rows = &meeting.rows[8 * block];
      const uint32_t low = kTransposed ? rows[2 * t][g] : rows[g][2 * t];
      const uint32_t high = kTransposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
      blocks[block] = low | high << 16;
    }
    meeting.of_warp.arrive_and_wait();
  }

  // No copy arrives before it is awaited. Until then the copy's place is NaN.
  static void copy_async(void* shared, const void* global, bool present) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) std::abort();
    std::memset(shared, 0xff, 16);
    copies().open.push_back({shared, present ? global : nullptr});
  }
  static void commit_copies() { copies().groups.push_back(std::exchange(copies().open, {})); }
  template <int kPending>
  static void await_copies() {
    for (auto& groups = copies().groups; groups.size() > kPending; groups.pop_front())
      for (const Copy& copy : groups.front())
        copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  }
  static void prefetch(const void* global) { static_cast<void>(*static_cast<const volatile char*>(global)); }

  static float exchange(float x, int bits) {
    WarpMeeting& meeting = warp_meetings[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    meeting.values[lane] = x;
    meeting.of_warp.arrive_and_wait();
    const float other = meeting.values[lane ^ static_cast<unsigned>(bits)];
    meeting.of_warp.arrive_and_wait();
    return other;
  }

 private:
  struct Copy {
    void* to;
    const void* from;  // null for zeros
  };
  // A thread's copies; none may be left when its kernel ends.
  struct Copies {
    unsigned grid = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;

    bool empty() const {
      return open.empty() &&
             std::all_of(groups.begin(), groups.end(), [](const auto& group) { return group.empty(); });
    }
    ~Copies() {
      if (!empty()) std::abort();
    }
  };
  static Copies& copies() {
    static std::array<Copies, std::tuple_size_v<decltype(warp_meetings)> * 32> of_threads;
    Copies& mine = of_threads[threadIdx.x];
    if (mine.grid != turns.grids) {
      if (!mine.empty()) std::abort();
      mine.grid = turns.grids, mine.groups.clear();
    }
    return mine;
  }

  template <class T>
  static float element(uint32_t bits, unsigned which) {
    T x;
    // From 4 bytes the instruction reads the bits of TF32.
    if (sizeof(T) == 4) bits &= 0xffffe000u;
    std::memcpy(static_cast<void*>(&x), reinterpret_cast<const char*>(&bits) + which * sizeof(T), sizeof x);
    return static_cast<float>(x);
  }
};
