// Multi-round rejection along a tree (rules 2 to 6 of docs/verification.md). One block a row.
//
// The residual after some rejections is never stored: it is computed at a token from the scalars of each rejection.
#include "noise.cuh"
#include "rows.cuh"

constexpr int kRejectThreads = 512;
constexpr float kResidualUnit = 1152921504606846976.0f;  // 2^60: residuals as integers, whose sums are exact

// The children of one node rejected so far.
struct Rejections {
  int count;
  int64_t token[kMaxNodes];
  int source[kMaxNodes];       // row of draft_probs, -1: picked with certainty
  float draft_scale[kMaxNodes];  // 1 / mass that the row had left
  float scale[kMaxNodes];        // 1 / mass of the residual; 0: nothing was left, and the rejection does not count
};

template <typename T>
struct Residual {
  const Row<T>& logits;
  const Kept& kept;
  const float* draft_probs;  // [m, V] of this row
  const int* replaced;       // [m] 0: drawn with replacement, 1: without
  const Rejections& done;
  float inv_t, lse;

  __device__ __forceinline__ float target(int token) const {
    const float value = logits[token];
    return kept.has(value, token) ? __expf(value * inv_t - lse) : 0.0f;
  }
  // The draft's mass at `token` for the sibling after `rejected` others, not yet rescaled.
  __device__ __forceinline__ float draft(int source, int token, int rejected) const {
    if (replaced[source])
      for (int i = 0; i < rejected; i++)
        if (done.source[i] == source && done.token[i] == token) return 0.0f;
    return draft_probs[static_cast<int64_t>(source) * logits.vocab + token];
  }
  // What a rejection leaves of `mass`, not yet rescaled.
  __device__ __forceinline__ float subtract(float mass, int i, int token) const {
    if (done.source[i] < 0) return done.token[i] == token ? 0.0f : mass;
    return fmaxf(mass - draft(done.source[i], token, i) * done.draft_scale[i], 0.0f);
  }
  __device__ __forceinline__ float at(int token, int rejected) const {
    float mass = target(token);
    for (int i = 0; i < rejected; i++)
      if (done.scale[i] > 0.0f) mass = subtract(mass, i, token) * done.scale[i];
    return mass;
  }
};

__device__ __forceinline__ uint64_t two_words(const NoiseKey& key) {
  const Words words = philox(key, 0);
  return static_cast<uint64_t>(words.w[0]) << 32 | words.w[1];
}

// The first token at which the running sum of weights exceeds the fraction `random` / 2^64 of their total; -1 if all
// are 0. Each round the warps add up one slice each and the slice that holds the point is cut further.
template <class Weigh>
__device__ __forceinline__ int invert(int vocab, uint64_t random, Weight* sums, Weigh weigh) {
  const int warps = blockDim.x >> 5, lane = lane_id();
  int begin = 0, end = vocab, slice;
  Weight point = 0;
  do {
    slice = ((end - begin + warps - 1) / warps + 31) / 32 * 32;
    const int from = begin + warp_id() * slice, to = min(end, from + slice);
    Weight sum = 0;
    for (int token = from + lane; token < to; token += 32) sum += weigh(token);
    sum = warp_reduce<Sum>(sum);
    __syncthreads();
    if (lane == 0) sums[warp_id()] = sum;
    __syncthreads();
    if (begin == 0 && end == vocab) {
      Weight total = 0;
      for (int i = 0; i < warps; i++) total += sums[i];
      if (total == 0) return -1;
      point = __umul64hi(random, total);
    }
    int chosen = 0;
    while (point >= sums[chosen]) point -= sums[chosen++];
    begin += chosen * slice;
    end = min(end, begin + slice);
  } while (slice > 32);
  Weight reached = begin + lane < end ? weigh(begin + lane) : 0;
#pragma unroll
  for (int distance = 1; distance < 32; distance <<= 1) {
    const Weight below = __shfl_up_sync(kAllLanes, reached, distance);
    if (lane >= distance) reached += below;
  }
  return begin + __ffs(__ballot_sync(kAllLanes, reached > point)) - 1;
}

