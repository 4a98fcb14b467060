// Move the slots of an accepted path to the front of the tree's area, for the keys and values of all layers at once.
#include "platform.cuh"

// Where the slots of one row stand in a buffer [pages, G, page size, D]; dense is one page a row.
struct SlotMap {
  const int* pages;  // of this row
  int page_size;
  int64_t page_stride, slot_stride;  // in units of 16 bytes

  __device__ __forceinline__ int64_t operator[](int slot) const {
    return pages[slot / page_size] * page_stride + slot % page_size * slot_stride;
  }
};

// buffers [2 L] addresses; table [B, pages a row]; starts [B] the root's slot; path [B, P]; counts [B].
// Node path[i] moves to slot starts + i. A path ascends, so moves in order, a chunk at a time, never read what an
// earlier one overwrote.
__global__ void commit_kv(const int64_t* __restrict__ buffers, const int* __restrict__ table,
                          const int* __restrict__ starts, const int* __restrict__ path,
                          const int* __restrict__ counts, int max_path, int row_pages, int page_size, int heads,
                          int vectors, int64_t page_stride, int64_t head_stride, int64_t slot_stride) {
  constexpr int kChunk = 8;
  const int b = blockIdx.y, start = starts[b], count = counts[b];
  const SlotMap slots = {table + static_cast<int64_t>(b) * row_pages, page_size, page_stride, slot_stride};
  const int* nodes = path + static_cast<int64_t>(b) * max_path;
  for (int item = threadIdx.x; item < heads * vectors; item += blockDim.x) {
    uint4* base = reinterpret_cast<uint4*>(buffers[blockIdx.x]) + item / vectors * head_stride + item % vectors;
    for (int first = 1; first < count; first += kChunk) {  // the root stays where it is
      uint4 held[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; i++)
        if (first + i < count) held[i] = base[slots[start + nodes[first + i]]];
#pragma unroll
      for (int i = 0; i < kChunk; i++)
        if (first + i < count) base[slots[start + first + i]] = held[i];
    }
  }
}
