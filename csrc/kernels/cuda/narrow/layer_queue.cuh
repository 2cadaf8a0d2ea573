// The weights and biases of a narrow stack's layers in shared memory, in the order in which a block uses them.
#pragma once

#include "kernels/cuda/narrow/fragments.cuh"

namespace fastlane::cuda {

// A layer in shared memory, with zeros beyond its sizes.
template <class T>
struct SharedLayer {
  const T* weight;  // rows weight_stride apart
  const float* bias;
};

// There are places for kPlaces layers. If all layers have a place, they stay. Otherwise the copy of a layer begins
// kPlaces − 1 uses ahead, into the place of the layer that was used last. Every thread of the block has to call the
// constructor and next().
template <class T, int kWidth, int kThreads, class Warp>
class LayerQueue {
  static constexpr int kPlaces = layers_at_once(kWidth, sizeof(T)), kStride = weight_stride(kWidth);
  static_assert(kPlaces >= 2 && kThreads >= kWidth);

 public:
  // `count` layers, from `first` on in the direction of `step`, used `times` times over.
  __device__ LayerQueue(const NarrowStack& p, int first, int step, int count, int64_t times)
      : p_(p), first_(first), step_(step), count_(count), places_(count < kPlaces ? count : kPlaces) {
    const int begun = count <= kPlaces ? count : kPlaces - 1;
    for (int i = 0; i < begun; ++i) {
      begin_weight(i, i);
      keep_bias(i, bias_of(i));
      Warp::commit_copies();
    }
    ahead_ = begun, to_begin_ = count <= kPlaces ? 0 : times * count - begun;
  }

  // The layer of the next use; the first call returns the first layer.
  __device__ SharedLayer<T> next() {
    const int last_place = place_ < 0 ? kPlaces - 1 : place_;
    const bool all_stay = count_ <= kPlaces, first_use = place_ < 0;
    place_ = place_ + 1 == places_ ? 0 : place_ + 1;
    if (!all_stay) pass_on(last_place);
    if (all_stay && first_use) {
      Warp::template await_copies<0>();
      __syncthreads();
    }
    return {weight_at(place_), bias_at(place_)};
  }

 private:
  __device__ T* weight_at(int place) const {
    return reinterpret_cast<T*>(Warp::shared_memory()) + place * kWidth * kStride;
  }
  __device__ float* bias_at(int place) const { return reinterpret_cast<float*>(weight_at(places_)) + place * kWidth; }

  __device__ const NarrowLayer& layer(int i) const { return p_.layers[first_ + step_ * i]; }
  __device__ void begin_weight(int i, int place) const {
    const NarrowLayer& l = layer(i);
    begin_to_shared<kWidth, kWidth, kStride, kThreads, Warp>(weight_at(place), static_cast<const T*>(l.weight.data),
                                                             l.out_features, l.in_features, l.weight.row_stride,
                                                             l.weight.col_stride);
  }
  // A thread's element of the bias. It becomes a float, and therefore goes through a register.
  __device__ T bias_of(int i) const {
    const NarrowLayer& l = layer(i);
    const int n = static_cast<int>(threadIdx.x);
    return l.bias && n < l.out_features ? static_cast<const T*>(l.bias)[n] : rounded<T>(0.0f);
  }
  __device__ void keep_bias(int place, T bias) const {
    if (threadIdx.x < kWidth) bias_at(place)[threadIdx.x] = widen(bias);
  }

  // Awaits the next layer, and begins to copy the layer that takes the place of the last one. The new layer's bias is
  // read now and stored at the next call, so that no thread waits for the read.
  __device__ void pass_on(int last_place) {
    if (bias_place_ >= 0) keep_bias(bias_place_, bias_);
    Warp::template await_copies<kPlaces - 2>();
    __syncthreads();
    bias_place_ = to_begin_ > 0 ? last_place : -1;
    if (to_begin_ > 0) {
      begin_weight(ahead_, last_place);
      bias_ = bias_of(ahead_);
      ahead_ = ahead_ + 1 == count_ ? 0 : ahead_ + 1;
      --to_begin_;
    }
    Warp::commit_copies();  // also an empty group, since await_copies counts groups
  }

  const NarrowStack& p_;
  const int first_, step_, count_, places_;
  int place_ = -1;  // of the layer in use
  int ahead_;  // the next layer to begin, of `count`
  int64_t to_begin_;  // copies still to begin
  int bias_place_ = -1;  // of the bias on its way, if there is one
  T bias_;
};

}  // namespace fastlane::cuda
