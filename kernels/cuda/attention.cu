// Tree attention: split-KV over packed query rows, then a combination of the splits.
#include "attention.cuh"

constexpr int kWarps = 4, kRows = kWarps * 16;  // packed rows a block

// 16-bit floats on tensor cores. grid (splits, G * row tiles, B); parts: sums [.., D], and maximum and weight
// [.., 2]. kCapped: with a softcap, whose tanh needs registers.
template <typename T, int D, bool kCapped>
__global__ void __launch_bounds__(kWarps * 32, 2)
    tree_attention_mma(const T* __restrict__ query, const T* __restrict__ keys, const T* __restrict__ values,
                       const int* __restrict__ pages, const int* __restrict__ lengths,
                       const uint64_t* __restrict__ bits, const int* __restrict__ query_depths,
                       const int* __restrict__ node_depths, float* __restrict__ sums, float* __restrict__ weights,
                       const Attention a) {
  constexpr int kSlots = D > 128 ? 32 : 64, kStride = D + 8;  // 16 bytes a row more: ldmatrix without bank conflicts
  constexpr bool kQueryInShared = D > 128;                    // else in registers
  SPECDEC_DYNAMIC_SHARED(shared);
  T* key_tiles = reinterpret_cast<T*>(shared);       // [2][kSlots][kStride]
  T* value_tiles = key_tiles + 2 * kSlots * kStride;  // [2][kSlots][kStride]
  T* query_tile = value_tiles + 2 * kSlots * kStride;  // [kRows][kStride] if kQueryInShared

  const int group = a.query_heads / a.kv_heads, rows = a.num_queries * group, tiles = (rows + kRows - 1) / kRows;
  const int kv_head = blockIdx.y / tiles, b = blockIdx.z;
  const Split split(a, lengths[b], blockIdx.x);
  if (static_cast<int>(blockIdx.x) >= split.count) return;
  const int lane = lane_id(), quad = lane >> 2, pair = (lane & 3) * 2;
  const int first_row = blockIdx.y % tiles * kRows, row0 = first_row + warp_id() * 16;
  const bool is_needed = row0 < rows;  // of this warp

  const auto query_row = [&](int r) {
    return query + b * a.query_stride + r / group * a.node_stride + (kv_head * group + r % group) * a.query_head_stride;
  };
  uint32_t query_fragments[kQueryInShared ? 1 : D / 16][4];
  if constexpr (kQueryInShared) {
    for (int i = threadIdx.x; i < kRows * D / 8; i += kWarps * 32) {
      const int r = i / (D / 8), c = i % (D / 8) * 8;
      const bool is_real = first_row + r < rows;
      cp_async16(query_tile + r * kStride + c, query_row(is_real ? first_row + r : 0) + c, is_real);
    }
  } else {
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = row0 + quad + (i & 1) * 8, c = k * 16 + pair + (i >> 1) * 8;
        query_fragments[k][i] = r < rows ? *reinterpret_cast<const uint32_t*>(query_row(r) + c) : 0;
      }
  }
  Sight sights[2];  // of the two rows that a thread holds
