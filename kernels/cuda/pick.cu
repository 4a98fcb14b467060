// Pick a token from each row of logits: argmax, or argmax of logits / T + Gumbel noise over what the filters keep.
#include "noise.cuh"
#include "rows.cuh"

constexpr int kPickThreads = 256, kFilterThreads = 512;

// Bounds of top-k, top-p and min-p in the order of generate(); one block a row.
template <typename T>
__global__ void __launch_bounds__(kFilterThreads, 2)
    filter_rows(const T* __restrict__ logits, const uint32_t* __restrict__ bits, const int* __restrict__ bit_rows,
                float* __restrict__ bounds, int* __restrict__ lasts, int vocab, float temperature, int top_k,
                float top_p, float min_p) {
  __shared__ Selection selection;
  __shared__ float scratch[32];
  const int r = blockIdx.x;
  const Row<T> row(logits, bits, bit_rows, r, vocab);
  float largest = -INFINITY;
  for (int token = threadIdx.x; token < vocab; token += blockDim.x) largest = fmaxf(largest, row[token]);
  largest = block_reduce<Max>(largest, scratch, -INFINITY);
  float bound = -INFINITY;
  int last = kAnyToken;
  if (top_k > 0 && top_k < vocab && largest > -INFINITY) {
    const uint64_t key = select_key(
        row, selection, 4, [](float value) { return static_cast<Weight>(value > -INFINITY); },
        [&](Weight) { return static_cast<Weight>(top_k); });
    bound = key_value(key);
  }
  if (top_p < 1.0f && fabsf(largest) < INFINITY) {  // +inf has no mass to share; it stays, for the caller to see
    const uint64_t key = select_key(
        row, selection, 7,
        [&](float value) {
          return value >= bound ? static_cast<Weight>(__expf((value - largest) / temperature) * kMassUnit) : Weight(0);
        },
        [&](Weight total) { return static_cast<Weight>(ceil(static_cast<double>(top_p) * static_cast<double>(total))); });
    bound = key_value(key);
    last = key_token(key);
  }
  const float least = largest + temperature * logf(min_p);
  if (min_p > 0.0f && least > bound) {
    bound = least;
    last = kAnyToken;
  }
  if (threadIdx.x == 0) {
    bounds[r] = bound;
    lasts[r] = last;
  }
}

struct Best {  // of a part of a row
  float score;
  int token;
  float largest, sum;  // of the scaled logits: maximum, and sum of exp(x - maximum)

  __device__ __forceinline__ void take(const Best& other) {
    if (other.score > score || (other.score == score && other.token < token)) {
      score = other.score;
      token = other.token;
    }
    const float top = fmaxf(largest, other.largest);
    if (top > -INFINITY) sum = sum * __expf(largest - top) + other.sum * __expf(other.largest - top);
    largest = top;
  }
  __device__ __forceinline__ void warp_all() {
#pragma unroll
    for (int distance = 16; distance; distance >>= 1) {
      const Best other = {__shfl_xor_sync(kAllLanes, score, distance), __shfl_xor_sync(kAllLanes, token, distance),
                          __shfl_xor_sync(kAllLanes, largest, distance), __shfl_xor_sync(kAllLanes, sum, distance)};
      take(other);
    }
  }
};

// One block a part of a row: parts [R, splits]. inv_t 0 is greedy.
template <typename T>
__global__ void __launch_bounds__(kPickThreads, 4)
    pick_parts(const T* __restrict__ logits, const uint32_t* __restrict__ bits, const int* __restrict__ bit_rows,
               const float* __restrict__ bounds, const int* __restrict__ lasts, const int64_t* __restrict__ seed,
               const int64_t* __restrict__ row_keys, const int64_t* __restrict__ positions, Best* __restrict__ parts,
               int vocab, int part_size, float inv_t) {
  __shared__ Best bests[kPickThreads / 32];
  const int r = blockIdx.y;
  const Row<T> row(logits, bits, bit_rows, r, vocab);
  const Kept kept(bounds, lasts, r);
  const bool is_greedy = inv_t == 0.0f;
  const float scale = is_greedy ? 1.0f : inv_t;
  const NoiseKey key = is_greedy ? NoiseKey{} : target_key(seed[0], row_keys[r], positions[r]);
  const int begin = blockIdx.x * part_size, end = min(vocab, begin + part_size);
  Best best = {-INFINITY, kAnyToken, -INFINITY, 0.0f};
  // Four neighbouring tokens share one block of random words.
  for (int group = begin + 4 * threadIdx.x; group < end; group += 4 * blockDim.x) {
    float x[4];
    float largest = best.largest;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float value = group + i < end ? row[group + i] : -INFINITY;
      x[i] = kept.has(value, group + i) ? value * scale : -INFINITY;
      largest = fmaxf(largest, x[i]);
    }
    if (largest > best.largest) {
      best.sum *= __expf(best.largest - largest);
      best.largest = largest;
    }
    bool may_win = false;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (x[i] == -INFINITY) continue;
      best.sum += __expf(x[i] - best.largest);
      may_win |= x[i] + 23.0f > best.score;  // Gumbel noise from 32 bits stays below 23
    }
    if (is_greedy) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (x[i] > best.score) {
          best.score = x[i];
          best.token = group + i;
        }
    } else if (may_win) {
      const Words words = philox(key, group >> 2);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        // An exponential is at least 1 - u: most tokens are out without a logarithm.
        const float least = static_cast<float>(~words.w[i]) * (0.999f / 4294967296.0f);
        if (!(x[i] > -INFINITY) || least > __expf(x[i] - best.score)) continue;
        const float score = x[i] - logf(exponential(words.w[i]));
        if (score > best.score) {
          best.score = score;
          best.token = group + i;
        }
      }
    }
  }
  best.warp_all();
  if (lane_id() == 0) bests[warp_id()] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kPickThreads / 32; i++) best.take(bests[i]);
  parts[static_cast<int64_t>(r) * gridDim.x + blockIdx.x] = best;
}

// One warp a row: tokens [R] (-1: nothing is allowed), largest and lse [R] of the kept scaled logits.
__global__ void pick_rows(const Best* __restrict__ parts, int64_t* __restrict__ tokens, float* __restrict__ largest,
                          float* __restrict__ lse, int splits) {
  const int r = blockIdx.x;
  Best best = {-INFINITY, kAnyToken, -INFINITY, 0.0f};
  for (int i = threadIdx.x; i < splits; i += 32) best.take(parts[static_cast<int64_t>(r) * splits + i]);
  best.warp_all();
  if (threadIdx.x != 0) return;
  tokens[r] = best.token == kAnyToken ? -1 : best.token;
  largest[r] = best.largest;
  lse[r] = best.largest + logf(best.sum);
}
