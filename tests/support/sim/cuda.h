// CUDA's names on a CPU: what kernels/cuda uses of the language, and no more.
#pragma once
#include <cmath>

#include "schedule.h"

#define SPECDEC_CPU 1
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static __attribute__((section("simt_shared")))
#endif

namespace simt {
SIMT_OWN inline Index3 thread_index() { return g.current->index; }
SIMT_OWN inline Index3 block_index() { return g.block; }
SIMT_OWN inline Index3 block_size() { return g.block_size; }
SIMT_OWN inline Index3 grid_size() { return g.grid_size; }
inline void* dynamic_shared() { return g.shared; }

template <class T>
SIMT_OWN inline T shuffle(uint32_t mask, T value, int source, const char* kind) {
  static_assert(sizeof(T) <= 64, "a shuffled value has at most 64 bytes");
  Warp& warp = my_warp();
  const int lane = my_lane();
  memcpy(warp.in[lane], &value, sizeof value);
  warp.args[lane] = source;
  collective(mask, kind, [](Warp& w, uint32_t m) {
    for (int i = 0; i < 32; i++) {
      if (!(m >> i & 1)) continue;
      if (!(m >> w.args[i] & 1)) fail("shuffle: lane %d reads lane %d outside its mask 0x%08x", i, w.args[i], m);
      memcpy(w.out[i], w.in[w.args[i]], 64);
    }
  });
  memcpy(&value, warp.out[lane], sizeof value);
  return value;
}
template <class T, class F>
SIMT_OWN inline T atomic(T* address, F update) {  // fibers are never interrupted
  happens_before_acquire(address);
  const T old = *address;
  *address = update(old);
  happens_before_release(address);
  return old;
}
}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

// ---- vector types -----------------------------------------------------------------------------------------------
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- synchronisation, warp collectives, atomics -------------------------------------------------------------------
inline void __syncthreads() { simt::block_barrier(); }
SIMT_OWN inline int __syncthreads_or(int predicate) {
  simt::g.next_any |= predicate != 0;
  simt::block_barrier();
  return simt::g.any;
}
inline void __syncwarp(unsigned mask = ~0u) {
  simt::collective(mask, "__syncwarp", [](simt::Warp&, uint32_t) {});
}
template <class T>
SIMT_OWN inline T __shfl_sync(unsigned mask, T value, int source) {
  return simt::shuffle(mask, value, source & 31, "__shfl_sync");
}
template <class T>
SIMT_OWN inline T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return simt::shuffle(mask, value, simt::my_lane() ^ distance, "__shfl_xor_sync");
}
template <class T>
SIMT_OWN inline T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = simt::my_lane();
  return simt::shuffle(mask, value, lane < distance ? lane : lane - distance, "__shfl_up_sync");
}
SIMT_OWN inline unsigned __ballot_sync(unsigned mask, int predicate) {
  simt::Warp& warp = simt::my_warp();
  const int lane = simt::my_lane();
  warp.args[lane] = predicate != 0;
  simt::collective(mask, "__ballot_sync", [](simt::Warp& w, uint32_t m) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= (m >> i & 1) ? static_cast<uint32_t>(w.args[i]) << i : 0u;
    for (int i = 0; i < 32; i++)
      if (m >> i & 1) memcpy(w.out[i], &bits, 4);
  });
  unsigned bits;
  memcpy(&bits, warp.out[lane], 4);
  return bits;
}
template <class T, class U>
SIMT_OWN inline T atomicAdd(T* address, U value) {
  return simt::atomic(address, [value](T old) { return static_cast<T>(old + value); });
}
template <class T, class U>
SIMT_OWN inline T atomicMax(T* address, U value) {
  return simt::atomic(address, [value](T old) { return old < static_cast<T>(value) ? static_cast<T>(value) : old; });
}

// ---- mathematics and bits -------------------------------------------------------------------------------------------
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned __int128>(a) * b >> 64;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class To, class From>
inline To simt_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}

// ---- 16-bit floats ----------------------------------------------------------------------------------------------------
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(simt_bits<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {simt_bits<uint16_t>(static_cast<_Float16>(x))}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