#pragma unroll
  for (int h = 0; h < 2; h++)
    sights[h] = Sight(a, split, bits, query_depths, b, min(row0 + quad + h * 8, rows - 1) / group);

  const float scale = a.scale * kLog2e;
  float sum[D / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY}, weight[2] = {0.0f, 0.0f};
  const int* row_pages = pages + static_cast<int64_t>(b) * a.row_pages;
  const int* depths = a.window > 0 ? node_depths + static_cast<int64_t>(b) * a.area : nullptr;
  const int num_tiles = split.end > split.begin ? (split.end - split.begin + kSlots - 1) / kSlots : 0;
  const auto load = [&](int tile) {
    T* to_keys = key_tiles + (tile & 1) * kSlots * kStride;
    T* to_values = value_tiles + (tile & 1) * kSlots * kStride;
    for (int i = threadIdx.x; i < kSlots * D / 8; i += kWarps * 32) {
      const int s = i / (D / 8), c = i % (D / 8) * 8, slot = split.begin + tile * kSlots + s;
      const bool is_real = slot < split.end;
      const int64_t from = slot_offset(a, row_pages, is_real ? slot : split.begin) + kv_head * a.head_stride + c;
      cp_async16(to_keys + s * kStride + c, keys + from, is_real);
      cp_async16(to_values + s * kStride + c, values + from, is_real);
    }
    cp_async_commit();
  };
  if (num_tiles) load(0);
  for (int tile = 0; tile < num_tiles; tile++) {
    if (tile + 1 < num_tiles) {
      load(tile + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    if (is_needed) {
      const T* tile_keys = key_tiles + (tile & 1) * kSlots * kStride;
      const T* tile_values = value_tiles + (tile & 1) * kSlots * kStride;
      float score[kSlots / 8][4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        uint32_t q[4];
        if constexpr (kQueryInShared) {
          ldmatrix4(q, query_tile + (warp_id() * 16 + (lane & 15)) * kStride + k * 16 + (lane >> 4) * 8);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++) q[i] = query_fragments[k][i];
        }
#pragma unroll
        for (int n = 0; n < kSlots / 16; n++) {
          uint32_t f[4];  // keys n * 16 .. + 15, columns k * 16 .. + 15
          ldmatrix4(f, tile_keys + (n * 16 + (lane & 7) + (lane >> 4) * 8) * kStride + k * 16 + (lane >> 3 & 1) * 8);
          mma16816<T>(score[2 * n], q, f[0], f[1]);
          mma16816<T>(score[2 * n + 1], q, f[2], f[3]);
        }
      }
      const int first = split.begin + tile * kSlots;
      const bool is_masked = a.window > 0 || first + kSlots > split.prefix;  // else all is seen
      float top[2] = {largest[0], largest[1]};
#pragma unroll
      for (int n = 0; n < kSlots / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) score[n][i] = kCapped ? capped(a, score[n][i]) : score[n][i] * scale;
      if (is_masked)
#pragma unroll
        for (int n = 0; n < kSlots / 8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (!sights[i >> 1].sees(a, split, depths, first + n * 8 + pair + (i & 1))) score[n][i] = -INFINITY;
#pragma unroll
      for (int n = 0; n < kSlots / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) top[i >> 1] = fmaxf(top[i >> 1], score[n][i]);
      float origin[2], rescale[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(kAllLanes, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(kAllLanes, top[h], 2));
        origin[h] = top[h] == -INFINITY ? 0.0f : top[h];
        rescale[h] = exp2_fast(largest[h] - origin[h]);
        largest[h] = top[h];
        weight[h] *= rescale[h];
      }
#pragma unroll
      for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] *= rescale[j >> 1];
      uint32_t p[kSlots / 16][4];
#pragma unroll
      for (int n = 0; n < kSlots / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          score[n][i] = exp2_fast(score[n][i] - origin[i >> 1]);
          weight[i >> 1] += score[n][i];
        }
        p[n >> 1][(n & 1) * 2] = pack2<T>(score[n][0], score[n][1]);
        p[n >> 1][(n & 1) * 2 + 1] = pack2<T>(score[n][2], score[n][3]);
      }
#pragma unroll
      for (int k = 0; k < kSlots / 16; k++)
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
          uint32_t f[4];  // values k * 16 .. + 15, columns n * 16 .. + 15, transposed
          ldmatrix4_transposed(f, tile_values + (k * 16 + (lane & 15)) * kStride + n * 16 + (lane >> 4) * 8);
          mma16816<T>(sum[2 * n], p[k], f[0], f[1]);
          mma16816<T>(sum[2 * n + 1], p[k], f[2], f[3]);
        }
    }
    __syncthreads();
  }
  if (!num_tiles) cp_async_wait<0>();
  if (!is_needed) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    weight[h] += __shfl_xor_sync(kAllLanes, weight[h], 1);
    weight[h] += __shfl_xor_sync(kAllLanes, weight[h], 2);
    const int r = row0 + quad + h * 8;
    if (r >= rows) continue;
    const int64_t at = part_index(a, blockIdx.x, gridDim.z, b, kv_head * group + r % group, r / group);
    if (pair == 0) {
      weights[at * 2] = largest[h];
      weights[at * 2 + 1] = weight[h];
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++)
      *reinterpret_cast<float2*>(sums + at * D + i * 8 + pair) = make_float2(sum[i][h * 2], sum[i][h * 2 + 1]);
  }
}