// logits [B, n, V]; lse, bounds, lasts and picked [B, n] as from pick_rows; tokens, parents, sources [B, n];
// draft_probs [B, m, V] and replaced [B, m], or null; row_keys and positions [B] of the first undecided token.
// -> path [B, P] and out_tokens [B, P], padded with -1, counts [B].
template <typename T>
__global__ void __launch_bounds__(kRejectThreads, 2)
    reject_tree(const T* __restrict__ logits, const uint32_t* __restrict__ bits, const int* __restrict__ bit_rows,
                const float* __restrict__ lse, const float* __restrict__ bounds, const int* __restrict__ lasts,
                const int64_t* __restrict__ picked, const int64_t* __restrict__ tokens,
                const int* __restrict__ parents, const int* __restrict__ sources,
                const float* __restrict__ draft_probs, const int* __restrict__ replaced,
                const int64_t* __restrict__ seed, const int64_t* __restrict__ row_keys,
                const int64_t* __restrict__ positions, int* __restrict__ path, int64_t* __restrict__ out_tokens,
                int* __restrict__ counts, int n, int m, int vocab, int max_path, float inv_t) {
  __shared__ Links links;
  __shared__ Rejections done;
  __shared__ Weight sums[32];
  __shared__ float scratch[32];
  const int b = blockIdx.x;
  const int64_t first = static_cast<int64_t>(b) * n, out = static_cast<int64_t>(b) * max_path;
  for (int i = threadIdx.x; i < max_path; i += blockDim.x) {
    path[out + i] = -1;
    out_tokens[out + i] = -1;
  }
  links.build(parents + first, n);
  const float* drafts = draft_probs ? draft_probs + static_cast<int64_t>(b) * m * vocab : nullptr;
  const int* kinds = replaced ? replaced + static_cast<int64_t>(b) * m : nullptr;

  for (int node = 0, depth = 0;; depth++) {
    const Row<T> row(logits, bits, bit_rows, b * n + node, vocab);
    const Kept kept(bounds, lasts, b * n + node);
    const Residual<T> residual{row, kept, drafts, kinds, done, inv_t, lse[first + node]};
    int rejected = 0, child = depth + 1 < max_path ? links.first[node] : -1;
    for (; child >= 0; child = links.next[child], rejected++) {
      const int64_t token = tokens[first + child];
      const int source = sources ? sources[first + child] : -1;
      float draft_scale = 1.0f, draft_mass = 1.0f;
      if (source >= 0) {
        if (kinds[source]) {
          bool is_first = true;
          for (int i = 0; i < rejected; i++) is_first = is_first && done.source[i] != source;
          if (!is_first) {
            float left = 0.0f;
            for (int v = threadIdx.x; v < vocab; v += blockDim.x) left += residual.draft(source, v, rejected);
            left = block_reduce<Sum>(left, scratch, 0.0f);
            draft_scale = left > 0.0f ? 1.0f / left : 0.0f;
          }
        }
        draft_mass = residual.draft(source, token, rejected) * draft_scale;
      }
      const NoiseKey coin = step_key(seed[0], row_keys[b], positions[b], kStreamCoin, depth, rejected);
      const double uniform = (static_cast<double>(philox(coin, 0).w[0]) + 0.5) / 4294967296.0;
      if (uniform < static_cast<double>(residual.at(token, rejected) / draft_mass)) break;
      __syncthreads();
      if (threadIdx.x == 0) {
        done.token[rejected] = token;
        done.source[rejected] = source;
        done.draft_scale[rejected] = draft_scale;
      }
      __syncthreads();
      float left = 0.0f;
      for (int v = threadIdx.x; v < vocab; v += blockDim.x) left += residual.subtract(residual.at(v, rejected), rejected, v);
      left = block_reduce<Sum>(left, scratch, 0.0f);
      if (threadIdx.x == 0) done.scale[rejected] = left > 0.0f ? 1.0f / left : 0.0f;
      __syncthreads();
    }
    int64_t emitted = 0;
    if (child >= 0) {
      emitted = tokens[first + child];
    } else if (rejected == 0) {
      emitted = picked[first + node];  // nothing was tried: the target's own pick
    } else {
      const NoiseKey key = step_key(seed[0], row_keys[b], positions[b], kStreamResidual, depth, 0);
      emitted = invert(vocab, two_words(key), sums, [&](int v) {
        return static_cast<Weight>(residual.at(v, rejected) * kResidualUnit);
      });
    }
    if (threadIdx.x == 0) {
      path[out + depth] = node;
      out_tokens[out + depth] = emitted;
      if (child < 0) counts[b] = depth + 1;
    }
    if (child < 0) return;
    __syncthreads();
    node = child;
  }
}
