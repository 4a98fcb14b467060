// Philox4x32-10 (Salmon et al., SC 2011) keyed by seed, row and position: number for number the stream of the twins.
#pragma once
#include "platform.cuh"

constexpr uint32_t kStreamTarget = 0, kStreamCoin = 2, kStreamResidual = 3;

struct Words {
  uint32_t w[4];
};
struct NoiseKey {
  uint32_t position, detail, row, low, high;
};

// The target's own choice at a position: the same in every step.
__device__ __forceinline__ NoiseKey target_key(int64_t seed, int64_t row, int64_t position) {
  return {static_cast<uint32_t>(position), kStreamTarget << 28, static_cast<uint32_t>(row), static_cast<uint32_t>(seed),
          static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}
// What belongs to one step: keyed by the step's first position, the depth in its tree and an index.
__device__ __forceinline__ NoiseKey step_key(int64_t seed, int64_t row, int64_t position, uint32_t stream, int depth,
                                             int index) {
  NoiseKey key = target_key(seed, row, position);
  key.detail = stream << 28 | static_cast<uint32_t>(depth) << 16 | static_cast<uint32_t>(index);
  return key;
}

__device__ __forceinline__ Words philox(const NoiseKey& key, uint32_t block) {
  uint32_t a = block, b = key.position, c = key.detail, d = key.row, k0 = key.low, k1 = key.high;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = __umulhi(0xD2511F53u, a), low0 = 0xD2511F53u * a;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c), low1 = 0xCD9E8D57u * c;
    a = high1 ^ b ^ k0;
    b = low1;
    c = high0 ^ d ^ k1;
    d = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}
// A standard exponential from a word, -log((word + 1/2) / 2^32), precise at both ends in float32.
__device__ __forceinline__ float exponential(uint32_t word) {
  constexpr float kUnit = 1.0f / 4294967296.0f;
  if (word < 0x80000000u) return -logf((static_cast<float>(word) + 0.5f) * kUnit);
  return -log1pf(-(static_cast<float>(~word) + 0.5f) * kUnit);
}
