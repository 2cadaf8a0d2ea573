// Sums of columns as a node of an epilogue's visitor tree.
#pragma once

#include "kernels/cuda/common/column_sums.cuh"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "kernels/cuda/common/warp.cuh"

namespace fastlane::cuda::hopper {

namespace fusion = cutlass::epilogue::fusion;

struct ColumnSumsArguments {
  float* rows = nullptr;  // or null: no sums
  int64_t row_stride = 0;
};

// Passes its input on. Each warp of a tile sums its rows and writes the sums to memory as one row: row kWarps · m +
// warp for the m-th tile of rows. CUTLASS's own node, Sm90RowReduction, keeps the sums of a whole tile in registers,
// which here are too many. This node keeps the sums of 32 columns, whose rows are visited one after the other.
template <int kWarps>
struct ColumnSums {
  using Arguments = ColumnSumsArguments;
  using Params = Arguments;
  struct SharedStorage {};
  static constexpr int kSubtileCols = 32, kOwnCols = 8;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter*) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ColumnSums() {}
  CUTLASS_HOST_DEVICE ColumnSums(const Params& params, const SharedStorage&) : params_(params) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::ProducerLoadArgs<Args...>&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }

  // `coordinates` are the coordinates of a thread's elements. An element below `residue` lies in the matrix.
  template <class Coordinates, class Residue>
  struct ConsumerStoreCallbacks : fusion::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;
    Residue residue;
    float* row;  // from this tile's first column on; null: no sums
    float sums[kOwnCols];

    CUTLASS_DEVICE ConsumerStoreCallbacks(const Coordinates& coordinates, const Residue& residue, float* row)
        : coordinates(coordinates), residue(residue), row(row) {}

    CUTLASS_DEVICE void begin_loop(int epi_m, int) {
      if (epi_m > 0) return;
      CUTLASS_PRAGMA_UNROLL
      for (float& sum : sums) sum = 0;
    }

    // Rows beyond the matrix are left out: there 0 times an infinite weight is NaN.
    template <class Accumulator, int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(const cutlass::Array<Accumulator, N>&, int epi_v, int epi_m,
                                                  int epi_n, const cutlass::Array<float, N>& input) {
      const auto subtile = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
      static_assert(decltype(cute::size(subtile))::value == 2 * kOwnCols, "two rows of a thread's columns");
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        const auto at = subtile(epi_v * N + i);
        const int col = cute::get<1>(at) - cute::get<1>(subtile(0));
        if (cute::get<0>(at) < cute::get<0>(residue)) sums[col / 8 * 2 + col % 2] += input[i];
      }
      return input;
    }

    CUTLASS_DEVICE void end_loop(int epi_m, int epi_n) {
      if (epi_m + 1 < decltype(cute::size<3>(coordinates))::value || row == nullptr) return;
      const int lane = cutlass::canonical_lane_idx(), g = lane / 4, t = lane % 4;
      row[epi_n * kSubtileCols + own_column(g, t)] = over_lanes<DeviceWarp>(sums, g);
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    using EpilogueTile = decltype(args.epi_tile);
    static_assert(cute::size<1>(EpilogueTile{}) == kSubtileCols);
    static_assert(decltype(cute::size(args.tiled_mma))::value == 32 * kWarps);
    const auto [m, n, k, l] = args.tile_coord_mnkl;
    // One of a cluster's tiles may lie beyond the matrix.
    const bool exists = m * cute::size<0>(args.tile_shape_mnk) < cute::size<0>(args.problem_shape_mnkl);
    float* const row = params_.rows && exists
                           ? params_.rows + (int64_t{m} * kWarps + args.thread_idx / 32) * params_.row_stride +
                                 int64_t{n} * cute::size<1>(args.tile_shape_mnk)
                           : nullptr;
    using Callbacks = ConsumerStoreCallbacks<decltype(args.tCcD), decltype(args.residue_tCcD)>;
    return Callbacks(args.tCcD, args.residue_tCcD, row);
  }

 private:
  Params params_;
};

}  // namespace fastlane::cuda::hopper