constexpr int kRowsF32 = 16, kSlotsF32 = 32, kRowsPerWarp = kRowsF32 / kWarps;

// float32 without tensor cores, for exactness; the same splits and parts. grid (splits, G * row tiles, B).
template <int D, bool kCapped>
__global__ void __launch_bounds__(kWarps * 32, 4)
    tree_attention_f32(const float* __restrict__ query, const float* __restrict__ keys,
                       const float* __restrict__ values, const int* __restrict__ pages,
                       const int* __restrict__ lengths, const uint64_t* __restrict__ bits,
                       const int* __restrict__ query_depths, const int* __restrict__ node_depths,
                       float* __restrict__ sums, float* __restrict__ weights, const Attention a) {
  constexpr int kColumns = (D + 31) / 32;  // of a lane
  SPECDEC_DYNAMIC_SHARED(shared);
  float* query_tile = reinterpret_cast<float*>(shared);  // [kRowsF32][D]
  float* key_tile = query_tile + kRowsF32 * D;            // [kSlotsF32][D + 1]: no bank conflicts down a column
  float* value_tile = key_tile + kSlotsF32 * (D + 1);     // [kSlotsF32][D]

  const int group = a.query_heads / a.kv_heads, rows = a.num_queries * group;
  const int tiles = (rows + kRowsF32 - 1) / kRowsF32, kv_head = blockIdx.y / tiles, b = blockIdx.z;
  const Split split(a, lengths[b], blockIdx.x);
  if (static_cast<int>(blockIdx.x) >= split.count) return;
  const int lane = lane_id(), first_row = blockIdx.y % tiles * kRowsF32, row0 = warp_id() * kRowsPerWarp;
  for (int i = threadIdx.x; i < kRowsF32 * D; i += kWarps * 32) {
    const int r = min(first_row + i / D, rows - 1);
    query_tile[i] = query[b * a.query_stride + r / group * a.node_stride +
                          (kv_head * group + r % group) * a.query_head_stride + i % D];
  }
  Sight sights[kRowsPerWarp];
  float sum[kRowsPerWarp][kColumns] = {}, largest[kRowsPerWarp], weight[kRowsPerWarp];
#pragma unroll
  for (int j = 0; j < kRowsPerWarp; j++) {
    sights[j] = Sight(a, split, bits, query_depths, b, min(first_row + row0 + j, rows - 1) / group);
    largest[j] = -INFINITY;
    weight[j] = 0.0f;
  }
  const int* row_pages = pages + static_cast<int64_t>(b) * a.row_pages;
  const int* depths = a.window > 0 ? node_depths + static_cast<int64_t>(b) * a.area : nullptr;
  for (int first = split.begin; first < split.end; first += kSlotsF32) {
    __syncthreads();
    for (int i = threadIdx.x; i < kSlotsF32 * D; i += kWarps * 32) {
      const int s = i / D, c = i % D;
      const bool is_real = first + s < split.end;
      const int64_t from = is_real ? slot_offset(a, row_pages, first + s) + kv_head * a.head_stride + c : 0;
      key_tile[s * (D + 1) + c] = is_real ? keys[from] : 0.0f;
      value_tile[s * D + c] = is_real ? values[from] : 0.0f;
    }
    __syncthreads();
    float score[kRowsPerWarp] = {};  // of the lane's slot
    for (int c = 0; c < D; c++) {
      const float key = key_tile[lane * (D + 1) + c];
#pragma unroll
      for (int j = 0; j < kRowsPerWarp; j++) score[j] += query_tile[(row0 + j) * D + c] * key;
    }
#pragma unroll
    for (int j = 0; j < kRowsPerWarp; j++) {
      score[j] = kCapped ? capped(a, score[j]) : score[j] * a.scale * kLog2e;
      if (!sights[j].sees(a, split, depths, first + lane)) score[j] = -INFINITY;
      const float top = fmaxf(largest[j], warp_reduce<Max>(score[j])), origin = top == -INFINITY ? 0.0f : top;
      const float rescale = exp2f(largest[j] - origin);
      score[j] = exp2f(score[j] - origin);
      weight[j] = weight[j] * rescale + warp_reduce<Sum>(score[j]);
      largest[j] = top;
#pragma unroll
      for (int i = 0; i < kColumns; i++) sum[j][i] *= rescale;
    }
    for (int s = 0; s < kSlotsF32; s++) {
      float p[kRowsPerWarp];
#pragma unroll
      for (int j = 0; j < kRowsPerWarp; j++) p[j] = __shfl_sync(kAllLanes, score[j], s);
#pragma unroll
      for (int i = 0; i < kColumns; i++) {
        const int c = i * 32 + lane;
        const float value = c < D ? value_tile[s * D + c] : 0.0f;
#pragma unroll
        for (int j = 0; j < kRowsPerWarp; j++) sum[j][i] += p[j] * value;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kRowsPerWarp; j++) {
    const int r = first_row + row0 + j;
    if (r >= rows) continue;
    const int64_t at = part_index(a, blockIdx.x, gridDim.z, b, kv_head * group + r % group, r / group);
    if (lane == 0) {
      weights[at * 2] = largest[j];
      weights[at * 2 + 1] = weight[j];
    }
#pragma unroll
    for (int i = 0; i < kColumns; i++)
      if (i * 32 + lane < D) sums[at * D + i * 32 + lane] = sum[j][i];
  }
}

// out [B, n, Hq, D] from the parts of each split; sinks [Hq] are one more score in each head's softmax, or null.
// One warp a (row, head, query).
template <typename T, int D>
__global__ void __launch_bounds__(kWarps * 32, 8)
    combine_splits(const float* __restrict__ sums, const float* __restrict__ weights,
                   const int* __restrict__ lengths, const float* __restrict__ sinks, T* __restrict__ out, int batch,
                   const Attention a) {
  constexpr int kColumns = (D + 31) / 32;
  const int item = blockIdx.x * kWarps + warp_id(), lane = lane_id();
  if (item >= batch * a.query_heads * a.num_queries) return;
  const int query = item % a.num_queries, head = item / a.num_queries % a.query_heads;
  const int b = item / (a.num_queries * a.query_heads);
  const int count = Split(a, lengths[b], 0).count;
  const float sink = sinks ? sinks[head] * kLog2e : -INFINITY;
  float top = sink;
  for (int s = 0; s < count; s++) top = fmaxf(top, weights[part_index(a, s, batch, b, head, query) * 2]);
  float weight = top > -INFINITY ? exp2f(sink - top) : 0.0f, sum[kColumns] = {};
  for (int s = 0; s < count; s++) {
    const int64_t at = part_index(a, s, batch, b, head, query);
    const float rescale = exp2f(weights[at * 2] - top);
    weight += rescale * weights[at * 2 + 1];
#pragma unroll
    for (int i = 0; i < kColumns; i++)
      if (i * 32 + lane < D) sum[i] += rescale * sums[at * D + i * 32 + lane];
  }
  T* to = out + ((static_cast<int64_t>(b) * a.num_queries + query) * a.query_heads + head) * D;
#pragma unroll
  for (int i = 0; i < kColumns; i++)
    if (i * 32 + lane < D) to[i * 32 + lane] = from_float<T>(weight > 0.0f ? __fdividef(sum[i], weight) : 0.0f);
}
