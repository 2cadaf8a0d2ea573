// The warp-specialised GEMM of CUTLASS's builders with this library's epilogues as visitor trees. An epilogue's node
// computes on fragments of accumulators that are still in registers; TMA loads C and stores z and the result.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "kernels/cuda/hopper/activation.cuh"
#include "kernels/cuda/hopper/column_sums.cuh"
#include "kernels/cuda/hopper/launch.h"

namespace fastlane::cuda::hopper {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::_2;
using cute::Shape;
using cute::Stride;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
using Cluster = Shape<_2, _1, _1>;
using RowMajorLayout = cutlass::layout::RowMajor;
template <class E>
constexpr int kVector = kAccessBytes / sizeof(E);

template <class E, HopperTile kTile>
using Tile = Shape<cute::Int<kTileRows>, cute::Int<tile_cols(kTile)>, cute::Int<128 / sizeof(E)>>;

template <template <class> class Op, class Out>
using Compute = fusion::Sm90Compute<Op, Out, float, kRound>;

// beta · C + Value, as Out. With beta = 0, C is not read.
template <class E, class Out, class Value>
using PlusAddend = fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, Out>,
                                   fusion::Sm90ScalarBroadcast<float>, fusion::Sm90SrcFetch<E>, Value>;
inline float beta(const GemmProblem& p) { return p.addend().data ? 1.0f : 0.0f; }

template <HopperTile kTile>
using EpilogueSchedule = std::conditional_t<is_shared(kTile), cutlass::epilogue::TmaWarpSpecializedCooperative,
                                            cutlass::epilogue::TmaWarpSpecialized>;
template <HopperTile kTile>
using MainloopSchedule = std::conditional_t<is_shared(kTile), cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                            cutlass::gemm::KernelTmaWarpSpecializedPingpong>;

// A further matrix besides C and the result, read or written by TMA.
template <class E, HopperTile kTile>
struct Aux {
  using Descriptor = cutlass::epilogue::collective::detail::EpilogueDescriptor<
      Tile<E, kTile>, cutlass::epilogue::collective::EpilogueTileAuto, E, E, EpilogueSchedule<kTile>>;
  using ToMemory = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, RowMajorLayout, E>;
  using Store =
      fusion::Sm90AuxStore<ToMemory::Stages, typename ToMemory::EpilogueTile, E, kRound, typename ToMemory::Stride,
                           typename ToMemory::SmemLayoutAtom, typename ToMemory::CopyOpR2S>;
  using FromMemory = cutlass::epilogue::collective::detail::AuxLoadDescriptor<Descriptor, RowMajorLayout, E>;
  using Load =
      fusion::Sm90AuxLoad<FromMemory::Stages, typename FromMemory::EpilogueTile, E, typename FromMemory::Stride,
                          typename FromMemory::SmemLayoutAtom, typename FromMemory::CopyOpS2R>;
};

// The stride of a matrix with contiguous rows, in one batch.
inline Stride<int64_t, _1, int64_t> row_major(int64_t row_stride) { return {row_stride, _1{}, 0}; }

// act(acc + bias) + addend; acc + bias is stored as z on the way. One kernel serves all activations.
template <class E, HopperTile kTile, bool kStoresZ>
struct ForwardEpilogue {
  using Bias = fusion::Sm90RowBroadcast<0, Tile<E, kTile>, E, float>;
  using Z = fusion::Sm90EVT<Compute<cutlass::plus, float>, Bias, fusion::Sm90AccFetch>;
  using KeptZ = std::conditional_t<kStoresZ, fusion::Sm90EVT<typename Aux<E, kTile>::Store, Z>, Z>;
  using Tree = PlusAddend<E, E, fusion::Sm90EVT<Compute<ActivationOf<E>::template Value, float>, KeptZ>>;

  static typename Tree::Arguments arguments(const GemmProblem& p) {
    const Epilogue& e = p.epilogue;
    const typename Z::Arguments z{{static_cast<const E*>(e.bias)}, {}, {}};
    typename KeptZ::Arguments kept;
    if constexpr (kStoresZ) {
      kept = {z, {static_cast<E*>(e.z.data), row_major(e.z.row_stride)}};
    } else {
      kept = z;
    }
    return {{{beta(p)}}, {}, {kept, {e.activation}}, {}};
  }
};

// acc + addend.
template <class E>
struct DgradEpilogue {
  using Tree = PlusAddend<E, E, fusion::Sm90AccFetch>;

  static typename Tree::Arguments arguments(const GemmProblem& p) { return {{{beta(p)}}, {}, {}, {}}; }
};

// (acc + addend) ⊙ act′(preactivation); acc + addend is stored as `unscaled` on the way. Each warp of a tile writes
// its column sums as a row of floats to `column_sums`. One kernel serves whether `unscaled` and `column_sums` are
// present or absent.
template <class E, HopperTile kTile>
struct ThroughActivationEpilogue {
  using Unscaled = fusion::Sm90EVT<typename Aux<E, kTile>::Store, PlusAddend<E, float, fusion::Sm90AccFetch>>;
  using Scaled =
      fusion::Sm90EVT<Compute<ActivationOf<E>::template TimesSlope, float>, Unscaled, typename Aux<E, kTile>::Load>;
  using Sums = ColumnSums<column_sum_rows(kTile)>;
  using Tree = fusion::Sm90EVT<Compute<cutlass::epilogue::thread::Identity, E>, fusion::Sm90EVT<Sums, Scaled>>;

