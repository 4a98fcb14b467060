// Prompt lookup: what followed the latest earlier occurrence of the longest suffix. One block a row.
#include "block.cuh"

constexpr int kLookupThreads = 512;

// history [B, S] of which lengths [B] are in use -> tokens [B, k], padded with -1, counts [B], orders [B] (length of
// the suffix found, 0: none).
__global__ void __launch_bounds__(kLookupThreads)
    lookup_ngram(const int64_t* __restrict__ history, const int* __restrict__ lengths, int64_t* __restrict__ tokens,
                 int* __restrict__ counts, int* __restrict__ orders, int size, int min_order, int max_order, int k) {
  __shared__ int64_t scratch[32];
  const int64_t b = blockIdx.x;
  const int64_t* text = history + b * size;
  const int length = lengths[b];
  // Longest first, then latest: one number to maximise.
  int64_t best = 0;
  for (int end = threadIdx.x + 1; end < length; end += blockDim.x) {
    const int limit = min(max_order, end);
    int order = 0;
    while (order < limit && text[end - 1 - order] == text[length - 1 - order]) order++;
    if (order >= min_order) best = Max::of(best, static_cast<int64_t>(order) << 32 | static_cast<int64_t>(end));
  }
  best = block_reduce<Max>(best, scratch, static_cast<int64_t>(0));
  const int from = static_cast<int>(best & 0xffffffff), count = best ? min(k, length - from) : 0;
  for (int i = threadIdx.x; i < k; i += blockDim.x) tokens[b * k + i] = i < count ? text[from + i] : -1;
  if (threadIdx.x == 0) {
    counts[b] = count;
    orders[b] = static_cast<int>(best >> 32);
  }
}
