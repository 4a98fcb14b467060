// Decides which thread runs next, runs the blocks of a launch, and finds deadlocks.
//
// Seed 0: one warp after another, each as far as it can go (the largest skew a missing barrier can meet); -1: the same
// in descending order. Odd seeds: the same with the warps in random order. Even seeds: a random warp makes one step.
#pragma once
#include "machine.h"

namespace simt {

struct Schedule {
  int64_t seed;
  uint64_t state;
  int num_warps, warps[32], lanes[32];

  explicit Schedule(int64_t seed_, int num_threads) : seed(seed_), num_warps((num_threads + 31) / 32) {
    state = seed > 0 ? static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15ull | 1 : 0;
    for (int i = 0; i < 32; i++) warps[i] = lanes[i] = i;
  }
  bool single_steps() const { return state && seed % 2 == 0; }
  uint64_t random() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  void shuffle(int* items, int count) {
    if (state)
      for (int i = count - 1; i > 0; i--) std::swap(items[i], items[random() % (i + 1)]);
  }
  int warp(int i) const { return seed < 0 ? num_warps - 1 - warps[i] : warps[i]; }
  int lane(int i) const { return seed < 0 ? 31 - lanes[i] : lanes[i]; }
};

// Run each ready lane of a warp until it waits; whether any ran.
SIMT_OWN inline bool step_warp(Schedule& schedule, int warp) {
  bool ran = false;
  schedule.shuffle(schedule.lanes, 32);
  for (int i = 0; i < 32 && !g.failed; i++) {
    const int thread = warp * 32 + schedule.lane(i);
    if (thread < g.num_threads && g.fibers[thread].state == kReady) {
      ran = true;
      to_fiber(&g.fibers[thread]);
    }
  }
  return ran;
}
SIMT_OWN inline bool advance(Schedule& schedule) {
  bool ran = false;
  schedule.shuffle(schedule.warps, schedule.num_warps);
  for (int i = 0; i < schedule.num_warps && !g.failed; i++) {
    if (schedule.single_steps()) {
      if (step_warp(schedule, schedule.warp(i))) return true;
    } else {
      while (!g.failed && step_warp(schedule, schedule.warp(i))) ran = true;
    }
  }
  return ran;
}
SIMT_OWN inline void open_barrier() {
  g.num_waiting = 0;
  g.epoch++;
  g.count = g.next_count;
  g.any = g.next_any;
  g.all = g.next_all;
  g.next_count = g.next_any = 0;
  g.next_all = 1;
  for (int i = 0; i < g.num_threads; i++)
    if (g.fibers[i].state == kAtBlockBarrier) g.fibers[i].state = kReady;
}
SIMT_OWN inline void report_deadlock() {
  int barrier = -1, lane = -1;
  for (int i = 0; i < g.num_threads; i++) {
    if (g.fibers[i].state == kAtBlockBarrier) barrier = i;
    if (g.fibers[i].state == kInCollective) lane = i;
  }
  const Warp& warp = g.warps[lane < 0 ? 0 : lane >> 5];
  snprintf(g.message, sizeof g.message,
           "block (%u,%u,%u): deadlock: %d threads alive, %d at __syncthreads (the last is thread %d), thread %d in "
           "%s(0x%08x) of which only lanes 0x%08x arrived",
           g.block.x, g.block.y, g.block.z, g.num_alive, g.num_waiting, barrier, lane,
           lane < 0 ? "nothing" : warp.kinds[lane & 31], lane < 0 ? 0u : warp.masks[lane & 31], warp.arrived);
  g.failed = true;
}
SIMT_OWN inline void begin_block(const LaunchConfig& config) {
  g.num_threads = g.num_alive = config.block[0] * config.block[1] * config.block[2];
  g.num_waiting = 0;
  g.failed = false;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(g.shared, kMaxSharedBytes);
  __asan_poison_memory_region(g.shared + g.shared_bytes, kMaxSharedBytes - g.shared_bytes);
#else
  if (__start_simt_shared) memset(__start_simt_shared, 0xff, __stop_simt_shared - __start_simt_shared);
#endif
  memset(g.shared, 0xff, g.shared_bytes);  // NaN as a float, -1 as an integer
  for (auto& warp : g.warps) warp.arrived = 0;
  for (int i = 0; i < g.num_threads; i++) start_fiber(i, config.block);
#if defined(__SANITIZE_THREAD__)
  g.tsan_main = __tsan_get_current_fiber();
  happens_before_release(&g.num_threads);
#endif
}
SIMT_OWN inline bool run_block(const LaunchConfig& config) {
  begin_block(config);
  Schedule schedule(config.seed, g.num_threads);
  while (g.num_alive && !g.failed) {
    const bool ran = advance(schedule);
    if (!g.num_alive || g.failed) break;
    if (g.num_waiting == g.num_alive) {
      if (g.num_alive != g.num_threads) {
        snprintf(g.message, sizeof g.message,
                 "block (%u,%u,%u): %d of %d threads reached __syncthreads(), the others had returned", g.block.x,
                 g.block.y, g.block.z, g.num_alive, g.num_threads);
        g.failed = true;
      } else {
        open_barrier();
      }
    } else if (!ran) {
      report_deadlock();
    }
  }
#if defined(__SANITIZE_THREAD__)
  happens_before_acquire(&g.num_alive);
  for (int i = 0; i < g.num_threads; i++) __tsan_destroy_fiber(g.fibers[i].tsan);
#endif
  return !g.failed;
}

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A>*>(args[I])...);
}
// Arguments as for cuLaunchKernel: pointers to the values. Returns null, or what went wrong.
template <class... A>
SIMT_OWN inline const char* launch(const LaunchConfig& config, void** args, void (*kernel)(A...)) {
  struct Call {
    void (*kernel)(A...);
    void** args;
  } bound{kernel, args};
  g.body = [](void* p) { call(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->args, std::index_sequence_for<A...>{}); };
  g.arguments = &bound;
  const size_t threads = static_cast<size_t>(config.block[0]) * config.block[1] * config.block[2];
  const size_t blocks = static_cast<size_t>(config.grid[0]) * config.grid[1] * config.grid[2];
  if (threads == 0 || threads > kMaxThreads || blocks == 0) return "a block needs 1 to 1024 threads, a grid a block";
  if (config.grid[1] > 65535 || config.grid[2] > 65535) return "grid dimensions y and z end at 65535";
  if (config.shared_bytes > kMaxSharedBytes) return "more dynamic shared memory than any device has (227 KiB)";
  g.shared_bytes = config.shared_bytes;
  g.grid_size = {config.grid[0], config.grid[1], config.grid[2]};
  g.block_size = {config.block[0], config.block[1], config.block[2]};
  g.next_all = 1;
  g.next_any = g.next_count = 0;
  for (size_t i = 0; i < blocks; i++) {
    const size_t b = config.seed < 0 ? blocks - 1 - i : i;
    const size_t plane = static_cast<size_t>(config.grid[0]) * config.grid[1];
    g.block = {static_cast<unsigned>(b % config.grid[0]), static_cast<unsigned>(b / config.grid[0] % config.grid[1]),
               static_cast<unsigned>(b / plane)};
    if (!run_block(config)) return g.message;
  }
  return nullptr;
}

}  // namespace simt

#define SIMT_EXPORT(symbol, ...)                                                     \
  extern "C" const char* symbol(const simt::LaunchConfig* config, void** args) {     \
    return simt::launch(*config, args, __VA_ARGS__);                                 \
  }
