// The PTX instructions that kernels/cuda/ptx.cuh wraps, emulated by the fragment layouts of the PTX manual.
#pragma once
#include "cuda.h"

namespace simt {

inline float element(const __half*, uint16_t bits) { return __half2float(__half{bits}); }
inline float element(const __nv_bfloat16*, uint16_t bits) { return __bfloat162float(__nv_bfloat16{bits}); }

template <typename T>
inline void multiply_fragments(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int row = lane >> 2, pair = (lane & 3) * 2;
    uint16_t in_a[8], in_b[4];
    memcpy(in_a, warp.in[lane], 16);
    memcpy(in_b, warp.in[lane] + 16, 8);
    for (int i = 0; i < 8; i++)
      a[row + (i >> 1 & 1) * 8][pair + (i & 1) + (i >> 2) * 8] = element(static_cast<T*>(nullptr), in_a[i]);
    for (int i = 0; i < 4; i++) b[pair + (i & 1) + (i >> 1) * 8][row] = element(static_cast<T*>(nullptr), in_b[i]);
  }
  for (int lane = 0; lane < 32; lane++) {
    float d[4];
    memcpy(d, warp.in[lane] + 32, 16);
    for (int i = 0; i < 4; i++) {
      const int row = (lane >> 2) + (i >> 1) * 8, column = (lane & 3) * 2 + (i & 1);
      for (int k = 0; k < 16; k++) d[i] += a[row][k] * b[k][column];
    }
    memcpy(warp.out[lane], d, 16);
  }
}
template <typename T>
SIMT_OWN inline void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = my_warp();
  const int lane = my_lane();
  memcpy(warp.in[lane], a, 16);
  memcpy(warp.in[lane] + 16, b, 8);
  memcpy(warp.in[lane] + 32, d, 16);
  collective(~0u, "mma.m16n8k16", [](Warp& w, uint32_t) { multiply_fragments<T>(w); });
  memcpy(d, warp.out[lane], 16);
}
inline void load_matrices(Warp& warp) {
  const bool transposed = warp.args[0];
  for (int lane = 0; lane < 32; lane++)
    for (int matrix = 0; matrix < 4; matrix++)
      for (int half = 0; half < 2; half++) {
        const int along = (lane & 3) * 2 + half, across = lane >> 2;
        const uint16_t* row;
        memcpy(&row, warp.in[matrix * 8 + (transposed ? along : across)], 8);
        memcpy(warp.out[lane] + matrix * 4 + half * 2, row + (transposed ? across : along), 2);
      }
}
SIMT_OWN inline void ldmatrix4(uint32_t (&registers)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) & 15) fail("ldmatrix: address not aligned to 16 bytes");
  Warp& warp = my_warp();
  const int lane = my_lane();
  memcpy(warp.in[lane], &row, 8);
  warp.args[lane] = transposed;
  collective(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", [](Warp& w, uint32_t) { load_matrices(w); });
  memcpy(registers, warp.out[lane], 16);
}
inline void copy16(void* to, const void* from) {  // instrumented, so that the race checker sees it
  auto* words = static_cast<uint64_t*>(to);
  const auto* source = static_cast<const uint64_t*>(from);
  words[0] = source ? source[0] : 0;
  words[1] = source ? source[1] : 0;
}

}  // namespace simt

template <typename T>
inline void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  simt::mma16816<T>(d, a, b);
}
inline void ldmatrix4(uint32_t (&registers)[4], const void* row) { simt::ldmatrix4(registers, row, false); }
inline void ldmatrix4_transposed(uint32_t (&registers)[4], const void* row) { simt::ldmatrix4(registers, row, true); }

// The bytes arrive at the wait and are NaN before, so that a missing wait shows.
SIMT_OWN inline void cp_async16(void* to, const void* from, bool is_real) {
  simt::Fiber* me = simt::g.current;
  if (me->num_copies == simt::kMaxCopies) simt::fail("cp.async: more than %d copies in flight", simt::kMaxCopies);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15)
    simt::fail("cp.async: address not aligned to 16 bytes");
  memset(to, 0xff, 16);
  me->copies[me->num_copies++] = {to, is_real ? from : nullptr, me->group};
}
SIMT_OWN inline void cp_async_commit() { simt::g.current->group++; }
template <int N>
SIMT_OWN inline void cp_async_wait() {
  simt::Fiber* me = simt::g.current;
  int kept = 0;
  for (int i = 0; i < me->num_copies; i++) {
    const simt::AsyncCopy copy = me->copies[i];
    if (copy.group >= me->group - N)
      me->copies[kept++] = copy;
    else
      simt::copy16(copy.to, copy.from);
  }
  me->num_copies = kept;
}
inline float exp2_fast(float x) { return exp2f(x); }
