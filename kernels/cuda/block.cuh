// Reductions over a warp and over a block, and the links of a small tree.
#pragma once
#include "platform.cuh"

struct Sum {
  template <typename T>
  __device__ static T of(T a, T b) {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ static T of(T a, T b) {
    return b > a ? b : a;
  }
};

template <class Op, typename T>
__device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
  for (int distance = 16; distance; distance >>= 1)
    value = Op::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
// All threads get the result; `scratch` holds 32 values and may be reused at once. `neutral` fills missing warps.
template <class Op, typename T>
__device__ __forceinline__ T block_reduce(T value, T* scratch, T neutral) {
  value = warp_reduce<Op>(value);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = value;
  __syncthreads();
  value = lane_id() < static_cast<int>(blockDim.x >> 5) ? scratch[lane_id()] : neutral;
  return warp_reduce<Op>(value);
}

constexpr int kMaxNodes = 256;

// First child and next sibling of each node in shared memory, -1 for none. A node of parent -1 other than the root is
// padding, which nothing leads to.
struct Links {
  int parent[kMaxNodes], first[kMaxNodes], next[kMaxNodes];

  __device__ __forceinline__ void build(const int* parents, int num_nodes) {
    for (int i = threadIdx.x; i < num_nodes; i += blockDim.x) parent[i] = parents[i];
    __syncthreads();
    for (int i = threadIdx.x; i < num_nodes; i += blockDim.x) {
      int child = i + 1, sibling = i + 1;
      while (child < num_nodes && parent[child] != i) child++;
      while (sibling < num_nodes && parent[sibling] != parent[i]) sibling++;
      first[i] = child < num_nodes ? child : -1;
      next[i] = sibling < num_nodes && parent[i] >= 0 ? sibling : -1;
    }
    __syncthreads();
  }
};
