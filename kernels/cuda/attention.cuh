// Tree attention, what both of its kernels share: which slots a block reads, and which of them a row sees.
//
// Row b keeps `lengths[b]` slots; the tree's area follows: node j stands in slot lengths[b] + j. A kept slot is seen by
// all queries (within the window), an area slot by those whose bits say so. Queries and heads of one key-value head
// are packed: packed row r is query r / G and head r % G of the group.
#pragma once
#include "block.cuh"
#include "ptx.cuh"

constexpr int kMaxSplits = 16, kMinSplit = 256;  // as in kernels/attention.py
constexpr float kLog2e = 1.4426950408889634f;

struct Attention {  // passed by value; as in kernels/attention.py
  int num_queries, query_heads, kv_heads, area, words, row_pages, page_shift, window, capacity;
  float scale, softcap;
  int64_t query_stride, node_stride, query_head_stride;  // of query [B, n, Hq, D], in elements
  int64_t page_stride, head_stride, slot_stride;         // of keys and values [pages, G, C, D], in elements
};

// The slots [begin, end) of one split. How they are cut is a function of the kept length alone: never of the number of
// queries, so that a node's result does not depend on the rest of its tree.
struct Split {
  int prefix, begin, end, count;

  __device__ Split(const Attention& a, int prefix_, int split) : prefix(prefix_) {
    const int first = a.window > 0 ? max(0, prefix - a.window + 1) & ~63 : 0;  // no query sees less
    const int length = prefix - first;
    const int size = max(kMinSplit, ((length + kMaxSplits - 1) / kMaxSplits + 63) & ~63);
    count = max(1, (length + size - 1) / size);
    begin = first + split * size;
    end = split == count - 1 ? min(prefix + a.area, a.capacity) : begin + size;
  }
};

// What one packed row sees of the slots of a split.
struct Sight {
  const uint64_t* bits;  // [W] of its query
  int oldest;            // the first position inside its window

  __device__ Sight() {}
  __device__ Sight(const Attention& a, const Split& split, const uint64_t* all_bits, const int* query_depths, int b,
                   int query) {
    const int64_t at = static_cast<int64_t>(b) * a.num_queries + query;
    bits = all_bits + at * a.words;
    oldest = a.window > 0 ? split.prefix + query_depths[at] - a.window + 1 : 0;
  }
  // `node_depths` [A] of the row are read only with a window.
  __device__ __forceinline__ bool sees(const Attention& a, const Split& split, const int* node_depths, int slot) const {
    if (slot >= split.end) return false;
    const int node = slot - split.prefix;
    if (node < 0) return slot >= oldest;
    if (!(bits[node >> 6] >> (node & 63) & 1)) return false;
    return a.window == 0 || split.prefix + node_depths[node] >= oldest;
  }
};

// A product of query and key as a score in units of log 2, so that weights are powers of two.
__device__ __forceinline__ float capped(const Attention& a, float product) {
  return kLog2e * a.softcap * tanhf(__fdividef(product * a.scale, a.softcap));
}
__device__ __forceinline__ int64_t slot_offset(const Attention& a, const int* pages, int slot) {
  return pages[slot >> a.page_shift] * a.page_stride + (slot & ((1 << a.page_shift) - 1)) * a.slot_stride;
}
// Where the partial result of a packed row stands: [splits, B, Hq, n].
__device__ __forceinline__ int64_t part_index(const Attention& a, int split, int batch, int b, int head, int query) {
  return ((static_cast<int64_t>(split) * batch + b) * a.query_heads + head) * a.num_queries + query;
}