  static typename Tree::Arguments arguments(const GemmProblem& p) {
    const GradientEpilogue& e = p.gradient;
    const typename Unscaled::Arguments unscaled{{{{beta(p)}}, {}, {}, {}},
                                                {static_cast<E*>(e.unscaled.data), row_major(e.unscaled.row_stride)}};
    const typename Scaled::Arguments scaled{
        unscaled,
        {static_cast<const E*>(e.preactivation.data), E(0), row_major(e.preactivation.row_stride)},
        {e.activation}};
    return {{scaled, {static_cast<float*>(e.column_sums), TileGrid(p, kTile).covered_cols}}, {}};
  }
};

// CUTLASS puts A and B behind the epilogue's shared memory, so that the size of that memory decides their alignment.
// TMA and wgmma repeat their swizzle of 128 bytes every 1024 bytes, which A and B must be aligned to.
constexpr size_t kSwizzleBytes = 1024;
template <class Tree>
struct Aligned : Tree {
  struct alignas(kSwizzleBytes) SharedStorage : Tree::SharedStorage {};
  using Tree::Tree;
};

template <class E, HopperTile kTile, class LayoutB, class Epilogue>
class Kernel {
  using TileShape = Tile<E, kTile>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, E, RowMajorLayout, kVector<E>, E, RowMajorLayout,
      kVector<E>, EpilogueSchedule<kTile>, Aligned<typename Epilogue::Tree>>::CollectiveOp;
  static_assert(alignof(typename CollectiveEpilogue::TensorStorage) % kSwizzleBytes == 0);
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, E, RowMajorLayout, kVector<E>, E, LayoutB, kVector<E>,
      float, TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename CollectiveEpilogue::SharedStorage)>,
      MainloopSchedule<kTile>>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, CollectiveEpilogue>>;

  // CUTLASS's B is n × k.
  static typename Mainloop::StrideB stride_b(const GemmProblem& p) {
    if constexpr (std::is_same_v<LayoutB, RowMajorLayout>) {
      return {_1{}, p.b.row_stride, 0};
    } else {
      return row_major(p.b.col_stride);
    }
  }

 public:
  static bool run(const GemmProblem& p, int multiprocessors, Stream stream) {
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), 1}};
    arguments.mainloop = {static_cast<const E*>(p.a.data), row_major(p.a.row_stride), static_cast<const E*>(p.b.data),
                          stride_b(p)};
    // C's descriptor needs memory of the right shape even where C is not read.
    const RowMajor& out = p.out();
    const ConstRowMajor c = p.addend().data ? p.addend() : ConstRowMajor{out.data, out.row_stride};
    arguments.epilogue = {Epilogue::arguments(p), static_cast<const E*>(c.data), row_major(c.row_stride),
                          static_cast<E*>(out.data), row_major(out.row_stride)};
    arguments.hw_info.sm_count = multiprocessors;
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess || Gemm::get_workspace_size(arguments) != 0)
      return false;
    Gemm gemm;
    check(gemm.initialize(arguments, nullptr, stream), "initialize");
    check(gemm.run(stream), "run");
    return true;
  }

 private:
  static void check(cutlass::Status status, const char* step) {
    if (status == cutlass::Status::kSuccess) return;
    const cudaError_t error = cudaGetLastError();
    throw std::runtime_error(std::string("fastlane_ext: hopper_gemm: ") + step + ": " +
                             cutlass::cutlassGetStatusString(status) + ", " + cudaGetErrorString(error) + " (" +
                             __FILE__ + ":" + std::to_string(__LINE__) + ")");
  }
};

template <class E, HopperTile kTile>
bool run_forward(const GemmProblem& p, int multiprocessors, Stream stream) {
  using AlongK = cutlass::layout::ColumnMajor;
  return p.epilogue.z.data
             ? Kernel<E, kTile, AlongK, ForwardEpilogue<E, kTile, true>>::run(p, multiprocessors, stream)
             : Kernel<E, kTile, AlongK, ForwardEpilogue<E, kTile, false>>::run(p, multiprocessors, stream);
}
template <class E>
bool run_forward(const GemmProblem& p, HopperTile tile, int multiprocessors, Stream stream) {
  if (tile == HopperTile::m128n256) return run_forward<E, HopperTile::m128n256>(p, multiprocessors, stream);
  if (tile == HopperTile::m128n128) return run_forward<E, HopperTile::m128n128>(p, multiprocessors, stream);
  if constexpr (sizeof(E) == 2) return run_forward<E, HopperTile::m128n192>(p, multiprocessors, stream);
  return false;
}

template <class E, HopperTile kTile>
using Dgrad = Kernel<E, kTile, RowMajorLayout, DgradEpilogue<E>>;
template <class E>
bool run_dgrad(const GemmProblem& p, HopperTile tile, int multiprocessors, Stream stream) {
  if (tile == HopperTile::m128n256) return Dgrad<E, HopperTile::m128n256>::run(p, multiprocessors, stream);
  return tile == HopperTile::m128n128 && Dgrad<E, HopperTile::m128n128>::run(p, multiprocessors, stream);
}

template <class E, HopperTile kTile>
using ThroughActivation = Kernel<E, kTile, RowMajorLayout, ThroughActivationEpilogue<E, kTile>>;
template <class E>
bool run_through_activation(const GemmProblem& p, HopperTile tile, int multiprocessors, Stream stream) {
  if (tile == HopperTile::m128n256)
    return ThroughActivation<E, HopperTile::m128n256>::run(p, multiprocessors, stream);
  return tile == HopperTile::m128n128 && ThroughActivation<E, HopperTile::m128n128>::run(p, multiprocessors, stream);
}

}  // namespace fastlane::cuda::hopper
