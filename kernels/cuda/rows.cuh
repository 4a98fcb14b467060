// Rows of logits: which tokens are allowed and kept, and the radix selection behind top-k and top-p.
#pragma once
#include "block.cuh"

typedef unsigned long long Weight;  // counts, or probability mass in units of 2^-40 of the largest one

constexpr float kMassUnit = 1099511627776.0f;  // 2^40
constexpr int kAnyToken = 0x7fffffff;

// A row of logits [V] with the grammar's bits for it: bit 1 = allowed, null = all.
template <typename T>
struct Row {
  const T* logits;
  const uint32_t* allowed;
  int vocab;

  __device__ Row(const T* all, const uint32_t* bits, const int* bit_rows, int row, int vocab_)
      : logits(all + static_cast<int64_t>(row) * vocab_), allowed(nullptr), vocab(vocab_) {
    if (bits && bit_rows[row] >= 0) allowed = bits + static_cast<int64_t>(bit_rows[row]) * ((vocab + 31) / 32);
  }
  // The logit, -inf where the grammar forbids the token; never -0, so that equal values have equal keys.
  __device__ __forceinline__ float operator[](int token) const {
    if (allowed && !(allowed[token >> 5] >> (token & 31) & 1)) return -INFINITY;
    return to_float(logits[token]) + 0.0f;
  }
};

// What top-k, top-p and min-p keep: values above the bound, and of those equal to it the lowest token ids.
struct Kept {
  float bound;
  int last;  // the highest token id kept among those whose value is the bound

  __device__ Kept(const float* bounds, const int* lasts, int row)
      : bound(bounds ? bounds[row] : -INFINITY), last(bounds ? lasts[row] : kAnyToken) {}
  __device__ __forceinline__ bool has(float value, int token) const {
    return !(value < bound) && (value != bound || token <= last);  // NaN stays, for the caller to see
  }
};

// 56 bits, larger = earlier: the value's order, then the token id from low to high.
__device__ __forceinline__ uint64_t rank_key(float value, int token) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 24 | (0xffffffu - static_cast<uint32_t>(token));
}
__device__ __forceinline__ float key_value(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 24);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int key_token(uint64_t key) { return 0xffffff - static_cast<int>(key & 0xffffffu); }

struct Selection {
  Weight bins[256];
  Weight before;  // the weight of the bins in front of the chosen one
  Weight total;
  int bin;

  // By one warp: the bin, from the largest digit down, in which `target` is reached.
  __device__ __forceinline__ void choose_bin(Weight target) {
    const int lane = lane_id();
    Weight mine = 0;
    for (int i = 0; i < 8; i++) mine += bins[255 - lane * 8 - i];
    Weight reached = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
      const Weight below = __shfl_up_sync(kAllLanes, reached, distance);
      if (lane >= distance) reached += below;
    }
    const Weight all = __shfl_sync(kAllLanes, reached, 31);
    if (target > all) target = all;
    if (reached >= target && reached - mine < target) {  // one lane
      Weight above = reached - mine;
      int digit = 255 - lane * 8;
      while (above + bins[digit] < target) above += bins[digit--];
      bin = digit;
      before = above;
    }
    if (lane == 0) total = all;
  }
};

// The key of the last token kept when tokens are taken in order until their weight reaches a target: a token is kept
// while the weight before it is below the target. `target(total)` is asked once. Only the leading `digits` bytes of
// the 7 of a key are resolved, the others are 0; what has the same leading digits is taken together.
template <typename T, class Weigh, class Target>
__device__ __forceinline__ uint64_t select_key(const Row<T>& row, Selection& shared, int digits, Weigh weigh,
                                               Target target) {
  uint64_t prefix = 0;
  Weight wanted = 0;
  for (int digit = 0; digit < digits; digit++) {
    const int shift = 48 - 8 * digit;
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared.bins[i] = 0;
    __syncthreads();
    for (int token = threadIdx.x; token < row.vocab; token += blockDim.x) {
      const float value = row[token];
      const uint64_t key = rank_key(value, token);
      if (digit && key >> (shift + 8) != prefix) continue;
      const Weight weight = weigh(value);
      if (weight) atomicAdd(&shared.bins[key >> shift & 255], weight);
    }
    __syncthreads();
    if (digit == 0) {
      if (warp_id() == 0) shared.choose_bin(1);
      __syncthreads();
      wanted = target(shared.total);
      if (wanted < 1) wanted = 1;
      __syncthreads();
    }
    if (warp_id() == 0) shared.choose_bin(wanted);
    __syncthreads();
    prefix = prefix << 8 | static_cast<uint64_t>(shared.bin);
    wanted -= shared.before;
    __syncthreads();
  }
  return prefix << (56 - 8 * digits);
}
