// Sums over the rows of a tensor-core result. Lane 4 g + t has columns 2 t and 2 t + 1 of every 8.
#pragma once

namespace fastlane::cuda {

// Two lanes whose g differs in bit kHalf share the work: each keeps one half of the values and adds the other lane's
// values to that half.
template <int kHalf, class Warp>
__device__ void halve_over_lanes(float (&sums)[8], int g) {
  const bool upper = g & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = sums[i], high = sums[i + kHalf];
    sums[i] = (upper ? high : low) + Warp::exchange(upper ? low : high, 4 * kHalf);
  }
}

// `sums` holds a lane's sums over its own rows, for its 8 columns of 32, and is overwritten. Returns the sum over all
// the warp's rows for one column, own_column(g, t). Takes seven exchanges.
template <class Warp>
__device__ float over_lanes(float (&sums)[8], int g) {
  halve_over_lanes<4, Warp>(sums, g);
  halve_over_lanes<2, Warp>(sums, g);
  halve_over_lanes<1, Warp>(sums, g);
  return sums[0];
}
__device__ inline int own_column(int g, int t) { return g / 2 * 8 + 2 * t + g % 2; }

}  // namespace fastlane::cuda
