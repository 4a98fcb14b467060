// Grow draft trees on the device: the best children of each node, and the best nodes of all candidates as a tree.
#include "rows.cuh"

constexpr int kChildThreads = 512, kMaxChildren = 64, kMaxCandidates = 1024;

// logits [R, V] and scores [R] (log probability of the node itself) -> tokens and child_scores [R, k], best first.
template <typename T>
__global__ void __launch_bounds__(kChildThreads, 2)
    top_children(const T* __restrict__ logits, const float* __restrict__ scores, int64_t* __restrict__ tokens,
                 float* __restrict__ child_scores, int vocab, int k) {
  __shared__ Selection selection;
  __shared__ float scratch[32];
  __shared__ uint64_t found[kMaxChildren];
  __shared__ int num_found;
  const int64_t r = blockIdx.x;
  const Row<T> row(logits, nullptr, nullptr, r, vocab);
  float largest = -INFINITY, sum = 0.0f;
  for (int v = threadIdx.x; v < vocab; v += blockDim.x) largest = fmaxf(largest, row[v]);
  largest = block_reduce<Max>(largest, scratch, -INFINITY);
  for (int v = threadIdx.x; v < vocab; v += blockDim.x) sum += __expf(row[v] - largest);
  const float lse = largest + logf(block_reduce<Sum>(sum, scratch, 0.0f));
  if (threadIdx.x == 0) num_found = 0;
  const uint64_t last = select_key(
      row, selection, 7, [](float) { return Weight(1); }, [&](Weight) { return static_cast<Weight>(k); });
  for (int v = threadIdx.x; v < vocab; v += blockDim.x) {
    const uint64_t key = rank_key(row[v], v);
    if (key >= last) found[atomicAdd(&num_found, 1)] = key;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    int rank = 0;
    for (int j = 0; j < k; j++) rank += found[j] > found[i];
    tokens[r * k + rank] = key_token(found[i]);
    child_scores[r * k + rank] = scores[r] + key_value(found[i]) - lse;
  }
}

// The best n - 1 of C candidates [B, C] below a root, by score and then by order; candidate_parents name an earlier
// candidate, or -1 for the root. A candidate of score -inf is none. -> tokens, parents, depths, positions, chosen
// [B, n], bits [B, n, W], counts [B]; unused places are padding: parent -1, and they see themselves only.
__global__ void __launch_bounds__(kMaxCandidates)
    build_tree(const float* __restrict__ scores, const int* __restrict__ candidate_parents,
               const int64_t* __restrict__ candidate_tokens, const int64_t* __restrict__ roots,
               const int64_t* __restrict__ root_positions, int64_t* __restrict__ tokens, int* __restrict__ parents,
               int* __restrict__ depths, int64_t* __restrict__ positions, int* __restrict__ chosen,
               uint64_t* __restrict__ bits, int* __restrict__ counts, int num_candidates, int n, int words) {
  __shared__ float score[kMaxCandidates];
  __shared__ int place[kMaxCandidates];  // node of a candidate, -1: left out
  __shared__ int parent[kMaxNodes], candidate[kMaxNodes];
  __shared__ int count;
  const int64_t b = blockIdx.x;
  const int i = threadIdx.x, c = num_candidates;
  if (i == 0) count = 1;
  if (i < c) score[i] = scores[b * c + i];
  if (i < n) {
    parent[i] = -1;
    candidate[i] = -1;
  }
  __syncthreads();
  bool is_in = false;
  if (i < c) {
    int rank = 0;
    for (int j = 0; j < c; j++) rank += score[j] > score[i] || (score[j] == score[i] && j < i);
    is_in = score[i] > -INFINITY && rank < n - 1;
    place[i] = is_in;
  }
  __syncthreads();
  int node = 1;
  if (is_in) {
    for (int j = 0; j < i; j++) node += place[j];
    atomicAdd(&count, 1);
  }
  __syncthreads();
  if (i < c) place[i] = is_in ? node : -1;
  __syncthreads();
  if (is_in) {
    const int above = candidate_parents[b * c + i];
    candidate[node] = i;
    parent[node] = above < 0 ? 0 : place[above];
  }
  __syncthreads();
  if (i == 0) counts[b] = count;
  if (i >= n) return;
  const bool is_real = i == 0 || parent[i] >= 0;
  int depth = -1;
  for (int a = i; a >= 0; a = parent[a]) depth++;
  for (int w = 0; w < words; w++) {
    uint64_t seen = 0;
    for (int a = i; a >= 0; a = parent[a])
      if (a >> 6 == w) seen |= 1ull << (a & 63);
    bits[(b * n + i) * words + w] = seen;
  }
  tokens[b * n + i] = candidate[i] >= 0 ? candidate_tokens[b * c + candidate[i]] : roots[b];
  parents[b * n + i] = parent[i];
  depths[b * n + i] = is_real ? depth : 0;
  positions[b * n + i] = root_positions[b] + (is_real ? depth : 0);
  chosen[b * n + i] = candidate[i];
}
