// Operations of a whole warp on the GPU. tests/native/cuda/warp.h has the same operations for the host.
#pragma once

#include "kernels/cuda/common/device.cuh"

namespace fastlane::cuda {

// `multiply` computes sums += A B for A of 16 rows and B of 8 columns, with 16 steps along k (8 for 4-byte types). In
// the notation of PTX's mma with lane = 4 g + t: sums[i] is row g + 8 (i / 2), column 2 t + i % 2.
struct DeviceWarp {
  // For older GPUs the kernels are compiled to nothing. They are never launched there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  static constexpr bool kMultiplies = true;
#else
  static constexpr bool kMultiplies = false;
#endif

  static __device__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
  }

#define FASTLANE_MMA(shape_and_types)                                                                        \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  static __device__ void multiply(__nv_bfloat16, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    FASTLANE_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
  static __device__ void multiply(__half, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    FASTLANE_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  }
  static __device__ void multiply(float, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    FASTLANE_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef FASTLANE_MMA

  // Loads four blocks of 8 × 8 values of 16 bits from shared memory. Lanes 8 q to 8 q + 7 name the rows of block q.
  // From each block a lane gets elements 2 t and 2 t + 1 of row g, or of column g if kTransposed.
  template <bool kTransposed>
  static __device__ void load_matrices(const void* row, uint32_t (&blocks)[4]) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define FASTLANE_LDMATRIX(trans)                                                           \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])        \
               : "r"(at))
    if constexpr (kTransposed) {
      FASTLANE_LDMATRIX(".trans");
    } else {
      FASTLANE_LDMATRIX("");
    }
#undef FASTLANE_LDMATRIX
  }

  // Copies 16 bytes from global to shared memory, both aligned to 16, or writes zeros if not `present`. A thread's
  // copies since the last commit are a group. await_copies returns when at most the thread's last kPending groups are
  // still on their way.
  static __device__ void copy_async(void* shared, const void* global, bool present) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(global)),
                 "r"(present ? 16 : 0)
                 : "memory");
  }
  static __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>
  static __device__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
  // Asks for a line of global memory to be brought into the L2 cache.
  static __device__ void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
  }

  // The x of the lane whose number differs in these bits.
  static __device__ float exchange(float x, int bits) { return __shfl_xor_sync(0xffffffff, x, bits); }
};

}  // namespace fastlane::cuda
