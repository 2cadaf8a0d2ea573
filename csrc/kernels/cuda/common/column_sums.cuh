// Sums over the rows of a result of tensor cores, where lane 4 g + t has columns 2 t and 2 t + 1 of every 8.
#pragma once

namespace fastlane::cuda {

// Of two lanes whose g differs in this bit each takes half of the values and adds the other lane's.
template <int kHalf, class Warp>
__device__ void halve_over_lanes(float (&sums)[8], int g) {
  const bool upper = g & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = sums[i], high = sums[i + kHalf];
    sums[i] = (upper ? high : low) + Warp::exchange(upper ? low : high, 4 * kHalf);
  }
}

// From a lane's sums over its own rows of its 8 columns of 32, which are changed: the sum over all the warp's rows of
// the one column that is then its own, in seven exchanges.
template <class Warp>
__device__ float over_lanes(float (&sums)[8], int g) {
  halve_over_lanes<4, Warp>(sums, g);
  halve_over_lanes<2, Warp>(sums, g);
  halve_over_lanes<1, Warp>(sums, g);
  return sums[0];
}
__device__ inline int own_column(int g, int t) { return g / 2 * 8 + 2 * t + g % 2; }

}  // namespace fastlane::cuda
