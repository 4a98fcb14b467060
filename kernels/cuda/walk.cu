// Sample-and-match: follow the picked tokens down the tree. One block of one warp a row.
#include "block.cuh"

// tokens [B, n], parents [B, n], picked [B, n] -> path [B, P] and out_tokens [B, P], padded with -1, counts [B].
__global__ void walk_tree(const int64_t* __restrict__ tokens, const int* __restrict__ parents,
                          const int64_t* __restrict__ picked, int* __restrict__ path,
                          int64_t* __restrict__ out_tokens, int* __restrict__ counts, int n, int max_path) {
  __shared__ Links links;
  __shared__ int64_t token[kMaxNodes], pick[kMaxNodes];
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    token[i] = tokens[row * n + i];
    pick[i] = picked[row * n + i];
  }
  for (int i = threadIdx.x; i < max_path; i += blockDim.x) {
    path[row * max_path + i] = -1;
    out_tokens[row * max_path + i] = -1;
  }
  links.build(parents + row * n, n);
  if (threadIdx.x != 0) return;
  int node = 0, count = 0;
  while (node >= 0) {
    path[row * max_path + count] = node;
    out_tokens[row * max_path + count] = pick[node];
    if (++count == max_path) break;
    int child = links.first[node];
    while (child >= 0 && token[child] != pick[node]) child = links.next[child];
    node = child;
  }
  counts[row] = count;
}
